"""Who likes what: embeddings of people from a few of their pairs, and which of them are kept out of training (PPD).

A user is described by N pairs, each a prompt, an image that was preferred and one that was not. An encoder turns them into
one embedding; several draws of N pairs give several embeddings of the same user, and a training pair is never conditioned on
an embedding that has seen it, or a pair of the same prompt, which may hold the same image. Users with fewer than
`min_pairs` pairs are left out and counted.

Encoders: "world_clip", the tiny world's; "clip:WEIGHTS", any CLIP that transformers reads: mean and mean difference of the
images' embeddings, each of norm sqrt(D); "vlm:WEIGHTS", any vision-language model of transformers: hidden states of the last
token after the pairs have been shown, at `layers`. UNVERIFIED: the paper takes LLaVA-OneVision, and does not say (as far as
we could read) which layer, pooling and instruction; a later study of layers (PrefGen) names the last token, a middle and a
top layer.

Images are those of the latent cache, as the autoencoder shows them, so that nothing has to be read twice.
"""

from __future__ import annotations

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from diffalign.config import RunConfig, UsersConfig
from diffalign.data.encode import EncodedPair, Owner
from diffalign.data.loader import PairData, PairMicroBatches
from diffalign.errors import CheckpointError, ConfigError, DataError
from diffalign.evaluate import held_out_hits
from diffalign.families import DECODER, DenoisingFamily
from diffalign.files import atomic_write_bytes
from diffalign.policy import Policy
from diffalign.progress import Progress
from diffalign.schedules import generator_for
from diffalign.statistics import bootstrap_rate

log = logging.getLogger(__name__)
USERS_FILE = "users.safetensors"
MEASURED = 2000  # pairs of a group that are ranked at the end, at most


@dataclass(frozen=True)
class Shown:
    """A pair as an encoder sees it: RGB in [0, 1], (3, H, W), the preferred image first."""

    prompt: str
    liked: Tensor
    other: Tensor


class Encoder(ABC):
    """Pairs of a user to one embedding.

    Attributes:
        width: of the embedding.
    """

    width: int

    @abstractmethod
    def embed(self, shown: Sequence[Shown]) -> Tensor:
        """The embedding of a user, float32 (width,), not all zeros."""


class ClipEncoder(Encoder):
    """Mean of the liked images' embeddings, and their mean difference to the others.

    Args:
        weights: hub id or folder of a CLIP.
        device: where it computes.
    """

    def __init__(self, weights: str, device: torch.device | str = "cpu") -> None:
        from diffalign.rewards import ClipTowers

        self.towers = ClipTowers(weights, device=device)
        self.width = 2 * int(self.towers.model.config.projection_dim)

    @torch.no_grad()
    def embed(self, shown: Sequence[Shown]) -> Tensor:
        from diffalign.rewards import preprocess

        images = [image[None] for one in shown for image in (one.liked, one.other)]  # their sizes may differ
        pixels = torch.cat([preprocess(image, self.towers.image_size, eight_bit=True) for image in images])
        found = torch.nn.functional.normalize(self.towers.embed_images(pixels).float().cpu(), dim=-1)
        liked, other = found[0::2], found[1::2]
        parts = (liked.mean(0), (liked - other).mean(0))
        size = found.shape[1] ** 0.5
        return torch.cat([size * part / part.norm().clamp(min=1e-6) for part in parts])


class VlmEncoder(Encoder):
    """Hidden states of a vision-language model's last token after it was shown the pairs.

    Args:
        weights: hub id or folder of a model that transformers reads as image-text-to-text.
        layers: whose states are concatenated; negative ones count from the top.
        device: where it computes.
    """

    INSTRUCTION = (
        "One person chose between pictures of the same description, several times. Say what this person likes."
    )

    def __init__(self, weights: str, layers: Sequence[int], device: torch.device | str = "cpu") -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            self.model: Any = AutoModelForImageTextToText.from_pretrained(weights)  # type: ignore[no-untyped-call]
            self.processor: Any = AutoProcessor.from_pretrained(weights)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise ConfigError(f"users.encoder: {weights!r} cannot be loaded: {str(error).splitlines()[0]}") from error
        self.model.eval().to(device)
        text = self.model.config.get_text_config()
        self.layers, self.device = tuple(layers), torch.device(device)
        count = int(text.num_hidden_layers)
        if any(not -count <= layer < count for layer in self.layers):
            raise ConfigError(f"users.layers: got {list(layers)}; the model has layers 0 to {count - 1}")
        self.width = len(self.layers) * int(text.hidden_size)

    @torch.no_grad()
    def embed(self, shown: Sequence[Shown]) -> Tensor:
        content: list[dict[str, Any]] = [{"type": "text", "text": self.INSTRUCTION}]
        for number, one in enumerate(shown, 1):
            content += [{"type": "text", "text": f"{number}. {one.prompt} Preferred:"}, {"type": "image"}]
            content += [{"type": "text", "text": "over:"}, {"type": "image"}]
        text = self.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        images = [_to_pil(image) for one in shown for image in (one.liked, one.other)]
        inputs = self.processor(text=text, images=images, return_tensors="pt").to(self.device)
        states = self.model(**inputs, output_hidden_states=True).hidden_states[1:]  # the first is what goes in
        return torch.cat([states[layer][0, -1].float().cpu() for layer in self.layers])


