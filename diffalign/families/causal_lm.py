"""Causal language models: any transformers `AutoModelForCausalLM`, frozen, in one part ("network") and a tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from diffalign.config import ModelConfig, TrainingConfig
from diffalign.errors import ConfigError, MissingExtraError, did_you_mean
from diffalign.families import NETWORK, Family
from diffalign.families._language_models import CONFIGS, NAMES
from diffalign.families._loading import HUB_ID, Location, file_hash, quiet
from diffalign.losses import Kind
from diffalign.world.names import TINY_LMS, base_folder

log = logging.getLogger(__name__)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.jinja",
)
_IMAGE_KEYS = ("vae", "config", "prediction_type")
_BACKENDS = {"default": "sdpa", "eager": "eager", "flash_attention_2": "flash_attention_2"}


class CausalLM(Family):
    """A language model that reads from left to right.

    Dropout of the base is turned off wherever its config names it: policy and reference must be the same function where
    the adapter is zero. Models whose code comes with their weights are not run.
    """

    title = "causal language models (transformers)"
    modality = "text"
    kind = Kind.TOKEN
    attention_backends = tuple(_BACKENDS)
    lora_targets = {  # noqa: RUF012 - a Mapping in the base class
        "attention": "linear layers of the attention blocks",
        "attention+ff": "those and the feed-forward layers; not routers and state-space layers",
        "all": "every linear layer of the blocks; not the output projection",
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
        self.location = locate(config)
        self._network: Any = None
        self._tokenizer: Any = None
        self._template = ""  # hash of the one that replaces the tokenizer's own

    @classmethod
    def preflight(cls, config: ModelConfig) -> None:
        for key in _IMAGE_KEYS:
            if getattr(config, key) is not None:
                raise ConfigError(f"model.{key}: got {getattr(config, key)!r}; it is for image models. Remove it")
        location = locate(config)
        if location.kind == "random":
            for key in ("variant", "revision"):
                if getattr(config, key) is not None:
                    raise ConfigError(f"model.{key} names files of trained weights; random_weights has none. Remove it")
        if config.load_in_4bit:
            if location.kind == "random":
                raise ConfigError(
                    "model.load_in_4bit quantises trained weights; random_weights has none. Set one of them"
                )
            if importlib.util.find_spec("bitsandbytes") is None:
                raise MissingExtraError("bitsandbytes", "bitsandbytes", "model.load_in_4bit")
        known = _known_config(config, location)
        if known is not None:
            check_config(known, config.pretrained)

    # ---------------------------------------------------------------- the network

    def load(self, *parts: str) -> None:
        for part in parts:
            if part != NETWORK:
                raise ValueError(f"a language model has no part {part!r}; expected {NETWORK!r}")
        if self._network is not None or not parts:
            return
        if self.config.load_in_4bit and self.device.type == "cpu":
            raise ConfigError(
                "model.load_in_4bit needs a GPU, and this run is on the CPU; set model.load_in_4bit: false"
            )
        with quiet(), _loading(self.config.pretrained):
            settings = self.network_config()
            if self.location.kind == "random" or self.device.type == "meta":
                network = self._random(settings)
            else:
                network = self._trained(settings)
        network.requires_grad_(False)
        network.eval()
        self._network = network

    def unload(self, *parts: str) -> None:
        if NETWORK in parts:
            self._network = None

    @property
    def network(self) -> Any:
        self.load(NETWORK)
        return self._network

    def network_config(self) -> Any:
        """The transformers config, dropout off.

        Raises:
            ConfigError: not a causal language model.
        """
        from transformers import AutoConfig

        if self.location.where in CONFIGS and self.location.kind == "random":
            known = dict(CONFIGS[self.location.where])
            settings = AutoConfig.for_model(known.pop("model_type"), **known)
        else:
            settings = AutoConfig.from_pretrained(self.location.where, revision=self.config.revision)
            check_config(settings.to_dict(), self.config.pretrained)
        for key, value in settings.to_dict().items():
            if "drop" in key and isinstance(value, float):
                setattr(settings, key, 0.0)
        return settings

    def _random(self, settings: Any) -> Any:
        from transformers import AutoModelForCausalLM

        with torch.random.fork_rng(devices=[]), torch.device("meta" if self.device.type == "meta" else "cpu"):
            torch.default_generator.manual_seed(0)
            network = AutoModelForCausalLM.from_config(settings, dtype=self.dtype)
        return network.to(self.device)

    def _trained(self, settings: Any) -> Any:
        from transformers import AutoModelForCausalLM

        options: dict[str, Any] = {}
        if self.config.load_in_4bit:
            from transformers import BitsAndBytesConfig

            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=self.dtype,
            )
            options["device_map"] = {"": self.device}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            self.location.where,
            config=settings,
            revision=self.config.revision,
            variant=self.config.variant,
            dtype=self.dtype,
            output_loading_info=True,
            **options,
        )
        network, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ConfigError(
                f"model.pretrained {self.config.pretrained!r} has no weights for {missing[0]!r} ({len(missing)} missing in "
                "all), which would be random; expected a complete causal language model"
            )
        return network if options else network.to(self.device)

    def configure(self, training: TrainingConfig) -> None:
        """Attention backend, gradient checkpointing and compilation, all through transformers and torch.

        Raises:
            ConfigError: something that this model or machine does not have, or a setting for image networks.
        """
        network: Any = self.network
        if training.channels_last:
            raise ConfigError(
                "training.channels_last is a memory format of images; set it to false for a language model"
            )
        if training.attention != "default":
            self._set_attention(training.attention)
        if training.gradient_checkpointing:
            try:
                enable_checkpointing(network)
            except ValueError as error:
                raise ConfigError(f"training.gradient_checkpointing: {_first_line(error)} Set it to false") from error
        if training.compile:  # the base, because it is what a policy calls
            network.base_model.compile()

    def _set_attention(self, name: str) -> None:
        network: Any = self.network
        if name == "flash_attention_2" and (self.device.type == "cpu" or self.dtype == torch.float32):
            raise ConfigError(
                f"training.attention 'flash_attention_2' needs a GPU and half precision; this run is on {self.device.type} "
                f"in {str(self.dtype).removeprefix('torch.')}. Use 'default', or training.mixed_precision: bf16"
            )
        try:
            network.set_attn_implementation(_BACKENDS[name])
        except (ImportError, ValueError) as error:
            raise ConfigError(f"training.attention {name!r}: {_first_line(error)} Use 'default'") from error

    # ---------------------------------------------------------------- the tokenizer

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded without the network."""
        return self.load_tokenizer() if self._tokenizer is None else self._tokenizer

    def load_tokenizer(self, chat_template: str | None = None) -> Any:
        """Load the tokenizer, once.

        A tokenizer without a padding token pads with its end-of-sequence token. That token occurs in responses too: what
        is padding is said by attention and response masks, never by the id.

        Args:
            chat_template: Jinja file to use instead of the model's own template (`text.chat_template`).

        Raises:
            ConfigError: there is none, it cannot be read, or it has no end-of-sequence token.
        """
        from transformers import AutoTokenizer

        if self._tokenizer is None:
            if self.location.kind == "random" and self.location.where in CONFIGS:
                raise ConfigError(
                    f"model.pretrained {self.config.pretrained!r} with random_weights has no tokenizer; name a folder that "
                    "has config.json and a tokenizer, or the published repository"
                )
            with quiet(), _loading(self.config.pretrained):
                tokenizer = AutoTokenizer.from_pretrained(self.location.where, revision=self.config.revision)
            if tokenizer.eos_token_id is None:
                raise ConfigError(
                    f"the tokenizer of {self.config.pretrained!r} has no end-of-sequence token, so responses could not end; "
                    "set eos_token in its tokenizer_config.json"
                )
            if tokenizer.pad_token_id is None:
                tokenizer.pad_token = tokenizer.eos_token
                log.info("the tokenizer has no padding token; %r pads, masked", tokenizer.eos_token)
            self._tokenizer = tokenizer
        if chat_template is not None:
            text = _read_template(chat_template)
            self._tokenizer.chat_template = text
            self._template = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._tokenizer

    @property
    def pad_id(self) -> int:
        """The id that fills short rows; always masked."""
        return int(self.tokenizer.pad_token_id)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Every token that ends a response: the tokenizer's, and those of the model's generation config."""
        from transformers import GenerationConfig

        ends = [self.tokenizer.eos_token_id]
        if self._network is not None:
            more = self._network.generation_config.eos_token_id
        else:
            try:
                with quiet():
                    more = GenerationConfig.from_pretrained(
                        self.location.where, revision=self.config.revision or "main"
                    ).eos_token_id
            except OSError:  # the file is optional
                more = None
        ends += more if isinstance(more, list) else [] if more is None else [more]
        return tuple(dict.fromkeys(ends))

    def fingerprint(self) -> dict[str, str]:
        """What determines token ids: hashes of a local tokenizer's files, or repository and revision; and of a template
        that replaces the tokenizer's own."""
        found = {"chat_template": self._template} if self._template else {}
        if self.location.kind == "hub":
            return found | {"tokenizer": f"{self.location.where}@{self.config.revision or 'default'}"}
        folder = Path(self.location.where)
        files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
        return found | {f"tokenizer/{file.name}": file_hash(file) for file in files}


