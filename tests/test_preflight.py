"""What is refused before any weights load."""

from typing import Any

import pytest

from diffalign import losses, preflight
from diffalign.config_loading import build
from diffalign.errors import ConfigError, UserError


def tree(tmp_path, **sections):
    base = {
        "output_dir": str(tmp_path / "run"),
        "model": {"family": "sdxl", "pretrained": "tiny-sdxl"},
        "data": {"sources": [str(tmp_path)], "resolution": 32},
        "objective": {"name": "dpo", "beta_dpo": 10.0},
    }
    for name, values in sections.items():
        base[name] = base.get(name, {}) | values
    return build(base)


def test_a_sound_config_passes(tmp_path):
    preflight.check(tree(tmp_path))


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"training": {"attention": "flash"}}, r"training.attention 'flash'.*'default' or 'xformers'"),
        ({"training": {"lr_scheduler": "piecewise_constant"}}, r"lr_scheduler 'piecewise_constant'"),
        (
            {"training": {"lr_scheduler": "constant", "lr_warmup_steps": 5}},
            r"lr_warmup_steps: got 5.*constant_with_warmup",
        ),
        ({"training": {"lr_scheduler": "polynomial", "learning_rate": 1e-8}}, r"polynomial"),
        (
            {"training": {"report_to": ["tensorbord"]}},
            r"report_to 'tensorbord' is no tracker; did you mean 'tensorboard'",
        ),
        ({"training": {"report_to": ["comet_ml"]}}, r"pip install comet_ml"),
        ({"training": {"optimizer": "adamw8bit", "max_train_steps": 0}}, r"max_train_steps: got 0"),
        ({"lora": {"init": "pissa"}}, r"pissa"),
        ({"evaluation": {"at_end": True}}, r"evaluation.prompts: missing"),
        ({"evaluation": {"rewards": ["pickscor"]}}, r"pickscor.*did you mean 'pickscore'"),
        ({"data": {"sources": []}}, r"data.sources: empty"),
        ({"data": {"buckets": True}, "cache": {"enabled": False}}, r"data.buckets needs the cache"),
        ({"sampling": {"batch_size": 0}}, r"sampling.batch_size: got 0"),
    ],
)
def test_what_cannot_run_is_refused_with_the_key_and_what_to_do(tmp_path, sections, said):
    with pytest.raises(UserError, match=said):
        preflight.check(tree(tmp_path, **sections))


@pytest.mark.parametrize(
    ("objective", "why"),
    [
        ({"name": "sppo", "beta": 200, "scale": "unit"}, "win rates|target"),
        ({"name": "modpo", "beta": 200}, "reward"),
        ({"name": "kto", "beta": 200}, "mismatched|z0"),
        ({"name": "rwr"}, "target|weight|reward"),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_what_image_pairs_do_not_supply_is_said_before_anything_loads(objective: dict[str, Any], why: str) -> None:
    rest = {key: value for key, value in objective.items() if key != "name"}
    with pytest.raises(
        ConfigError, match=rf"objective '{objective['name']}' cannot be computed on image pairs: .*({why})"
    ):
        preflight._rehearse(losses.find(objective["name"])(**rest))


def test_what_image_pairs_supply_passes_the_rehearsal() -> None:
    for made in (losses.DPO(), losses.KTO(beta=200, reference_point="batch"), losses.SFT(), losses.NPO(beta=200)):
        preflight._rehearse(made)
