"""Reward models of pictures on CLIP's towers, to be trained on preferences: any transformers CLIP, or an earlier reward.

Pictures are not encoded: what the cache keeps of them is the pixels at the tower's size, resized as CLIP's own processor
does (bicubic), and of a prompt its tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.config import ModelConfig, TrainingConfig
from diffalign.errors import ConfigError, did_you_mean
from diffalign.families import ENCODERS, NETWORK, Conditioning, EncodingFamily
from diffalign.families._loading import HUB_ID, quiet
from diffalign.judges import FOLDER, JUDGE_FILE, JudgeCLIP, JudgeSettings, load_judge
from diffalign.losses import Kind
from diffalign.world.names import TINY_CLIPS, base_folder

# CLIP's published sizes, for `random_weights`. H/14 is laion's, which PickScore and HPSv2 were tuned from.
ARCHITECTURES: Mapping[str, dict[str, Any]] = {
    "clip-h14": {
        "projection_dim": 1024,
        "vision_config": {
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
            "hidden_act": "gelu",
            "projection_dim": 1024,
        },
        "text_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "hidden_act": "gelu",
            "projection_dim": 1024,
        },
    },
    "clip-l14": {
        "projection_dim": 768,
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 224,
            "projection_dim": 768,
        },
        "text_config": {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "projection_dim": 768,
        },
    },
}
# What published weights are, where their config cannot be read without a download (for `plan`).
KNOWN = {
    "laion/CLIP-ViT-H-14-laion2B-s32B-b79K": "clip-h14",
    "yuvalkirstain/PickScore_v1": "clip-h14",
    "openai/clip-vit-large-patch14": "clip-l14",
}
_UNREAD = ("vae", "config", "prediction_type", "flow_shift", "variant", "max_sequence_length")


class ClipReward(EncodingFamily):
    """CLIP's towers with a head (`diffalign.judges`), trained to tell which of two pictures people prefer."""

    title = "reward models on CLIP (transformers)"
    modality = "reward"
    kind = Kind.JUDGE
    resolution_step = 1
    resampling = "bicubic"
    lora_targets = {  # noqa: RUF012 - a Mapping in the base class
        "attention": "attention of both towers",
        "attention+ff": "those and the feed-forward layers",
        "all": "the same; not the projections",
    }

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        vae_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(config, device=device, dtype=dtype, vae_dtype=vae_dtype)
        self._network: JudgeCLIP | None = None
        self._tokenizer: Any = None

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        for key in _UNREAD:
            if getattr(config, key) is not None:
                raise ConfigError(f"model.{key}: got {getattr(config, key)!r}; no reward model reads it. Remove it")
        locate(config)

    def earlier(self) -> JudgeSettings | None:
        """What an earlier reward was, where `pretrained` is one."""
        return None if self.config.random_weights else JudgeSettings.load(Path(where(self.config)))

    # ---------------------------------------------------------------- the network

    def load(self, *parts: str) -> None:
        if NETWORK in parts and self._network is None:
            raise RuntimeError("a reward model is loaded with its head; call load_network")

    def load_network(self, settings: JudgeSettings | None, seed: int = 0, *, whole: bool = False) -> JudgeCLIP:
        """Load the towers with a head.

        Args:
            settings: of the head; None keeps an earlier reward's.
            seed: of a new head, and of random weights.
            whole: all weights are trained, and so are float32 whatever the precision of the computation.

        Raises:
            ConfigError: the files cannot be read.
        """
        dtype = torch.float32 if whole else self.dtype
        if self.config.random_weights:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(seed)
                network = JudgeCLIP(clip_config(self.config), settings).to(dtype)  # type: ignore[arg-type]
            network.reset_head(seed)
        else:
            try:
                with quiet():
                    network = load_judge(
                        where(self.config), settings, revision=self.config.revision, dtype=dtype, seed=seed
                    )
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"model.pretrained {self.config.pretrained!r} could not be loaded: {str(error).splitlines()[0]} "
                    "Expected a transformers CLIP folder or hub id, or a trained reward's folder"
                ) from error
        network.requires_grad_(False)
        self._network = network.to(self.device)
        return self._network

    def unload(self, *parts: str) -> None:
        if NETWORK in parts:
            self._network = None

    @property
    def network(self) -> JudgeCLIP:
        if self._network is None:
            raise RuntimeError("the network is not loaded; call load_network")
        return self._network

    def configure(self, training: TrainingConfig) -> None:
        """Gradient checkpointing, through transformers."""
        if training.gradient_checkpointing:
            self.network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    # ---------------------------------------------------------------- pictures and prompts

    @property
    def tokenizer(self) -> Any:
        """CLIP's own.

        Raises:
            ConfigError: it cannot be read.
        """
        if self._tokenizer is None:
            from transformers import CLIPTokenizer

            if self.config.random_weights:
                self._tokenizer = CLIPTokenizer.from_pretrained(base_folder(TINY_CLIPS[0]))
                return self._tokenizer
            try:
                self._tokenizer = CLIPTokenizer.from_pretrained(
                    where(self.config), revision=self.config.revision or "main"
                )
            except (OSError, ValueError) as error:
                raise ConfigError(
                    f"model.pretrained {self.config.pretrained!r} comes without a tokenizer that can be read: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        return self._tokenizer

    @property
    def max_length(self) -> int:
        """Tokens of a prompt that the text tower takes."""
        return int(clip_config(self.config).text_config.max_position_embeddings)

    @property
    def image_size(self) -> int:
        """Side of the square that the vision tower looks at, in pixels."""
        return int(clip_config(self.config).vision_config.image_size)

    def fingerprint(self) -> dict[str, str]:
        tokens = [self.tokenizer(text).input_ids for text in ("a photo of a cat", "outlined, two red circles; 7")]
        digest = hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:16]
        return {"pixels": f"{self.image_size} bicubic", "tokenizer": digest}

    def encode_images(self, pixels: Tensor) -> Tensor:
        """The pictures themselves, RGB in [0, 1]."""
        return pixels.float() / 2 + 0.5

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        """Token ids as two numbers below 256, which half precision keeps, and the mask; (B, L) each, padded to the end."""
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        ids = tokens.input_ids
        return {"high": (ids // 256).float(), "low": (ids % 256).float(), "mask": tokens.attention_mask.float()}

    @staticmethod
    def tokens(text: Conditioning) -> tuple[Tensor, Tensor]:
        """(input_ids, attention_mask), int64, of what `encode_prompts` returned, whatever it was stored as."""
        high, low, mask = (text[name].round().long() for name in ("high", "low", "mask"))
        return high * 256 + low, mask

    def count_tokens(self, prompt: str) -> tuple[int, int]:
        return len(self.tokenizer(prompt).input_ids), self.max_length

    def park(self, *parts: str) -> None:
        """There is nothing but the network."""
        self.unload(*[part for part in parts if part != ENCODERS])


# ---------------------------------------------------------------- what `pretrained` names


def locate(config: ModelConfig) -> str:
    """The folder, hub id or architecture that a config names, without loading.

    Raises:
        ConfigError: none of these.
    """
    name = config.pretrained
    if config.random_weights:
        if name not in ARCHITECTURES and name not in TINY_CLIPS:
            known = [*ARCHITECTURES, *TINY_CLIPS]
            raise ConfigError(
                f"model.pretrained {name!r} is no published CLIP{did_you_mean(name, known)} With random_weights expected "
                f"one of: {', '.join(known)}"
            )
        return name
    if name in TINY_CLIPS:
        return str(base_folder(name))
    path = Path(name).expanduser()
    for folder in (path / FOLDER, path):
        if (folder / "config.json").is_file() and (folder == path or (folder / JUDGE_FILE).is_file()):
            found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if found.get("model_type") != "clip":
                raise ConfigError(
                    f"model.pretrained {name!r} is of model_type {found.get('model_type')!r}; expected 'clip' with both "
                    "towers"
                )
            return str(folder)
    if path.is_dir() or path.is_file():
        raise ConfigError(
            f"model.pretrained {name!r} is no folder with the config.json of a CLIP, or of a trained reward"
        )
    if HUB_ID.fullmatch(name):
        return name
    raise ConfigError(
        f"model.pretrained {name!r} is no folder, hub id (owner/name) or tiny CLIP{did_you_mean(name, TINY_CLIPS)} Tiny "
        f"ones: {', '.join(TINY_CLIPS)}"
    )


def where(config: ModelConfig) -> str:
    """`locate`, or the local copy of a hub id."""
    from diffalign.rewards import local_weights

    return local_weights(locate(config))


def clip_config(config: ModelConfig) -> Any:
    """The CLIPConfig of a model.

    Raises:
        ConfigError: it cannot be read.
    """
    from transformers import CLIPConfig

    name = locate(config)
    if config.random_weights and name in ARCHITECTURES:
        return CLIPConfig(**ARCHITECTURES[name])
    try:
        source = str(base_folder(name)) if name in TINY_CLIPS else where(config)
        return CLIPConfig.from_pretrained(source, revision=config.revision or "main")
    except (OSError, ValueError) as error:
        if name in KNOWN:
            return CLIPConfig(**ARCHITECTURES[KNOWN[name]])
        raise ConfigError(
            f"model.pretrained {config.pretrained!r}: its config cannot be read ({str(error).splitlines()[0]}); check the "
            "name, and that it is downloaded if you are offline"
        ) from error


def known_image_size(config: ModelConfig) -> int | None:
    """The vision tower's size as far as it is known without asking the hub."""
    name = locate(config)
    if config.random_weights or name in KNOWN or Path(where(config)).is_dir():
        return int(clip_config(config).vision_config.image_size)
    return None
