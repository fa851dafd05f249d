"""The language-model family: what it loads, what it refuses before and while loading, and LoRA on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_support import CONFIGS, build_lm, build_tokenizer, save_lm
from torch import Tensor, nn

from diffalign import adapters, plugins
from diffalign.config import LoraConfig, ModelConfig, TrainingConfig
from diffalign.errors import ConfigError, MissingExtraError
from diffalign.families import NETWORK, load_family
from diffalign.families._language_models import NAMES
from diffalign.families.causal_lm import CausalLM, check_config
from diffalign.losses import Kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_lm(tmp_path_factory.mktemp("lm"))


def model(pretrained: Path | str, **more: Any) -> ModelConfig:
    return ModelConfig(family="causal_lm", pretrained=str(pretrained), **more)


def logits(network: Any) -> Tensor:
    with torch.no_grad():
        return network(input_ids=torch.arange(3, 15)[None]).logits  # type: ignore[no-any-return]


# Loading


def test_it_is_a_plugin_for_texts() -> None:
    cls: Any = plugins.find("families", "causal_lm")
    assert cls is CausalLM
    assert (cls.modality, cls.kind) == ("text", Kind.TOKEN)


def test_a_folder_gives_its_weights_frozen_and_still(folder: Path) -> None:
    family = load_family(model(folder))
    assert isinstance(family, CausalLM)
    network = family.network
    assert torch.equal(logits(network), logits(build_lm()))
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert family.network is network
    family.unload(NETWORK)
    assert family.network is not network
    with pytest.raises(ValueError, match="no part 'decoder'"):
        family.load("decoder")


def test_the_type_is_that_of_training(folder: Path) -> None:
    network = load_family(model(folder), dtype=torch.bfloat16).network
    assert {p.dtype for p in network.parameters()} == {torch.bfloat16}


def test_dropout_of_the_base_is_off(tmp_path: Path) -> None:
    build_lm("gpt2", attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3).save_pretrained(tmp_path)
    network = load_family(model(tmp_path)).network.train()
    assert torch.equal(logits(network), logits(network))
    assert torch.equal(logits(network), logits(network.eval()))


def test_random_weights_are_the_same_every_time_and_leave_the_generator_alone(folder: Path) -> None:
    state = torch.get_rng_state()
    networks = [load_family(model(folder, random_weights=True)).network for _ in range(2)]
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(logits(networks[0]), logits(networks[1]))
    assert not torch.equal(logits(networks[0]), logits(build_lm()))


@pytest.mark.parametrize(
    ("name", "parameters"),
    # as the model cards say
    [
        ("qwen2.5-0.5b", 494_032_768),
        ("qwen2.5-7b", 7_615_616_512),
        ("llama-3.2-1b", 1_235_814_400),
        ("llama-3.1-8b", 8_030_261_248),
        ("gpt2", 124_439_808),
    ],
)
def test_published_architectures_have_their_size_without_memory(name: str, parameters: int) -> None:
    assert name in NAMES
    network = load_family(model(name, random_weights=True), device="meta", dtype=torch.bfloat16).network
    assert all(p.is_meta for p in network.parameters())
    assert sum(p.numel() for p in network.parameters()) == parameters
    adapters.attach(network, LoraConfig(rank=4))
    layers, count = adapters.count(network)
    assert layers % network.config.num_hidden_layers == 0  # type: ignore[union-attr, operator]
    assert count > 0
    with pytest.raises(ConfigError, match="has no tokenizer"):
        _ = CausalLM(model(name, random_weights=True)).tokenizer


def test_a_folder_on_the_meta_device_needs_no_weights(tmp_path: Path) -> None:
    build_lm().config.save_pretrained(tmp_path)
    network = load_family(model(tmp_path), device="meta").network
    assert all(p.is_meta for p in network.parameters())


def test_preparation_for_training(folder: Path) -> None:
    family = CausalLM(model(folder))
    network: Any = family.network
    default = network.config._attn_implementation
    family.configure(TrainingConfig(gradient_checkpointing=True))
    assert network.config._attn_implementation == default == "sdpa"
    assert network.is_activation_checkpointing
    wanted = logits(network)
    family.configure(TrainingConfig(attention="eager"))
    assert network.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(network), wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="flash_attention_2' needs a GPU"):
        family.configure(TrainingConfig(attention="flash_attention_2"))
    with pytest.raises(ConfigError, match="channels_last"):
        family.configure(TrainingConfig(channels_last=True))


# Refusals


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"vae": "some/vae"}, r"model\.vae: got 'some/vae'; it is for image models"),
        ({"config": "some/config"}, r"model\.config"),
        ({"prediction_type": "epsilon"}, r"model\.prediction_type"),
        ({"random_weights": True, "variant": "fp16"}, r"model\.variant.*trained weights"),
        ({"random_weights": True, "revision": "main"}, r"model\.revision.*trained weights"),
        ({"random_weights": True, "load_in_4bit": True}, r"model\.load_in_4bit quantises trained"),
    ],
)
def test_keys_that_mean_nothing_here_are_refused(folder: Path, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_family(model(folder, **more))


def test_four_bits_need_a_package_and_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = model(folder, load_in_4bit=True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"diffalign\[bitsandbytes\]"):
        CausalLM.preflight(config)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    CausalLM.preflight(config)
    with pytest.raises(ConfigError, match="needs a GPU"):
        CausalLM(config).load(NETWORK)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere", "no folder, hub id"),
        ("tiny-lmm", "did you mean 'tiny-lm'"),
        ("a/b/c", "no folder, hub id"),
    ],
)
def test_names_that_cannot_be_are_refused(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        CausalLM.preflight(model(name))


def test_an_unknown_architecture_without_weights_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'llama-3\.2-1b'"):
        CausalLM.preflight(model("llama-3.2-1B", random_weights=True))


def test_a_hub_id_that_is_not_here_is_one_line() -> None:
    config = model("nobody/has-this-model")
    CausalLM.preflight(config)  # nothing is asked of the hub yet
    with pytest.raises(ConfigError, match="'nobody/has-this-model' could not be loaded") as caught:
        CausalLM(config).load(NETWORK)
    assert "\n" not in str(caught.value)


def test_folders_that_hold_something_else_are_refused_before_loading(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"without config\.json"):
        CausalLM.preflight(model(tmp_path))
    file = tmp_path / "config.json"
    file.write_text("{")
    with pytest.raises(ConfigError, match="not readable"):
        CausalLM.preflight(model(tmp_path))
    with pytest.raises(ConfigError, match="is a file"):
        CausalLM.preflight(model(file))
    file.write_text(json.dumps({"model_type": "t5", "is_encoder_decoder": True}))
    with pytest.raises(ConfigError, match="model_type 't5'"):
        CausalLM.preflight(model(tmp_path))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, "model_type None"),
        ({"model_type": "unet"}, "model_type 'unet'"),
        ({"model_type": "own", "auto_map": {"AutoModelForCausalLM": "x.Y"}}, "brings its own code"),
        ({"model_type": "bart", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "gemma3", "vision_config": {}}, "also takes images"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "holds a BertForMaskedLM"),
        (
            {"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]},
            "LlamaForSequenceClassification",
        ),
    ],
)
def test_configs_of_other_models_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_config(config, "x")
    check_config({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "x")


def test_missing_weights_are_refused_instead_of_drawn(tmp_path: Path) -> None:
    network = build_lm(tie_word_embeddings=False)
    state = {key: value for key, value in network.state_dict().items() if key != "lm_head.weight"}
    network.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ConfigError, match=r"no weights for 'lm_head\.weight'"):
        CausalLM(model(tmp_path)).load(NETWORK)


# Tokenizer


def test_the_tokenizer_comes_without_the_network_and_pads_with_its_end(folder: Path) -> None:
    family = CausalLM(model(folder))
    tokenizer = family.tokenizer
    assert family._network is None
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    assert family.tokenizer is tokenizer
    assert family.pad_id == 2
    assert tokenizer("abc").input_ids == build_tokenizer()("abc").input_ids


def test_every_end_token_is_known(tmp_path: Path) -> None:
    network = build_lm()
    network.generation_config.eos_token_id = [2, 41, 40]
    network.save_pretrained(tmp_path)
    build_tokenizer().save_pretrained(tmp_path)
    family = CausalLM(model(tmp_path))
    assert family.eos_ids == (2, 41, 40)
    family.load(NETWORK)
    assert family.eos_ids == (2, 41, 40)


def test_a_template_replaces_the_models_own(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    family = CausalLM(model(folder))
    before = family.fingerprint()
    assert "tokenizer/tokenizer.json" in before
    tokenizer = family.load_tokenizer(chat_template=str(file))
    assert tokenizer.apply_chat_template([{"role": "user", "content": "abc"}], tokenize=False) == "abc"
    assert family.tokenizer is tokenizer
    changed = family.fingerprint()
    assert changed.pop("chat_template")
    assert changed == before
    with pytest.raises(ConfigError, match=r"text\.chat_template.*not readable"):
        family.load_tokenizer(chat_template=str(tmp_path / "none.jinja"))


def test_a_tokenizer_without_end_is_refused(tmp_path: Path) -> None:
    build_lm().config.save_pretrained(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        _ = CausalLM(model(tmp_path)).tokenizer


def test_the_fingerprint_follows_the_tokenizer_and_not_the_weights(folder: Path, tmp_path: Path) -> None:
    one = CausalLM(model(folder)).fingerprint()
    build_lm("gpt2").save_pretrained(tmp_path)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    assert CausalLM(model(tmp_path)).fingerprint() == one
    tokenizer.add_tokens(["zz"])
    tokenizer.save_pretrained(tmp_path)
    assert CausalLM(model(tmp_path)).fingerprint() != one
    assert CausalLM(model("a/b", revision="r1")).fingerprint() == {"tokenizer": "a/b@r1"}


# LoRA


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_presets_find_the_layers_by_place(name: str) -> None:
    network = build_lm(name)
    head = adapters.head_path(network)
    linear = [path for path in adapters.base_layers(network) if path != head]
    attention = adapters.target_modules(network, "attention")
    blocks = {part for path in attention for part in path.split(".") if part.isdigit()}
    assert blocks == {"0", "1"}
    assert len(attention) in (4, 8)  # of two blocks: qkv and output in one or two, or q, k, v and output
    assert all("attn" in path for path in attention)
    assert adapters.target_modules(network, "attention+ff") == linear
    assert adapters.target_modules(network, "all") == linear
    assert set(linear) > set(attention)


def test_routers_and_state_space_layers_are_no_feed_forward() -> None:
    names = ["self_attn.q_proj", "mixer.in_proj", "mamba.out_proj", "mlp.gate", "mlp.gate_proj", "mlp.router.proj"]
    network = build_lm()
    block = network.model.layers[0]
    for path in names[1:4] + names[5:]:
        owner = block
        for part in path.split(".")[:-1]:
            if part not in dict(owner.named_children()):
                owner.add_module(part, nn.Module())
            owner = owner.get_submodule(part)
        owner.add_module(path.rpartition(".")[2], nn.Linear(2, 2))
    chosen = {path.removeprefix("model.layers.0.") for path in adapters.target_modules(network, "attention+ff")}
    assert chosen & set(names) == {"self_attn.q_proj", "mlp.gate_proj"}
    every = {path.removeprefix("model.layers.0.") for path in adapters.target_modules(network, "all")}
    assert set(names) <= every


@pytest.mark.parametrize("target", ["lm_head", ("q_proj", "lm_head")])
def test_the_head_carries_no_adapter(target: Any) -> None:
    with pytest.raises(ConfigError, match="'lm_head' is the output projection"):
        adapters.attach(build_lm(), LoraConfig(targets=target))


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_off_is_the_base_to_the_bit_and_merging_adds_the_delta(name: str) -> None:
    base, network = build_lm(name), build_lm(name)
    adapters.attach(network, LoraConfig(rank=2, targets="all", dropout=0.2))
    assert torch.equal(logits(network.eval()), logits(base))  # B is zero
    with torch.no_grad():
        for parameter in adapters.parameters(network):
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(logits(network), logits(base), atol=1e-3)
        network.train()
        with adapters.adapters_off(network):
            assert torch.equal(logits(network), logits(base))
        network.eval()
        state = adapters.state_dict(network)
        merged = build_lm(name)
        for path, change in adapters.delta_weights(network).items():
            merged.get_submodule(path).weight += change
    torch.testing.assert_close(logits(merged), logits(network), rtol=1e-4, atol=1e-4)
    again = build_lm(name)
    adapters.attach(again, LoraConfig(rank=2, targets="all"))
    adapters.load_state_dict(again, state)
    assert torch.equal(logits(again), logits(network))


def test_initialisations_for_plain_linear_layers_are_refused_on_others() -> None:
    with pytest.raises(ConfigError, match=r"plain linear layers only.*Conv1D"):
        adapters.attach(build_lm("gpt2"), LoraConfig(rank=2, init="mica"))
    adapters.attach(build_lm(), LoraConfig(rank=2, init="orthogonal"))
