"""The core as a library of its own: what importing it brings along."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

from diffalign import losses


def modules_after(code: str) -> list[str]:
    script = f"import sys; {code}; print(*sorted(m for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.split()


def test_importing_the_core_brings_nothing_else_of_ours_and_no_model_library():
    found = modules_after("import diffalign.losses")
    ours = {m for m in found if m.partition(".")[0] in ("diffalign", "reward_models")}
    assert ours == {
        "diffalign",
        "diffalign.losses",
        "diffalign.losses.base",
        "diffalign.losses.layouts",
        "diffalign.losses.scores",
    }
    heavy = {"accelerate", "diffusers", "transformers", "peft", "open_clip", "pyarrow", "PIL", "yaml"}
    assert not heavy & {m.partition(".")[0] for m in found}


def test_one_objective_brings_its_family_only():
    found = modules_after("from diffalign.losses import DPO")
    assert "diffalign.losses.pairwise" in found
    assert "diffalign.losses.games" not in found


def test_all_objectives_together_bring_the_core_only():
    found = modules_after("from diffalign import losses; losses.catalogue()")
    ours = {m for m in found if m.partition(".")[0] in ("diffalign", "reward_models")}
    assert all(m == "diffalign" or m.startswith("diffalign.losses") for m in ours)


def modules_of(family):
    """A family's module; of a package, all of its modules."""
    found = [m.name for m in pkgutil.iter_modules(getattr(family, "__path__", []))]
    return [family, *(importlib.import_module(f"{family.__name__}.{name}") for name in found)]


def test_one_diffusion_method_brings_its_own_file():
    found = modules_after("from diffalign import losses; losses.find('ddim_inpo')")
    assert "diffalign.losses.diffusion.inpo" in found
    assert "diffalign.losses.diffusion.sdpo" not in found
    with pytest.raises(AttributeError, match="has no attribute 'DDIMInP0'"):
        _ = losses.diffusion.DDIMInP0


def test_the_table_of_names_is_the_classes():
    """Names are written down so that they can be listed without importing; they must be those of the classes."""
    for module, members in losses.FAMILIES.items():
        own = {
            member.name: member.__name__
            for owner in modules_of(getattr(losses, module))
            for member in vars(owner).values()
            if isinstance(member, type)
            and issubclass(member, losses.Objective)
            and member.__module__ == owner.__name__
            and "name" in vars(member)
        }
        assert own == members, module
    assert len(losses.names()) == len(set(losses.names())) == len(losses.catalogue())


def test_every_public_name_is_there_and_others_are_not():
    for name in losses.__all__:
        assert getattr(losses, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'DP0'"):
        _ = losses.DP0
    with pytest.raises(KeyError):
        losses.find("dp0")