def _to_pil(image: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image.clamp(0, 1) * 255).round().byte().movedim(0, -1).cpu().numpy())


def make_encoder(config: UsersConfig, device: torch.device | str = "cpu") -> Encoder:
    """The encoder of a config.

    Raises:
        ConfigError: an unknown one.
    """
    name = config.encoder or ""
    kind, _, weights = name.partition(":")
    if name == "world_clip":
        from diffalign.world.names import base_folder

        return ClipEncoder(str(base_folder("tiny-clip")), device)
    if kind == "clip" and weights:
        return ClipEncoder(weights, device)
    if kind == "vlm" and weights:
        return VlmEncoder(weights, config.layers, device)
    raise ConfigError(f"users.encoder: got {name!r}; expected 'world_clip', 'clip:WEIGHTS' or 'vlm:WEIGHTS'")


def check_encoder(config: UsersConfig) -> None:
    """Refuse weights whose configuration cannot be read; no weights load.

    Raises:
        ConfigError: naming them.
    """
    kind, _, weights = (config.encoder or "").partition(":")
    if kind not in ("clip", "vlm"):
        return
    from transformers import AutoConfig

    from diffalign.rewards import local_weights

    try:
        AutoConfig.from_pretrained(local_weights(weights))
    except (OSError, ValueError) as error:
        raise ConfigError(f"users.encoder: {weights!r} cannot be loaded: {str(error).splitlines()[0]}") from error


