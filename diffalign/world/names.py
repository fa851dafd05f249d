"""Names and places of the tiny bases, without importing any model code."""

from __future__ import annotations

from pathlib import Path

from diffalign.errors import ConfigError

FOLDER = Path(__file__).parent / "models"
TINY_BASES = ("tiny-sdxl",)


def base_folder(name: str) -> Path:
    """The shipped diffusers folder of a tiny base.

    Raises:
        ConfigError: the base is not part of this installation.
    """
    folder = FOLDER / name
    if not (folder / "model_index.json").is_file():
        raise ConfigError(
            f"tiny base {name!r} is not installed at {folder}; shipped: {', '.join(TINY_BASES)}; "
            "rebuild it with scripts/build_tiny_sdxl.py"
        )
    return folder
