"""What travels between a reward server and its clients: safetensors bytes for pictures, JSON for everything else.

Nothing is pickled, so neither side can make the other run code. A request for pictures is one safetensors file whose
tensor `images` is uint8 (levels of 1/255) or float32 in [0, 1], and whose header's `__metadata__` holds the strings
`protocol`, `prompts` (a JSON list) and perhaps `metadata` (a JSON list of dictionaries). A request for texts is JSON with
`protocol`, `prompts`, `completions` and perhaps `metadata`. The answer is JSON with `protocol` and `scores`, a list in
which null stands for NaN; errors are `{"error": "..."}`.

Shapes: B pictures or texts.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards import RewardError

PROTOCOL = 1
PICTURES = "application/x-safetensors"
JSON = "application/json"
TOKEN_VARIABLE = "DIFFALIGN_REWARD_TOKEN"
ADDRESS = "http://127.0.0.1:8021"  # where `diffalign serve-reward` listens by default
MAX_BYTES = 256 << 20  # of a request


class WireError(UserError):
    """A request or an answer that cannot be read."""


@dataclass(frozen=True)
class Health:
    """What a reward server says about itself.

    Attributes:
        protocol: version of what travels.
        reward: the name it was started with.
        kind: "images" or "texts".
        range: lowest and highest possible score, infinite where there is no bound.
        unit, licence, gap, weights: what the reward states.
        identity: changes with everything known to change a score.
        max_batch: pictures or texts in a request, at most.
        max_bytes: of a request, at most.
        clips: the reward judges clips.
        grouped: it compares the pictures of a prompt, which therefore come in one request.
    """

    protocol: int
    reward: str
    kind: str
    range: tuple[float, float]
    unit: str
    licence: str
    gap: str
    weights: str | None
    identity: str
    max_batch: int
    max_bytes: int
    clips: bool = False
    grouped: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON knows it: no infinities."""
        bounds = [None if math.isinf(bound) else bound for bound in self.range]
        return asdict(self) | {"service": "diffalign-reward", "range": bounds}

    @staticmethod
    def from_json(found: Any, url: str) -> Health:
        """Read what a server sent.

        Raises:
            WireError: it is no reward server, or one of another protocol.
        """
        if not isinstance(found, dict) or found.get("service") != "diffalign-reward":
            raise WireError(f"{url} is no reward server; start one with: diffalign serve-reward NAME")
        if found.get("protocol") != PROTOCOL:
            raise WireError(
                f"reward server {url} speaks protocol {found.get('protocol')}, this is {PROTOCOL}; install the same "
                "version of diffalign on both sides"
            )
        try:
            values = {f.name: found[f.name] for f in fields(Health) if f.default is MISSING or f.name in found}
            low, high = values["range"]
            values["range"] = (-math.inf if low is None else float(low), math.inf if high is None else float(high))
            health = Health(**values)
            fine = int(health.max_batch) > 0 and int(health.max_bytes) > 0 and health.kind in ("images", "texts")
        except (KeyError, TypeError, ValueError) as error:
            raise WireError(f"reward server {url}: its facts cannot be read ({error!r})") from error
        if not fine:
            raise WireError(f"reward server {url}: its facts make no sense: {found}")
        return health


# ---------------------------------------------------------------- pictures


def encode_pictures(images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] | None) -> bytes:
    """A request. Pictures whose values all are multiples of 1/255 travel as uint8, others as float32: no bit is lost.

    Args:
        images: floats in [0, 1], shape (B, 3, H, W) or (B, 3, F, H, W).
        prompts: B texts.
        metadata: B dictionaries of what JSON knows, or None.

    Raises:
        RewardError: metadata that JSON cannot hold.
    """
    from safetensors.torch import save

    images = images.detach().float().cpu()
    levels = (images * 255).round().clamp(0, 255).byte()
    pixels = levels if torch.equal(levels.float() / 255, images) else images
    header = {"protocol": str(PROTOCOL), "prompts": json.dumps(list(prompts))}
    if metadata is not None:
        header["metadata"] = _dump_metadata(metadata)
    return save({"images": pixels.contiguous()}, header)