def held_out(user: str, share: float) -> bool:
    """Whether a user is kept out of training: a function of the id alone."""
    digest = hashlib.sha256(f"held out user/{user}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64 < share


def kept_out(user: str | None, config: UsersConfig) -> bool:
    """Whether a user is kept out of training, by name or by share."""
    return user is not None and (user in config.held_out or held_out(user, config.held_out_fraction))


def hashed(user: str) -> str:
    """What files call a user: ids are personal data."""
    return hashlib.sha256(f"user/{user}".encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Described:
    """A user.

    Attributes:
        embeddings: one for every draw of examples, (K, d).
        examples: `Owner.keys` of the pairs of each draw.
        unseen: kept out of training.
    """

    embeddings: Tensor
    examples: tuple[frozenset[str], ...]
    unseen: bool


class Users:
    """The users of a data set.

    Args:
        found: by user id.
        width: d.
        seed: of which embedding goes with which pair.
        dropout: share of the rows that are nobody's.
    """

    def __init__(self, found: dict[str, Described], width: int, seed: int, dropout: float) -> None:
        self.found, self.width, self.seed, self.dropout = found, width, seed, dropout

    def row(self, pair: EncodedPair, visit: int) -> Tensor:
        """The embedding that a pair is trained with, (d,): of its user, without having seen it; zeros: nobody."""
        generator = generator_for(self.seed, f"{pair.id} user", visit)
        nobody = torch.zeros(self.width)
        if float(torch.rand((), generator=generator)) < self.dropout:
            return nobody
        return self.of(pair, generator)

    def free(self, owner: Owner) -> list[int]:
        """Numbers of the embeddings of a pair's user that were made without it and its prompt."""
        user = self.found.get(owner.user or "")
        return [] if user is None else [k for k, shown in enumerate(user.examples) if not owner.keys() & shown]

    def of(self, pair: EncodedPair, generator: torch.Generator | None = None) -> Tensor:
        """One of the user's embeddings that has not seen a pair: drawn, or the first; zeros where there is none."""
        free = self.free(Owner(pair.id, pair.user, pair.p, pair.prompt))
        if not free:
            return torch.zeros(self.width)
        pick = 0 if generator is None else int(torch.randint(len(free), (), generator=generator))
        return self.found[pair.user or ""].embeddings[free[pick]]

    def write(self, path: Path, digest: str = "") -> None:
        """Write the embeddings by hashed id, as a safetensors file (`read_users`).

        Args:
            path: file.
            digest: of what they were made from, for whoever wants to read them again.
        """
        examples = {hashed(user): [sorted(ids) for ids in one.examples] for user, one in self.found.items()}
        unseen = [hashed(user) for user, one in self.found.items() if one.unseen]
        tensors = {hashed(user): one.embeddings.contiguous() for user, one in self.found.items()}
        facts = {"examples": json.dumps(examples), "unseen": json.dumps(unseen), "digest": digest}
        atomic_write_bytes(path, save(tensors, facts))

    def trained(self, owners: Sequence[Owner]) -> list[bool]:
        """Whether pairs are trained on: their user is described and seen, and some draw has not shown them."""
        return [bool(self.free(owner)) and not self.found[owner.user or ""].unseen for owner in owners]


def read_users(path: Path) -> dict[str, Tensor]:
    """Embeddings (K, d) by hashed id (`hashed`), of a file or a run folder.

    Raises:
        CheckpointError: no such file.
    """
    file = path / USERS_FILE if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; expected the {USERS_FILE} of a run on users")
    return load_file(file)


def described(data: PairData, indices: Sequence[int], config: RunConfig, family: DenoisingFamily, path: Path) -> Users:
    """The users of a run: those that its folder has, if they were made from the same pairs, or new ones, which are written.

    Args:
        data, indices: as of `describe`.
        config: of the run.
        family: decodes.
        path: of the file.
    """
    owners, own = data.owners, config.users
    images = [config.model.pretrained, config.model.vae, config.data.resolution, config.data.crop, config.data.flip]
    what = [asdict(own), config.seed, images, [owners[i] for i in indices]]
    digest = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        if facts.get("digest") == digest:
            tensors, names = load_file(path), {hashed(o.user): o.user for o in owners if o.user is not None}
            examples, unseen = json.loads(facts["examples"]), set(json.loads(facts["unseen"]))
            found = {
                names[key]: Described(tensors[key], tuple(map(frozenset, shown)), key in unseen)
                for key, shown in examples.items()
            }
            return Users(found, next(iter(tensors.values())).shape[1], config.seed, own.dropout)
    family.load(DECODER)
    users = describe(data, indices, own, config.seed, make_encoder(own, family.device), family.decode_latents)
    if family.device.type != "cpu":
        family.park(DECODER)  # the device's memory belongs to training
    users.write(path, digest)
    return users


def describe(
    data: PairData,
    indices: Sequence[int],
    config: UsersConfig,
    seed: int,
    encoder: Encoder,
    decode: Callable[[Tensor], Tensor],
) -> Users:
    """Embed the users of pairs.

    Args:
        data: encoded pairs.
        indices: which of them may be shown to the encoder.
        config: how many examples and draws, and who is kept out.
        seed: of the draws.
        encoder: makes embeddings.
        decode: latents (B, ...) to RGB in [0, 1], (B, 3, H, W).

    Raises:
        DataError: no user has enough pairs, or `held_out` names somebody who is not there.
    """
    by_user: dict[str, list[int]] = defaultdict(list)
    unknown, owners = 0, data.owners
    for index in indices:
        owner = owners[index]
        if owner.user is None:
            unknown += 1
        elif owner.p != 0.5:
            by_user[owner.user].append(index)
    if strangers := sorted(set(config.held_out) - by_user.keys()):
        raise DataError(
            f"users.held_out: {', '.join(strangers)} named, and the data have no pair of them; ids here are such as "
            f"{', '.join(sorted(by_user)[:5]) or 'none'}"
        )
    enough = {user: rows for user, rows in sorted(by_user.items()) if len(rows) >= config.min_pairs}
    few = len(by_user) - len(enough)
    if not enough:
        raise DataError(
            f"users: none of {len(by_user):,} users has {config.min_pairs} pairs ({unknown:,} pairs name no user); the data "
            "need user ids (docs/how-to/personal.md), or set users.min_pairs lower"
        )
    found = {}
    with Progress("describing users", len(enough), "user") as progress:
        for user, rows in enough.items():
            found[user] = _describe(user, rows, data, config, seed, encoder, decode)
            progress.advance()
    log.info(
        "users: %d described by %d pairs each, %d of them kept out; %d users with fewer than %d pairs, and %d pairs without "
        "a user, are left out",
        len(found),
        config.examples,
        sum(one.unseen for one in found.values()),
        few,
        config.min_pairs,
        unknown,
    )
    return Users(found, encoder.width, seed, config.dropout)


def _describe(
    user: str,
    rows: Sequence[int],
    data: PairData,
    config: UsersConfig,
    seed: int,
    encoder: Encoder,
    decode: Callable[[Tensor], Tensor],
) -> Described:
    """One user, by several draws of examples from pairs."""
    generator, owners = generator_for(seed, f"examples of {user}", 0), data.owners
    embeddings: list[Tensor] = []
    examples: list[frozenset[str]] = []
    for _ in range(config.draws):
        order = torch.randperm(len(rows), generator=generator)[: config.examples].tolist()
        pairs = [data.pair(rows[i]) for i in order]
        embeddings.append(encoder.embed([_shown(pair, decode) for pair in pairs]))
        examples.append(frozenset().union(*(owners[rows[i]].keys() for i in order)))
    return Described(torch.stack(embeddings), tuple(examples), kept_out(user, config))


def _shown(pair: EncodedPair, decode: Callable[[Tensor], Tensor]) -> Shown:
    images = decode(torch.stack([latent.float() for latent in pair.latents])).cpu()
    liked = 0 if pair.p > 0.5 else 1
    return Shown(pair.prompt, images[liked], images[1 - liked])


def by_user(
    policy: Policy, dataset: PairMicroBatches, users: Users, held_out: Sequence[int], unseen: Sequence[int]
) -> dict[str, Any]:
    """How well pairs of users that were not trained on are ranked: as their user's, and as somebody else's.

    Args:
        policy: with the trained branch.
        dataset: of the run.
        users: everybody.
        held_out: pairs of seen users, with prompts that were kept out.
        unseen: pairs of users who were kept out, but for those that describe them.

    Returns:
        By "seen" and "unseen": accuracy with 95 % interval over pairs, "own" and "other" (the next user's embedding in
        its place), and "users", the own accuracy of each by hashed id with its number of pairs.
    """
    names = sorted(users.found)
    following = dict(zip(names, [*names[1:], *names[:1]], strict=True))
    owners = dataset.data.owners
    found: dict[str, Any] = {}
    for group, indices in (("seen", held_out), ("unseen", unseen)):
        if len(indices) > MEASURED:
            order = torch.randperm(len(indices), generator=generator_for(users.seed, f"measured {group}", 0))
            indices = [indices[i] for i in sorted(order[:MEASURED].tolist())]
        if not indices:
            continue
        with Progress(f"ranking pairs of {group} users", 2 * len(indices), "pair") as progress:
            own = held_out_hits(policy, dataset, indices, progress=progress.advance)
            dataset.users = Swapped(users, following)
            try:
                other = held_out_hits(policy, dataset, indices, progress=progress.advance)
            finally:
                dataset.users = users
        by: dict[str, list[float]] = defaultdict(list)
        for index, hit in own.items():
            by[hashed(owners[index].user or "")].append(hit)
        found[group] = {
            "own": _numbers(list(own.values())),
            "other": _numbers(list(other.values())),
            "users": {name: _numbers(hits) for name, hits in sorted(by.items())},
        }
    return found


def _numbers(hits: list[float]) -> dict[str, float] | None:
    if not hits:
        return None
    one = bootstrap_rate(hits)
    return {"accuracy": one.mean, "ci_low": one.ci_low, "ci_high": one.ci_high, "pairs": one.count}


@dataclass(frozen=True)
class Swapped:
    """Users under other names: what a pair looks like to somebody else."""

    users: Users
    following: dict[str, str]

    def row(self, pair: EncodedPair, visit: int) -> Tensor:
        return self.of(pair)

    def of(self, pair: EncodedPair) -> Tensor:
        other = self.following.get(pair.user or "")
        return torch.zeros(self.users.width) if other is None else self.users.found[other].embeddings[0]


def between(embeddings: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """A user between users: the weighted sum of their embeddings, (d,)."""
    if len(embeddings) != len(weights):
        raise ConfigError(f"got {len(embeddings)} embeddings and {len(weights)} weights; expected as many")
    return torch.stack([w * e for w, e in zip(weights, embeddings, strict=True)]).sum(0)