def enable_checkpointing(network: Any) -> None:
    """Recompute each block in backward; acts in training mode only."""
    with warnings.catch_warnings():
        # Renamed in transformers 5; the old name serves every version before 6.
        warnings.filterwarnings("ignore", "`gradient_checkpointing_enable` is deprecated", FutureWarning)
        network.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _read_template(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"text.chat_template {name!r} is not readable ({type(error).__name__}); expected a Jinja file"
        ) from error


def locate(config: ModelConfig) -> Location:
    """Decide what `pretrained` names, without loading.

    Raises:
        ConfigError: none of the possible kinds.
    """
    name = config.pretrained
    if config.random_weights and name in NAMES:
        return Location("random", name)
    kind: Any = "random" if config.random_weights else "folder"
    if name in TINY_LMS:
        return Location(kind, str(base_folder(name)))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(
                f"model.pretrained {name!r} is a folder without config.json; expected a transformers folder"
            )
        return Location(kind, str(path))
    if config.random_weights:
        raise ConfigError(
            f"model.pretrained {name!r} is no published architecture{did_you_mean(name, NAMES)} With random_weights "
            f"expected a folder with config.json, or one of: {', '.join(NAMES)}"
        )
    if path.is_file():
        raise ConfigError(
            f"model.pretrained {name!r} is a file; expected a transformers folder or a hub id (owner/name)"
        )
    if HUB_ID.fullmatch(name):
        return Location("hub", name)
    raise ConfigError(
        f"model.pretrained {name!r} is no folder, hub id (owner/name) or tiny model{did_you_mean(name, TINY_LMS)} "
        f"Tiny models: {', '.join(TINY_LMS)}"
    )