def decode_pictures(body: bytes) -> tuple[Tensor, list[str], list[dict[str, Any]] | None]:
    """Float32 pictures in [0, 1], prompts and metadata of a request.

    Raises:
        WireError: anything else than such a request.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        (length,) = struct.unpack_from("<Q", body)
        header = json.loads(body[8 : 8 + length])["__metadata__"]
        tensors = load(body)
        if header["protocol"] != str(PROTOCOL):
            raise WireError(f"protocol {header['protocol']}; this server speaks {PROTOCOL}")
        prompts = _texts(json.loads(header["prompts"]), "prompts")
        metadata = _metadata(json.loads(header["metadata"])) if "metadata" in header else None
        images = tensors["images"]
    except (SafetensorError, struct.error, ValueError, KeyError, TypeError, RecursionError) as error:
        raise WireError(f"not a request for pictures: {type(error).__name__}: {str(error)[:200]}") from error
    if images.dtype == torch.uint8:
        images = images.float() / 255
    if images.dtype != torch.float32:
        raise WireError(f"images are {images.dtype}; uint8 or float32 expected")
    return images, prompts, metadata


# ---------------------------------------------------------------- texts


def encode_texts(
    prompts: Sequence[str], completions: Sequence[str], metadata: Sequence[dict[str, Any]] | None
) -> bytes:
    """A request for texts.

    Raises:
        RewardError: metadata that JSON cannot hold.
    """
    request = {"protocol": PROTOCOL, "prompts": list(prompts), "completions": list(completions)}
    text = json.dumps(request)
    if metadata is not None:
        text = f'{text[:-1]}, "metadata": {_dump_metadata(metadata)}}}'
    return text.encode()


def decode_texts(body: bytes) -> tuple[list[str], list[str], list[dict[str, Any]] | None]:
    """Prompts, completions and metadata of a request.

    Raises:
        WireError: anything else than such a request.
    """
    try:
        request = json.loads(body)
        if request["protocol"] != PROTOCOL:
            raise WireError(f"protocol {request['protocol']}; this server speaks {PROTOCOL}")
        metadata = request.get("metadata")
        return (
            _texts(request["prompts"], "prompts"),
            _texts(request["completions"], "completions"),
            None if metadata is None else _metadata(metadata),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise WireError(f"not a request for texts: {type(error).__name__}: {str(error)[:200]}") from error


# ---------------------------------------------------------------- scores


def encode_scores(scores: Tensor) -> dict[str, Any]:
    """The answer; float32 survives the way through JSON to the bit."""
    return {"protocol": PROTOCOL, "scores": [None if math.isnan(v) else v for v in scores.tolist()]}


def decode_scores(answer: Any, count: int, url: str) -> Tensor:
    """Scores, float32 (B,), NaN where the server has null.

    Raises:
        WireError: not `count` numbers.
    """
    scores = answer.get("scores") if isinstance(answer, dict) else None
    if not isinstance(scores, list) or len(scores) != count:
        got = f"{len(scores)} scores" if isinstance(scores, list) else "no scores"
        raise WireError(f"reward server {url} returned {got} for {count} items")
    if not all(value is None or type(value) in (int, float) for value in scores):
        raise WireError(f"reward server {url} returned scores that are no numbers: {str(scores)[:80]}")
    return torch.tensor([math.nan if value is None else value for value in scores], dtype=torch.float32)


def _dump_metadata(metadata: Sequence[dict[str, Any]]) -> str:
    try:
        return json.dumps(list(metadata))
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"metadata cannot travel to a reward server ({error}); only texts, numbers, lists and dictionaries can"
        ) from error


def _texts(values: Any, what: str) -> list[str]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise WireError(f"{what}: a list of texts expected")
    return values


def _metadata(values: Any) -> list[dict[str, Any]]:
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise WireError("metadata: a list of dictionaries expected")
    return values
