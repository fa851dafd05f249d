"""Components are found by the name of their file, and by nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffalign import plugins
from diffalign.data.readers import Reader
from diffalign.errors import ConfigError
from diffalign.families import Family
from diffalign.losses import Objective

READER = """
from __future__ import annotations

import dataclasses
from diffalign.data.readers import Reader


@dataclasses.dataclass
class Settings:
    size: int = 3


class {name}(Reader):
    layout = "{name}"
    def shards(self, files, split): return []
    def check(self, path): pass
    def read(self, path, place): return iter(())
"""


@pytest.mark.parametrize(("kind", "base"), [("objectives", Objective), ("families", Family), ("readers", Reader)])
def test_every_file_is_a_plugin_that_knows_its_name(kind: str, base: type) -> None:
    assert plugins.names(kind)
    for name in plugins.names(kind):
        cls = plugins.find(kind, name)
        assert issubclass(cls, base)
        assert plugins.name_of(cls) == name


def test_names_are_listed_without_importing_them() -> None:
    code = (
        "import sys; from diffalign import plugins; print([plugins.names(k) for k in plugins.KINDS if k != 'objectives']);"
        "print([m for m in ('torch', 'diffusers', 'pyarrow', 'diffalign.losses') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout
    names, imported = out.splitlines()
    assert "'pickapic'" in names
    assert "'sdxl'" in names
    assert imported == "[]"


def test_a_wrong_name_comes_with_the_nearest_one_and_all_of_them() -> None:
    with pytest.raises(
        ConfigError, match=r"^family 'sdlx' not found; did you mean 'sdxl'\? Available: causal_lm, .*\bsd, .*\bsdxl"
    ):
        plugins.find("families", "sdlx")
    with pytest.raises(ConfigError, match=r"^data format 'zzz' not found\. Available: folder, "):
        plugins.find("readers", "zzz")
    with pytest.raises(ConfigError, match="not found"):
        plugins.find("families", "_unet")  # shared code is no plugin


def test_a_users_own_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(READER.format(name="Mine"))
    cls = plugins.find("readers", str(file))
    assert cls.__name__ == "Mine"
    assert plugins.name_of(cls) == str(file)
    # Another file of the same name is another plugin, and neither replaces the other.
    other = tmp_path / "more" / "mine.py"
    other.parent.mkdir()
    other.write_text(READER.format(name="Other"))
    assert plugins.find("readers", str(other)).__name__ == "Other"
    assert plugins.name_of(cls) == str(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "must define exactly one public subclass of Reader; found none"),
        (
            READER.format(name="A") + READER.format(name="B").replace("from __future__ import annotations", ""),
            "found A, B",
        ),
        ("import a_package_that_is_not_there", "does not run: ModuleNotFoundError"),
        ("def f(:", "does not run: SyntaxError"),
    ],
)
def test_files_that_hold_no_plugin(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "broken.py"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        plugins.find("readers", str(file))


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"objective file 'nowhere/mine\.py' does not exist"):
        plugins.find("objectives", "nowhere/mine.py")