def _known_config(config: ModelConfig, location: Location) -> Mapping[str, Any] | None:
    """config.json as far as it is known without asking the hub; None if it is not."""
    if location.where in CONFIGS and location.kind == "random":
        return None
    if location.kind == "hub":
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(location.where, "config.json", revision=config.revision)
        if not isinstance(cached, str):
            return None
        file = Path(cached)
    else:
        file = Path(location.where) / "config.json"
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file} is not readable ({type(error).__name__}); expected the config of a transformers model"
        ) from error


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Refuse what is no text-only causal language model of transformers.

    Args:
        config: the content of config.json.
        name: for the message.

    Raises:
        ConfigError: with what it is instead.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    model_type, what = config.get("model_type"), f"model.pretrained {name!r}"
    expected = "expected a causal language model"
    if "auto_map" in config and model_type not in KNOWN:
        raise ConfigError(f"{what} brings its own code, which is not run; {expected} that transformers has")
    if not model_type or model_type not in KNOWN:
        raise ConfigError(f"{what} is of model_type {model_type!r}; {expected}, such as Llama, Qwen or Gemma")
    if config.get("is_encoder_decoder"):
        raise ConfigError(f"{what} is an encoder-decoder model ({model_type}); {expected}")
    if isinstance(config.get("vision_config"), Mapping):
        raise ConfigError(f"{what} also takes images ({model_type}); {expected} for text alone")
    architectures = config.get("architectures") or []
    wanted = KNOWN[model_type]
    classes = (wanted,) if isinstance(wanted, str) else tuple(wanted)
    if architectures and not set(architectures) & set(classes):
        raise ConfigError(f"{what} holds a {architectures[0]}; {expected} ({' or '.join(classes)})")


@contextmanager
def _loading(name: str) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise ConfigError(
            f"model.pretrained {name!r} could not be loaded: {_first_line(error)} Check the name, that it is downloaded if "
            "you are offline, and your hub login if it is gated"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
