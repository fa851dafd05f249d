"""Adapters of language models as peft folders, read by peft itself and by us."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_support import build_lm
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor

from diffalign import adapters
from diffalign.config import LoraConfig
from diffalign.errors import CheckpointError
from diffalign.text.export import CONFIG_NAME, WEIGHTS_NAME, load_peft, save_peft

# peft 0.21 asks transformers by a name that the newest one calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
IDS = torch.arange(3, 15)[None]


@torch.no_grad()
def logits(network: Any) -> Tensor:
    return network(input_ids=IDS).logits  # type: ignore[no-any-return]


def trained(model_type: str, lora: LoraConfig) -> Any:
    network = build_lm(model_type)
    adapters.attach(network, lora)
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter += 0.1 * torch.randn(parameter.shape, generator=draw)
    return network


CASES = [
    ("llama", LoraConfig(rank=4, alpha=6.0)),
    ("llama", LoraConfig(rank=4, targets="all", use_rslora=True)),
    ("qwen2", LoraConfig(rank=2, targets="attention+ff", use_dora=True)),
    ("gpt2", LoraConfig(rank=4)),
    ("llama", LoraConfig(rank=2, targets=("layers.1.self_attn.q_proj", "layers.0.mlp.up_proj"))),
]


@pytest.mark.parametrize(("model_type", "lora"), CASES)
def test_peft_and_we_read_back_the_same_model(tmp_path: Path, model_type: str, lora: LoraConfig) -> None:
    network = trained(model_type, lora)
    wanted = logits(network)
    assert (wanted - logits(build_lm(model_type))).abs().max() > 1e-3
    save_peft(network, lora, tmp_path, "some/base", {"objective": "dpo"})
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG_NAME, WEIGHTS_NAME]

    theirs = PeftModel.from_pretrained(build_lm(model_type), str(tmp_path)).eval()
    torch.testing.assert_close(logits(theirs), wanted, rtol=1e-5, atol=1e-5)
    ours = build_lm(model_type)
    load_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-5)
    with torch.no_grad(), adapters.adapters_off(ours):
        assert torch.equal(logits(ours), logits(build_lm(model_type)))
    for key, value in adapters.state_dict(network).items():
        assert torch.equal(adapters.state_dict(ours)[key], value)


def test_the_folder_says_what_it_is(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=6.0)
    save_peft(trained("llama", lora), lora, tmp_path / "deep" / "er", "some/base", {"objective": "dpo"})
    config = json.loads((tmp_path / "deep" / "er" / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == "some/base"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["inference_mode"] is True
    assert (config["r"], config["lora_alpha"]) == (4, 6)
    assert config["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    with safe_open(tmp_path / "deep" / "er" / WEIGHTS_NAME, "pt") as file:
        assert file.metadata()["diffalign.objective"] == "dpo"
        assert all(key.startswith("base_model.model.model.layers.") for key in file.keys())  # noqa: SIM118


def test_a_moving_average_is_written_instead(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2)
    network = trained("llama", lora)
    average = {key: value / 2 for key, value in adapters.state_dict(network).items()}
    save_peft(network, lora, tmp_path, "b", state=average)
    other = build_lm()
    load_peft(other, tmp_path, name="average")
    for key, value in average.items():
        assert torch.equal(adapters.state_dict(other, "average")[key], value)


def test_an_adapter_of_peft_itself_with_patterns_is_read(tmp_path: Path) -> None:
    import peft

    config = peft.LoraConfig(
        r=2,
        lora_alpha=4,
        target_modules=["q_proj", "down_proj"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"layers.1.self_attn.q_proj": 9},
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(build_lm(), config).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(5))
    theirs.save_pretrained(tmp_path)
    ours = build_lm()
    load_peft(ours, tmp_path)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


def _edit(folder: Path, **changes: Any) -> None:
    file = folder / CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_no_plain_lora_of_this_model_is_refused(tmp_path: Path) -> None:
    lora = LoraConfig(rank=2, targets="all")
    with pytest.raises(CheckpointError, match="no readable peft adapter"):
        load_peft(build_lm(), tmp_path)
    save_peft(trained("llama", lora), lora, tmp_path, "some/base")
    with pytest.raises(CheckpointError, match=r"no layer of this network.*'some/base'"):
        load_peft(build_lm("gpt2"), tmp_path)
    for changes, said in (
        ({"peft_type": "IA3"}, "a IA3 adapter"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ):
        _edit(tmp_path, **({"peft_type": "LORA", "bias": "none", "modules_to_save": None} | changes))
        with pytest.raises(CheckpointError, match=said):
            load_peft(build_lm(), tmp_path)
    (tmp_path / WEIGHTS_NAME).write_bytes(b"\0" * 40)
    with pytest.raises(CheckpointError, match="no readable"):
        load_peft(build_lm(), tmp_path)


def test_a_config_that_is_not_what_is_attached_is_refused(tmp_path: Path) -> None:
    network = trained("llama", LoraConfig(rank=2))
    with pytest.raises(ValueError, match="rank, alpha"):
        save_peft(network, LoraConfig(rank=4), tmp_path, "b")
    with pytest.raises(ValueError, match="metadata values are texts"):
        save_peft(network, None, tmp_path, "b", {"steps": 3})  # type: ignore[dict-item]
    state = copy.copy(adapters.state_dict(network))
    state.popitem()
    with pytest.raises(CheckpointError, match="is missing"):
        save_peft(network, None, tmp_path, "b", state=state)
    assert not list(tmp_path.iterdir())
