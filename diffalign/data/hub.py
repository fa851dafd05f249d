"""The hub, as little of it as is needed: list a data set's files, download one, delete one.

`Hub` is what `diffalign.data.source` works with, `HuggingFaceHub` implements it, `HubError` says why not.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from diffalign.errors import UserError


class HubError(UserError):
    """Why the hub did not give what was asked for, in words fit for a list of reasons.

    Attributes:
        passing: trying again later may help (a broken connection, not a missing file).
    """

    def __init__(self, reason: str, *, passing: bool = False) -> None:
        super().__init__(reason)
        self.passing = passing


@dataclass(frozen=True)
class Listing:
    """A data set at one commit: `files` maps relative path to size in bytes."""

    commit: str
    files: dict[str, int]
    offline: bool = False


class Hub(Protocol):
    """What a source needs of a hub."""

    def list_files(self, repo: str, revision: str | None) -> Listing:
        """All files of a data set. Raises `HubError`."""
        ...

    def cached(self, repo: str, path: str, revision: str) -> Path | None:
        """The file, if it is on this machine already."""
        ...

    def download(self, repo: str, path: str, revision: str) -> Path:
        """The file on this machine. Raises `HubError`."""
        ...

    def delete(self, path: Path) -> None:
        """Remove a downloaded file and what it links to."""
        ...

    def folder(self) -> Path:
        """Where downloads go."""
        ...


class HuggingFaceHub:
    """The Hugging Face hub through `huggingface_hub`, with its cache, tokens and offline mode (`HF_HUB_OFFLINE=1`)."""

    def folder(self) -> Path:
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE)

    def list_files(self, repo: str, revision: str | None) -> Listing:
        """The files at `revision` (a branch, tag or commit; None is the main branch).

        Raises:
            HubError: not found, gated, no connection, or (offline) not in the local cache.
        """
        from huggingface_hub import HfApi, constants, errors

        if constants.HF_HUB_OFFLINE:
            return self._list_cache(repo, revision)
        try:
            info = HfApi().dataset_info(repo, revision=revision, files_metadata=True)
            if info.gated:  # its file list is public, its files are not
                HfApi().auth_check(repo, repo_type="dataset")
        except (errors.HFValidationError, OSError, errors.HTTPError) as error:
            raise _explain(error, repo) from error
        assert info.sha is not None, "the hub names the commit of what it lists"
        return Listing(info.sha, {file.rfilename: file.size or 0 for file in info.siblings or ()})

    def _list_cache(self, repo: str, revision: str | None) -> Listing:
        """What earlier downloads left in the cache, whether complete or not."""
        folder = self.folder() / f"datasets--{repo.replace('/', '--')}"
        commit = revision or "main"
        reference = folder / "refs" / commit
        if reference.is_file():
            commit = reference.read_text(encoding="utf-8").strip()
        snapshot = folder / "snapshots" / commit
        if not snapshot.is_dir():
            raise HubError(f"offline (HF_HUB_OFFLINE), and nothing of it is in the cache {self.folder()}")
        files = {p.relative_to(snapshot).as_posix(): p.stat().st_size for p in snapshot.rglob("*") if p.is_file()}
        return Listing(commit, files, offline=True)

    def cached(self, repo: str, path: str, revision: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(repo, path, revision=revision, repo_type="dataset")
        return Path(found) if isinstance(found, str) else None

    def download(self, repo: str, path: str, revision: str) -> Path:
        """Download into the hub's cache, or find it there.

        Raises:
            HubError: no such file, no rights, no connection.
        """
        from huggingface_hub import errors, hf_hub_download

        try:
            return Path(hf_hub_download(repo, path, revision=revision, repo_type="dataset"))
        except (errors.EntryNotFoundError, OSError, errors.HTTPError) as error:
            raise _explain(error, f"{repo}: {path}") from error

    def delete(self, path: Path) -> None:
        # In the cache a file is a link to a blob; without links (some Windows set-ups) it is the file itself.
        blob = path.resolve()
        path.unlink(missing_ok=True)
        if blob.parent.name == "blobs":
            blob.unlink(missing_ok=True)


def _explain(error: Exception, what: str) -> HubError:
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return HubError(f"{what!r} is not a data set id; owner/name expected")
    if isinstance(error, errors.GatedRepoError):  # a kind of RepositoryNotFoundError: asked first
        return HubError("gated: accept its terms on its hub page, then log in with `hf auth login`")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError("no such revision of it on the hub")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError("not on the hub (404), or private and you are not logged in")
    if isinstance(error, errors.LocalEntryNotFoundError):
        return HubError("no connection, and it is not in the cache", passing=True)
    if isinstance(error, errors.EntryNotFoundError):
        return HubError("no such file on the hub")
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return HubError("no space left on the disk")
    first = (str(error).splitlines() or [""])[0] or type(error).__name__
    return HubError(f"the hub cannot be reached ({first})", passing=True)
