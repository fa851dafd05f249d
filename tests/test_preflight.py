"""What is refused before any weights load."""

import pytest

from diffalign import preflight
from diffalign.config import build
from diffalign.errors import UserError


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
