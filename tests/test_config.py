"""The configuration is strict: what is not declared is refused, what is declared is converted by its type."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffalign import plugins, preflight
from diffalign.config import RunConfig
from diffalign.config_loading import apply_override, build, config_folder, dump, load_config, to_tree
from diffalign.errors import ConfigError, UserError
from diffalign.losses import RobustDPO

OWN_OBJECTIVE = '''
"""An objective outside of the package."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from diffalign.losses import LossOut, Objective
from diffalign.losses.base import needs


@dataclass(frozen=True, kw_only=True)
class Mine(Objective):
    strength: float = 1.0
    name: ClassVar[str] = "mine"
    title: ClassVar[str] = "Mine"
    composition: ClassVar[str] = "score"
    needs: ClassVar = needs("pairs", reference=False)

    def __call__(self, scores, layout, stats=None):
        return LossOut(scores.theta * self.strength, {})
'''


def make(**changes: Any) -> RunConfig:
    tree: dict[str, Any] = {
        "output_dir": "out",
        "model": {"family": "sdxl", "pretrained": "tiny-sdxl"},
        "objective": {"name": "dpo"},
    }
    return build(tree | changes)


def refused(match: str, **changes: Any) -> None:
    with pytest.raises(ConfigError, match=match) as error:
        make(**changes)
    assert "\n" not in str(error.value)


# --- keys ------------------------------------------------------------------------------------------------------------


def test_unknown_keys_are_refused_with_the_nearest_name_at_every_level() -> None:
    refused(r"^trainning: unknown key; did you mean 'training'\? Known: cache, data", trainning={})
    refused(r"^training\.learning_rte: unknown key; did you mean 'learning_rate'\?", training={"learning_rte": 1})
    refused(r"^objective\.betta: unknown key; did you mean 'beta'\?", objective={"name": "dpo", "betta": 1})
    refused(r"^data\.world_pairs\.promts: unknown key; did you mean 'prompts'\?", data={"world_pairs": {"promts": 3}})
    refused(
        r"^objective\.timestep_min: unknown key; it is denoising\.timestep_min\.",
        objective={"name": "dpo", "timestep_min": 1},
    )
    refused(
        r"^objective\.loss_type: .*; it is objective\.name \(dpo, robust_dpo",
        objective={"name": "dpo", "loss_type": "ipo"},
    )
    refused(r"^training\.lr: unknown key; it is training\.learning_rate\.", training={"lr": 1})
    refused(r"^training\.seed: unknown key; it is seed or evaluation\.seed\.", training={"seed": 1})
    refused(r"^cache\.zzz: unknown key\. Known: batch_size", cache={"zzz": 1})


def test_a_mistyped_objective_section_is_named_as_such() -> None:
    tree = {"output_dir": "out", "model": {"family": "sdxl", "pretrained": "x"}, "objectve": {"name": "dpo"}}
    with pytest.raises(ConfigError, match=r"^objectve: unknown key; did you mean 'objective'\?"):
        build(tree)


def test_missing_keys_are_named() -> None:
    refused(r"^model\.pretrained: missing", model={"family": "sdxl"})
    with pytest.raises(ConfigError, match=r"^output_dir: missing"):
        build({"model": {"family": "sdxl", "pretrained": "x"}, "objective": {"name": "dpo"}})
    refused("^objective: expected a section with a name.*Available: .*dpo, ", objective={"beta_dpo": 1})
    refused(r"^objective 'dppo' not found; did you mean 'dpo'\?", objective={"name": "dppo"})


# --- values ----------------------------------------------------------------------------------------------------------


def test_numbers_that_yaml_reads_as_text() -> None:
    text = "training: {learning_rate: 1e-5, max_train_steps: 1e3}"
    tree = yaml.safe_load(text)
    assert tree["training"] == {"learning_rate": "1e-5", "max_train_steps": "1e3"}  # what PyYAML makes of it
    training = make(**tree).training
    assert (training.learning_rate, training.max_train_steps) == (1e-5, 1000)
    assert isinstance(training.max_train_steps, int)


def test_a_bare_no_is_a_precision_and_no_switch() -> None:
    tree = yaml.safe_load("training: {mixed_precision: no}")
    assert tree["training"]["mixed_precision"] is False
    assert make(**tree).training.mixed_precision == "no"
    refused(r"training\.compile: got 'maybe' \(str\); true or false expected", training={"compile": "maybe"})


def test_lists_and_single_values() -> None:
    assert make(data={"sources": "here"}).data.sources == ("here",)
    assert make(data={"sources": ["a", "b"]}).data.sources == ("a", "b")
    assert make(data={"sources": ""}).data.sources == ()
    assert make(lora={"targets": ["to_q", "to_k"]}).lora.targets == ("to_q", "to_k")
    assert make(lora={"targets": "all"}).lora.targets == "all"
    refused(r"data\.sources: got 3; a list expected", data={"sources": 3})
    refused(r"data\.sources\[1\]: got \['b'\]", data={"sources": ["a", ["b"]]})


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("seed", 1.5, r"^seed: got 1\.5 \(float\); a whole number expected"),
        ("seed", True, r"^seed: got True \(bool\); a whole number expected"),
        ("training", {"learning_rate": "fast"}, r"^training\.learning_rate: got 'fast' \(str\); a number expected"),
        ("training", {"learning_rate": float("nan")}, r"^training\.learning_rate: got nan"),
        ("training", {"learning_rate": True}, r"^training\.learning_rate: got True"),
        (
            "training",
            {"train_batch_size": "atuo"},
            r"^training\.train_batch_size: got 'atuo'; a whole number or 'auto'",
        ),
        ("training", {"mixed_precision": "bf61"}, r"got 'bf61'; expected one of 'no', 'bf16', 'fp16'; did you mean"),
        ("training", [1], r"^training: got \[1\]; a section with keys expected"),
        ("data", {"ties": True}, r"^data\.ties: got True; expected one of 'drop', 'soft'"),
        ("lora", {"alpha": "x"}, r"^lora\.alpha: got 'x' \(str\); a number expected"),
        ("objective", {"name": "dpo", "beta_dpo": -1}, r"^objective: beta is -1"),
    ],
)
def test_values_of_the_wrong_type(section: str, values: Any, message: str) -> None:
    refused(message, **{section: values})


def test_unions_keep_exact_types() -> None:
    training = make(training={"train_batch_size": "auto", "gradient_checkpointing": True, "ema_decay": None}).training
    assert training.train_batch_size == "auto"
    assert training.gradient_checkpointing is True
    assert training.ema_decay is None
    assert make(training={"train_batch_size": 4}).training.train_batch_size == 4
    assert make(training={"gradient_checkpointing": "auto"}).training.gradient_checkpointing == "auto"


# --- overrides -------------------------------------------------------------------------------------------------------


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(dump(make()))
    config = load_config(
        file,
        [
            "seed=7",
            "training.learning_rate=2e-5",
            "objective.beta_dpo=300",
            "data.world_pairs.prompts=9",
            "data.sources=[a, b]",
            "evaluation.rewards=world_verifier",
            "sampling.negative_prompt=",
            "training.ema_decay=null",
            "model.vae=a=b",
        ],
    )
    assert (config.seed, config.training.learning_rate, config.objective.beta) == (7, 2e-5, 300.0)
    assert config.data.world_pairs is not None
    assert config.data.world_pairs.prompts == 9
    assert config.data.sources == ("a", "b")
    assert config.evaluation.rewards == ("world_verifier",)
    assert (config.sampling.negative_prompt, config.training.ema_decay, config.model.vae) == ("", None, "a=b")


def test_the_objective_can_be_changed_by_an_override(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: x\nmodel: {family: sd, pretrained: y}\nobjective: {name: dpo}\n")
    assert isinstance(load_config(file, ["objective.name=robust_dpo"]).objective, RobustDPO)
    with pytest.raises(ConfigError, match=r"objective\.label_smoothing: unknown key"):
        load_config(file, ["objective.name=robust_dpo", "objective.label_smoothing=0.1"])


def test_the_name_that_diffusers_scripts_use_for_beta_is_understood(tmp_path: Path) -> None:
    assert make(objective={"name": "dpo", "beta_dpo": 7}).objective.beta == 7
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: x\nmodel: {family: sd, pretrained: y}\nobjective: {name: dpo, beta_dpo: 30}\n")
    assert load_config(file, ["objective.beta=5"]).objective.beta == 5
    assert load_config(file, ["objective.beta_dpo=6"]).objective.beta == 6
    assert load_config(file, ["objective.name=ipo", "objective.beta=7"]).objective.beta == 7
    refused(r"^objective\.beta_dpo: given twice.* same setting", objective={"name": "dpo", "beta": 1, "beta_dpo": 2})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "expected key=value"),
        ("=3", "expected key=value"),
        ("seed.x=3", "'seed' is a value, not a section"),
        ("seed=[1", "the value is not readable as YAML"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        apply_override({"seed": 1}, override)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_dumped_config_reads_back_equal(tmp_path: Path) -> None:
    config = make(
        data={"sources": ["a", "ü"], "world_pairs": {"taste": "warm"}, "max_disk_gb": 1.5},
        lora={"targets": ["to_q"], "alpha": 3},
        training={"learning_rate": 1e-7, "train_batch_size": "auto", "mixed_precision": "no"},
        evaluation={"prompts": ["one", "two: three"], "rewards": ["world_taste:outlined"]},
        objective={"name": "dpo", "label_smoothing": 0.25, "beta_dpo": 12.5},
    )
    file = tmp_path / "config.yaml"
    file.write_text(dump(config), encoding="utf-8")
    assert load_config(file) == config
    assert to_tree(config)["objective"]["name"] == "dpo"


def test_an_objective_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(OWN_OBJECTIVE)
    config = make(objective={"name": str(file), "strength": "2e0"})
    assert type(config.objective).__name__ == "Mine"
    assert config.objective.strength == 2.0
    copy = tmp_path / "config.yaml"
    copy.write_text(dump(config))
    assert load_config(copy) == config  # found again by its path
    refused(
        r"objective\.strenght: unknown key; did you mean 'strength'\?", objective={"name": str(file), "strenght": 1}
    )


def test_shipped_configs_are_found_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = sorted(path.stem for path in config_folder().glob("*.yaml"))
    assert {"demo_dpo", "sd15_dpo_pickapic", "sdxl_dpo_pickapic"} <= set(shipped)
    for name in shipped:
        assert load_config(name) == load_config(f"configs/{name}.yaml") == load_config(f"{name}.yaml")
    with pytest.raises(ConfigError, match=r"'demo_dpoo' not found .*; did you mean 'demo_dpo'\? Shipped: "):
        load_config("demo_dpoo")
    with pytest.raises(ConfigError, match="not found"):
        load_config("elsewhere/demo_dpo.yaml")


@pytest.mark.parametrize("name", sorted(path.stem for path in config_folder().glob("*.yaml")))
def test_shipped_configs_pass_what_is_checked_before_a_run(name: str, tmp_path: Path) -> None:
    config = load_config(name, [f"output_dir={tmp_path / 'run'}"])
    if not config.lora.experts:
        preflight.check(config)
        return
    with pytest.raises(UserError, match="no such adapter"):  # its header says which runs come first
        preflight.check(config)


def test_files_that_are_no_config(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1\nb: 2")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(file)
    file.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="expected a mapping of sections, got list"):
        load_config(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not readable as YAML"):
        load_config(file)


def test_every_objective_is_known_by_its_name() -> None:
    for name in plugins.names("objectives"):
        cls = plugins.find("objectives", name)
        missing = {
            f.name: 0.5 for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING
        }
        assert to_tree(make(objective={"name": name} | missing))["objective"]["name"] == name


def test_settings_without_a_published_value_have_to_be_given() -> None:
    refused(r"^objective\.rate: missing; it has no default", objective={"name": "dynamic_label_dpo"})
