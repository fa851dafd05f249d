"""Names and places of the tiny bases, without importing any model code."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import ConfigError

FOLDER = Path(__file__).parent / "models"
TINY_BASES = ("tiny-sdxl", "tiny-sd3")
BASE_FAMILIES = {"tiny-sdxl": "sdxl", "tiny-sd3": "sd3"}
TINY_LMS = ("tiny-lm",)
TINY_CLIPS = ("tiny-clip",)
TEXT_LENGTHS = {"tiny-sd3": 0}  # tokens of the T5 encoder that a tiny base does not have
_SCRIPTS = {
    "tiny-sdxl": "scripts/build_tiny_sdxl.py",
    "tiny-sd3": "scripts/build_tiny_sd3.py",
    "tiny-lm": "scripts/build_tiny_lm.py",
    "tiny-clip": "scripts/build_tiny_clip.py",
}


def base_folder(name: str) -> Path:
    """The shipped folder of a tiny base: a diffusers pipeline (`TINY_BASES`), or a transformers model (the others).

    Raises:
        ConfigError: the base is not part of this installation.
    """
    folder = FOLDER / name
    head = "model_index.json" if name in TINY_BASES else "config.json"
    if not (folder / head).is_file():
        raise ConfigError(
            f"tiny base {name!r} is not installed at {folder}; shipped: {', '.join(TINY_BASES + TINY_LMS + TINY_CLIPS)}"
            + (f"; rebuild it with {_SCRIPTS[name]}" if name in _SCRIPTS else "")
        )
    return folder
