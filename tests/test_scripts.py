"""Scripts that nothing imports: what they name must exist."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def mutations() -> ModuleType:
    place = importlib.util.spec_from_file_location("check_mutations", ROOT / "scripts" / "check_mutations.py")
    assert place is not None
    assert place.loader is not None
    module = importlib.util.module_from_spec(place)
    sys.modules[place.name] = module  # dataclasses look their module up
    place.loader.exec_module(module)
    return module


def test_every_mutation_has_one_place_and_its_tests(mutations):
    """A line that moves takes its mutation along, or the mutation would only fail when somebody runs the script."""
    missing = []
    for mutation in mutations.MUTATIONS:
        if (ROOT / mutation.file).read_text().count(mutation.old) != 1:
            missing.append(f"{mutation.name}: {mutation.old!r} in {mutation.file}")
        files = [word for word in mutation.tests.split() if word.startswith("tests/")]
        missing += [f"{mutation.name}: {file}" for file in files if not (ROOT / file.split("::")[0]).exists()]
        assert files, mutation.name
    assert not missing
