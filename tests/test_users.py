"""PPD: a branch for users in every family's network, embeddings of people, and runs on their pairs."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from torch import Tensor, nn
from torch.nn import functional

from diffalign import adapters, checkpoint, export, user_branches, users
from diffalign.config import LoraConfig, ModelConfig, UsersConfig
from diffalign.data.encode import EncodedPair, Owner
from diffalign.errors import CheckpointError, ConfigError, DataError
from diffalign.families import ENCODERS, NETWORK, load_family
from diffalign.preflight import check
from diffalign.sampling import Sampler
from diffalign.trainer import train
from diffalign.user_branches import UserAttention, UserGates

NAMES = ("sd", "sdxl", "sd3", "pixart", "sana", "cogvideox", "flux", "qwen_image", "wan")


def network_of(name: str, request: pytest.FixtureRequest, factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """A family over random weights, and the arguments of a call with two rows."""
    if name in tiny.FIXTURES:
        folder = request.getfixturevalue(tiny.FIXTURES[name])
    else:
        folder = factory.getbasetemp() / f"users-{name}"
        if not folder.exists():
            tiny.build(name, folder)
    family: Any = load_family(ModelConfig(family=name, pretrained=str(folder), **tiny.SETTINGS.get(name, {})))
    family.load(ENCODERS, NETWORK)
    text = family.encode_prompts(["a red circle", "a blue square"])
    image = family.image_conditioning((32, 32), (0, 0), (32, 32))
    conditioning = text | {key: torch.stack([value, value]) for key, value in image.items()}
    shape = family.latent_shape(32, 32, 5) if name in ("wan", "cogvideox") else family.latent_shape(32, 32)
    x = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    times = family.schedule.time(torch.tensor([300, 700]))
    conditioning, _ = family.guide(conditioning, 1.0) if hasattr(family, "guide") else (conditioning, 1.0)
    return family, lambda: family.predict(family.network, x, times, conditioning)


def moved(branch: UserAttention, size: float = 0.5) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in branch.to_v:
            layer.weight.copy_(size * torch.randn(layer.weight.shape, generator=draw))


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_users_change_a_network_and_nobody_does_not(
    name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, call = network_of(name, request, tmp_path_factory)
    base = call()
    branch = UserAttention(family.network, width=6, tokens=3, size=8)
    who = torch.randn(2, 6, generator=torch.Generator().manual_seed(2))
    with branch.given(who):
        assert torch.equal(call(), base), "values start at zero"
    moved(branch)
    assert torch.equal(call(), base), "nobody was given"
    with branch.given(torch.zeros(2, 6)):
        assert torch.equal(call(), base), "zeros are nobody"
    with branch.given(who):
        both = call()
        with adapters.adapters_off(family.network):
            assert torch.equal(call(), base)
    assert (both - base).flatten(1).abs().amax(1).min() > 1e-4, "both rows changed"
    with branch.given(torch.stack([who[0], torch.zeros(6)])):
        one = call()
    torch.testing.assert_close(one[0], both[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(one[1], base[1], rtol=1e-4, atol=1e-5)
    with branch.given(who[0]):  # one for all rows
        torch.testing.assert_close(call()[0], both[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_is_added_is_a_second_attention_with_the_same_queries(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, _ = network_of("sdxl", request, tmp_path_factory)
    branch = UserAttention(family.network, width=6, tokens=3, size=8)
    moved(branch)
    path = branch.paths[1]
    module = family.network.get_submodule(path)
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(2, 5, module.to_q.in_features, generator=draw)
    text = torch.randn(2, 4, module.to_k.in_features, generator=draw)
    who = torch.randn(2, 6, generator=draw)
    base = module(hidden, encoder_hidden_states=text)
    with branch.given(who, strength=0.7):
        found = module(hidden, encoder_hidden_states=text)
    tokens = branch.norm((who @ branch.project.weight.T).view(2, 3, 8))
    q, k, v = hidden @ module.to_q.weight.T, tokens @ branch.to_k[1].weight.T, tokens @ branch.to_v[1].weight.T
    heads, size = module.heads, q.shape[-1] // module.heads
    parts = []
    for h in range(heads):
        s = slice(h * size, (h + 1) * size)
        shares = torch.softmax(q[..., s] @ k[..., s].transpose(1, 2) / size**0.5, -1)
        parts.append(shares @ v[..., s])
    wanted = base + 0.7 * torch.cat(parts, -1) @ module.to_out[0].weight.T
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_networks_with_two_kinds_of_attention_are_seen_where_text_is() -> None:
    from diffusers import SD3Transformer2DModel

    sides = {"num_layers": 3, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16}
    more = {"caption_projection_dim": 16, "pooled_projection_dim": 16, "sample_size": 8, "in_channels": 4}
    network = SD3Transformer2DModel(**sides, **more, dual_attention_layers=(0, 1))
    assert hasattr(network.transformer_blocks[0], "attn2"), "in which the image looks at itself"
    assert list(user_branches.attentions(network)) == [f"transformer_blocks.{i}.attn" for i in range(3)]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_users_weigh_the_ranks_of_a_lora(
    name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, call = network_of(name, request, tmp_path_factory)
    base = call()
    adapters.attach(family.network, LoraConfig(rank=3, alpha=3.0, targets="all"))
    draw = torch.Generator().manual_seed(5)
    for path, value in family.network.named_parameters():
        if "lora_B" in path:
            value.copy_(0.2 * torch.randn(value.shape, generator=draw))
    shared = call()
    assert (shared - base).abs().max() > 1e-4
    branch = UserGates(family.network, width=6)
    who = torch.randn(2, 6, generator=draw)
    with branch.given(who):
        torch.testing.assert_close(call(), shared, rtol=1e-5, atol=1e-6)
    for layer in branch.gates:
        layer.weight.copy_(0.3 * torch.randn(layer.weight.shape, generator=draw))
    assert torch.equal(call(), shared), "nobody has the plain LoRA"
    with branch.given(torch.zeros(2, 6)):
        torch.testing.assert_close(call(), shared, rtol=1e-5, atol=1e-6)
    with branch.given(who):
        both = call()
        with adapters.adapters_off(family.network):
            assert torch.equal(call(), base)
    assert (both - shared).flatten(1).abs().amax(1).min() > 1e-5, "both rows changed"
    with branch.given(3 * who[0]):  # by direction
        torch.testing.assert_close(call()[0], both[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_gates_are_a_diagonal_between_the_factors(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, _ = network_of("sdxl", request, tmp_path_factory)
    adapters.attach(family.network, LoraConfig(rank=2, alpha=3.0, targets="all"))
    branch = UserGates(family.network, width=4)
    draw = torch.Generator().manual_seed(6)
    layers: dict[str, Any] = dict(adapters.lora_layers(family.network))
    who = torch.randn(2, 4, generator=draw)
    directions = who / who.norm(dim=1, keepdim=True) * 2.0  # sqrt(4)
    tried = set()
    for number, path in enumerate(branch.paths):
        layer = layers[path]
        convolution = isinstance(layer.base_layer, nn.Conv2d)
        if convolution in tried:
            continue
        tried.add(convolution)
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        b.copy_(torch.randn(b.shape, generator=draw))
        branch.gates[number].weight.copy_(torch.randn(2, 4, generator=draw))
        shape = (2, a.shape[1], 6, 6) if convolution else (2, 5, a.shape[1])
        x = torch.randn(shape, generator=draw)
        with branch.given(who, strength=0.5):
            found = layer(x) - layer.base_layer(x)
        gate = 1 + 0.5 * directions @ branch.gates[number].weight.T
        for row in range(2):
            if convolution:
                inner = functional.conv2d(x[row : row + 1], a, None, layer.base_layer.stride, layer.base_layer.padding)
                wanted = functional.conv2d(inner * gate[row].view(1, 2, 1, 1), b)
            else:
                wanted = ((x[row] @ a.T * gate[row]) @ b.T)[None]
            torch.testing.assert_close(found[row : row + 1], 1.5 * wanted, rtol=1e-3, atol=1e-4)
    assert tried == {True, False}


def test_gradients_go_through_checkpointed_blocks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, call = network_of("sdxl", request, tmp_path_factory)
    family.network.requires_grad_(False)
    branch = UserAttention(family.network, width=6, tokens=3, size=8)
    moved(branch)
    branch.seat(torch.randn(2, 6, generator=torch.Generator().manual_seed(2)))
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            family.network.train()
            family.network.enable_gradient_checkpointing()
        branch.zero_grad()
        call().square().sum().backward()
        found.append([p.grad.clone() for p in branch.parameters()])
    assert all(value.abs().max() > 0 for value in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


def test_a_file_makes_the_same_branch(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    family, call = network_of("sd3", request, tmp_path_factory)
    plain: nn.Module = copy.deepcopy(family.network)
    branch = UserAttention(family.network, width=6, tokens=3, size=8)
    moved(branch)
    user_branches.save(branch, tmp_path / user_branches.FILE_NAME, {"family": "sd3"})
    who = torch.ones(6)
    with torch.no_grad(), branch.given(who):
        wanted = call()
    branch.remove(family.network)
    assert user_branches.of(family.network) is None
    again = user_branches.load(family.network, tmp_path)
    with torch.no_grad(), again.given(who):
        assert torch.equal(call(), wanted)
    with pytest.raises(ConfigError, match="already"):
        UserAttention(family.network, width=6)
    with pytest.raises(ConfigError, match="width 4; this network was trained for 6"), again.given(torch.ones(4)):
        pass
    other, _ = network_of("sdxl", request, tmp_path_factory)
    with pytest.raises(CheckpointError, match="other layers"):
        user_branches.load(other.network, tmp_path)
    with pytest.raises(CheckpointError, match="no such file"):
        user_branches.load(plain, tmp_path / "nowhere")


# -- who likes what ----------------------------------------------------------------------------------------------------


class Counting(users.Encoder):
    """An encoder whose embedding says which pairs it was shown."""

    width = 3

    def embed(self, shown: Any) -> Tensor:
        return torch.tensor([float(len(shown)), shown[0].liked.mean(), shown[0].other.mean() - 1])


class Pairs:
    """Pairs of three users: six of "a", seven of "b", two of "c"; image 0 is bright, image 1 dark."""

    def __init__(self) -> None:
        owners = ["a"] * 6 + ["b"] * 7 + ["c"] * 2 + [None]
        self.rows = [
            EncodedPair(
                id=f"pair{i}",
                prompt=f"prompt {i}",
                latents=(torch.full((1, 2, 2), 0.9), torch.full((1, 2, 2), 0.1)),
                p=float(i % 2),
                weight=1.0,
                user=owner,
                original_sizes=((8, 8), (8, 8)),
                crops=((0, 0), (0, 0)),
                target_size=(8, 8),
            )
            for i, owner in enumerate(owners)
        ]

    def __len__(self) -> int:
        return len(self.rows)

    def pair(self, index: int) -> EncodedPair:
        return self.rows[index]

    @property
    def owners(self) -> list[Owner]:
        return [Owner(row.id, row.user, row.p, row.prompt) for row in self.rows]


def make_users(**changes: Any) -> users.Users:
    data = Pairs()
    config = replace(UsersConfig(encoder="world_clip", examples=3, min_pairs=5), **changes)
    return users.describe(data, range(len(data)), config, 0, Counting(), lambda latents: latents.expand(-1, 3, -1, -1))  # type: ignore[arg-type]


def test_a_pair_is_never_among_the_examples_of_its_embedding() -> None:
    found = make_users(draws=4)
    assert set(found.found) == {"a", "b"}, "c has too few"
    assert [one.embeddings.shape for one in found.found.values()] == [(4, 3), (4, 3)]
    assert all(len(keys) == 6 for one in found.found.values() for keys in one.examples), "three ids, three prompts"
    for pair in Pairs().rows:
        for visit in range(20):
            row = found.row(pair, visit)
            if not row.any():
                continue
            user = found.found[pair.user or ""]
            shown = [keys for keys, e in zip(user.examples, user.embeddings, strict=True) if torch.equal(e, row)]
            assert any(pair.id not in keys for keys in shown)
    liked = torch.cat([one.embeddings for one in found.found.values()])
    assert ((liked[:, 1] - 0.9).abs().minimum((liked[:, 1] - 0.1).abs()) < 1e-5).all()
    assert torch.allclose(liked[:, 1] + liked[:, 2], torch.zeros(8), atol=1e-5), "the preferred image is the liked one"


def test_rows_depend_on_seed_pair_and_visit_alone() -> None:
    one, other = make_users(dropout=0.4), make_users(dropout=0.4)
    pair = Pairs().rows[0]
    rows = [one.row(pair, visit) for visit in range(50)]
    assert all(torch.equal(row, other.row(pair, visit)) for visit, row in enumerate(rows))
    share = sum(not row.any() for row in rows) / 50
    assert 0.2 < share < 0.6
    assert all(make_users(dropout=0.0).row(pair, visit).any() for visit in range(20))
    assert not make_users().row(Pairs().rows[13], 0).any(), "a user with too few pairs is nobody"


def test_users_are_kept_out_by_id_or_by_share() -> None:
    found = make_users(held_out=("b",))
    assert [one.unseen for one in found.found.values()] == [False, True]
    owners = Pairs().owners
    trained = found.trained(owners)
    assert any(trained)
    assert all(owner.user == "a" for owner, kept in zip(owners, trained, strict=True) if kept)
    names = [str(i) for i in range(2000)]
    assert 0.25 < sum(users.held_out(name, 0.3) for name in names) / 2000 < 0.35
    assert not any(users.held_out(name, 0.0) for name in names)
    with pytest.raises(DataError, match="none of 3 users has 9 pairs"):
        make_users(min_pairs=9)
    with pytest.raises(DataError, match=r"users\.held_out: nobody named"):
        make_users(held_out=("nobody",))


def test_pairs_of_one_prompt_may_show_one_image() -> None:
    """In a session the winner stays on the screen: another pair of the prompt would be known by its image."""
    found = make_users(draws=1)
    pair = Pairs().rows[0]
    (keys,) = found.found["a"].examples
    free = next(row for row in Pairs().rows if row.user == "a" and row.id not in keys)
    assert found.of(free).any()
    shown = next(row for row in Pairs().rows if row.user == "a" and row.id in keys)
    assert not found.of(replace(free, prompt=shown.prompt.upper())).any()
    assert not found.of(shown).any()
    assert pair.user == "a"


def test_files_do_not_name_users(tmp_path: Path) -> None:
    found = make_users()
    found.write(tmp_path / users.USERS_FILE)
    again = users.read_users(tmp_path)
    assert set(again) == {users.hashed("a"), users.hashed("b")}
    assert torch.equal(again[users.hashed("a")], found.found["a"].embeddings)
    assert not {"a", "b"} & set(again)
    with pytest.raises(CheckpointError, match="no such file"):
        users.read_users(tmp_path / "nowhere")


def test_users_are_described_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_config: Any) -> None:
    made: list[int] = []

    def encoder(config: UsersConfig, device: Any) -> Counting:
        made.append(1)
        return Counting()

    class Decoder:
        device = torch.device("cpu")

        def load(self, *parts: str) -> None: ...

        def decode_latents(self, latents: Tensor) -> Tensor:
            return latents.expand(-1, 3, -1, -1)

    monkeypatch.setattr(users, "make_encoder", encoder)
    data, config = Pairs(), UsersConfig(encoder="world_clip", examples=3, min_pairs=5, held_out=("b",))

    run = tiny_config(tmp_path / "run", users=config.__dict__, lora={"rank": 0})

    def described(**changes: Any) -> users.Users:
        own = replace(run, users=replace(run.users, **changes))
        return users.described(data, range(len(data)), own, Decoder(), tmp_path / "users")  # type: ignore[arg-type]

    first, again = described(), described()
    assert made == [1]
    assert first.found.keys() == again.found.keys()
    for name, one in first.found.items():
        other = again.found[name]
        assert torch.equal(one.embeddings, other.embeddings)
        assert (one.examples, one.unseen) == (other.examples, other.unseen)
    described(draws=2)
    assert made == [1, 1], "other settings make others"


def test_somebody_between_two_users() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 4.0])
    assert users.between([one, other], [0.25, 0.75]).tolist() == [0.25, 3.0]
    assert torch.equal(users.between([one, other], [1.0, 0.0]), one)
    with pytest.raises(ConfigError, match="as many"):
        users.between([one], [1.0, 2.0])


def test_clip_sees_who_won(tmp_path: Path) -> None:
    encoder = users.make_encoder(UsersConfig(encoder="world_clip"))
    draw = torch.Generator().manual_seed(0)
    shown = [users.Shown("a", *torch.rand(2, 3, 32, 32, generator=draw)) for _ in range(3)]
    turned = [users.Shown(one.prompt, one.other, one.liked) for one in shown]
    one, other = encoder.embed(shown), encoder.embed(turned)
    assert one.shape == (encoder.width,)
    half = encoder.width // 2
    torch.testing.assert_close(one[half:], -other[half:], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(one[:half], other[:half], atol=1e-2)
    assert one[:half].norm() == pytest.approx(half**0.5, rel=1e-4)
    torch.testing.assert_close(encoder.embed(shown[::-1]), one, rtol=1e-4, atol=1e-4)


def test_a_vision_language_model_sees_who_won(tmp_path: Path) -> None:
    import vlm_support
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vlm_support.save(tmp_path / "vlm", Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, vision)
    config = UsersConfig(encoder=f"vlm:{tmp_path / 'vlm'}", layers=(0, -1))
    encoder = users.make_encoder(config)
    assert encoder.width == 2 * 32
    draw = torch.Generator().manual_seed(0)
    shown = [users.Shown("a", *torch.rand(2, 3, 56, 56, generator=draw)) for _ in range(2)]
    turned = [users.Shown(one.prompt, one.other, one.liked) for one in shown]
    one, other = encoder.embed(shown), encoder.embed(turned)
    assert one.shape == (64,)
    assert torch.equal(encoder.embed(shown), one)
    assert not torch.allclose(one, other, atol=1e-4)
    top = users.make_encoder(replace(config, layers=(-1,))).embed(shown)
    torch.testing.assert_close(top, one[32:])
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        users.make_encoder(replace(config, layers=(2,)))
    with pytest.raises(ConfigError, match="cannot be loaded"):
        users.make_encoder(replace(config, encoder=f"vlm:{tmp_path / 'nowhere'}"))


# -- runs --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs of "ann", who likes bright pictures, "bob", who likes dark ones, and "eve", who likes bright ones, too."""
    import numpy as np
    from PIL import Image

    folder = tmp_path_factory.mktemp("people")
    rng, lines = np.random.default_rng(0), []
    for i in range(30):
        user = ("ann", "bob", "eve")[i % 3]
        pictures = [rng.integers(low, low + 60, (32, 32, 3), dtype=np.uint8) for low in (20, 180)]
        bright, dark = (f"{i}-bright.png", f"{i}-dark.png")
        for name, picture in zip((dark, bright), pictures, strict=True):
            Image.fromarray(picture).save(folder / name)
        chosen, rejected = (dark, bright) if user == "bob" else (bright, dark)
        row = {"prompt": f"a picture of thing {i}", "chosen": chosen, "rejected": rejected, "user": user}
        lines.append(json.dumps(row))
    (folder / "train.jsonl").write_text("\n".join(lines))
    return folder


@pytest.fixture
def personal(tmp_path: Path, tiny_config: Any, people: Path) -> Any:
    """Runs on pairs of three people."""

    def make(name: str, **changes: Any) -> Any:
        section = {"encoder": "world_clip", "examples": 2, "min_pairs": 3, "draws": 3, "tokens": 2, "token_size": 8}
        return tiny_config(
            tmp_path / name,
            data={"format": "jsonl", "sources": [str(people / "train.jsonl")]},
            users=section | changes.pop("users", {}),
            lora={"rank": 0} | changes.pop("lora", {}),
            **changes,
        )

    return make


def test_a_run_trains_the_branch_alone(personal: Any) -> None:
    looks = {"prompts": ["a red circle", "a blue square"], "num_prompts": 2, "held_out_fraction": 0.3}
    steps = {"max_train_steps": 60, "train_batch_size": 6, "learning_rate": 1e-2}
    made = train(personal("run", evaluation=looks, training=steps, users={"held_out": ["eve"], "dropout": 0.0}))
    folder = made.run_dir
    assert not (folder / "pytorch_lora_weights.safetensors").exists()
    tensors = last(folder)
    assert all(name.startswith("user_branch.") for name in tensors)
    assert any(value.abs().max() > 0 for name, value in tensors.items() if "to_v" in name)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    result = json.loads((folder / "result.json").read_text())["users"]
    assert result["seen"]["own"]["accuracy"] > 0.8, "opposite tastes, told apart by who asks"
    assert result["seen"]["other"]["accuracy"] < 0.5, "the next user wants something else"
    assert set(result["seen"]["users"]) == {users.hashed("ann"), users.hashed("bob")}
    assert set(result["unseen"]["users"]) == {users.hashed("eve")}
    assert result["unseen"]["own"]["accuracy"] > 0.8, "eve is like ann, and was never trained on"
    assert set(users.read_users(folder)) == {users.hashed(name) for name in ("ann", "bob", "eve")}
    assert "ann" not in (folder / "metrics.jsonl").read_text()
    card = (folder / "README.md").read_text()
    assert "user_branches.load(pipe.unet" in card
    compile(card.partition("```python\n")[2].partition("```")[0], "snippet", "exec")


def test_a_run_of_gates_leaves_both_files(personal: Any) -> None:
    steps = {"max_train_steps": 40, "train_batch_size": 6, "learning_rate": 3e-3}
    looks = {"prompts": ["a red circle"], "num_prompts": 1, "held_out_fraction": 0.3}
    more = {"through": "gates", "dropout": 0.0, "tokens": 8, "token_size": 256}
    config = personal("run", users=more, lora={"rank": 4, "targets": "all"}, evaluation=looks, training=steps)
    folder = train(config).run_dir
    result = json.loads((folder / "result.json").read_text())["users"]
    assert result["seen"]["own"]["accuracy"] > result["seen"]["other"]["accuracy"] + 0.3
    assert any(key.startswith("user_branch.") for key in last(folder))
    tensors = export.read_file(folder / export.FILE_NAME, tensors=True)[0]
    assert not any("user_branch" in key for key in tensors), "the LoRA's file is one that everybody can read"

    family: Any = load_family(config.model)
    family.load(NETWORK)
    branch = user_branches.load(family.network, folder)
    assert isinstance(branch, UserGates)
    assert torch.equal(branch.gates[0].weight, last(folder)["user_branch.gates.0.weight"])
    with pytest.raises(ConfigError, match="already"):
        UserGates(family.network, width=branch.width)


def last(folder: Path) -> dict[str, Tensor]:
    """The adapter of the last checkpoint."""
    from safetensors.torch import load_file

    return load_file(list(checkpoint.steps_of(folder).values())[-1] / "adapter.safetensors")


def test_a_personal_run_resumes_to_the_same_branch(personal: Any) -> None:
    steps = {"max_train_steps": 4, "checkpointing_steps": 2}
    whole = train(personal("whole", training=steps))
    train(personal("cut", training=steps | {"max_train_steps": 2}))
    ended = train(personal("cut", training=steps | {"resume_from_checkpoint": "latest"}))
    one, other = last(whole.run_dir), last(ended.run_dir)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_prompts_of_a_grid_are_of_users(personal: Any, tmp_path: Path) -> None:
    config = personal("x")
    family: Any = load_family(config.model)
    sampler = Sampler(family, ["a red circle", "a red circle"], config.sampling, 32)
    family.load(NETWORK)
    branch = UserAttention(family.network, width=4, tokens=2, size=8)
    moved(branch)
    base = sampler.images([0, 1], seed=0, adapters=False)
    sampler.users = torch.stack([torch.zeros(4), torch.ones(4)])
    found = sampler.images([0, 1], seed=0)
    assert torch.equal(found[0], base[0])
    assert not torch.equal(found[1], base[1])
    assert torch.equal(sampler.images([1], seed=0)[0], found[1])
    assert torch.equal(sampler.images([0, 1], seed=0, adapters=False), base)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora": {"rank": 4}}, "set it to 0, or users.through to gates"),
        ({"users": {"through": "gates", "tokens": 8, "token_size": 256}}, "lora.rank is 0"),
        ({"users": {"through": "gates"}, "lora": {"rank": 4}}, "through 'gates' there are no tokens"),
        ({"users": {"encoder": "nothing"}}, "expected one of world_clip"),
        ({"users": {"encoder": None}, "lora": {"rank": 2}}, "set users.encoder"),
        ({"users": {"layers": [3]}}, "only 'vlm' encoders"),
        ({"negative": {"train": "flip"}}, "negative.train: got 'flip'"),
        (
            {"rollout": {"rewards": ["jpeg_compressibility"], "samples_per_prompt": 2}},
            "sampled images here, which are nobody's",
        ),
    ],
)
def test_what_does_not_go_with_users_is_refused(personal: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(personal("x", **changes))


def test_unreadable_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="more than examples"):
        UsersConfig(examples=5, min_pairs=5)
    with pytest.raises(ValueError, match="tokens is 0"):
        UsersConfig(tokens=0)
    with pytest.raises(ValueError, match="dropout is 1"):
        UsersConfig(dropout=1.0)


def test_pictures_of_people_are_asked_for_by_id(
    personal: Any, capsys: pytest.CaptureFixture[str], own_logging: None
) -> None:
    from diffalign import cli

    steps = {"max_train_steps": 40, "train_batch_size": 6, "learning_rate": 1e-2}
    looks = {"prompts": ["a red circle"], "num_prompts": 1}
    folder = train(personal("run", training=steps, users={"dropout": 0.0}, evaluation=looks)).run_dir
    out = folder / "pictures"
    words = ["generate", str(folder), "--base", "--out", str(out), "--user"]
    assert cli.main([*words, "ann", "--user", "bob", "--user", users.hashed("ann")]) == 0
    rows = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    base, ann, bob, again = (row["file"] for row in rows)
    assert [row.get("user") for row in rows] == [None, *(users.hashed(name) for name in ("ann", "bob", "ann"))]
    assert ann == again, "files hold hashed ids"
    seen = {name: (out / name).read_bytes() for name in (base, ann, bob)}
    assert len(set(seen.values())) == 3
    judged = ["evaluate", str(folder), "evaluation.rewards=[jpeg_compressibility]", "--user", "bob"]
    assert cli.main([*judged, "--out", str(out / "e.json")]) == 0
    assert json.loads((out / "e.json").read_text())["user"] == users.hashed("bob")
    assert cli.main([*words, "zoe"]) == 2
    assert "'zoe' is none of the 3 people" in capsys.readouterr().err
    assert cli.main(words[:-1]) == 2
    assert "give --user ID" in capsys.readouterr().err
    assert cli.main([*words, "ann", "--preference", "1,0"]) == 2
    assert "was not trained on preferences" in capsys.readouterr().err


@pytest.mark.parametrize("through", ["attention", "gates", "time"])
def test_plans_count_the_branch(through: Any) -> None:
    from diffalign.config_loading import load_config
    from diffalign.plan import make_plan
    from diffalign.plan_text import render

    rank = 0 if through == "attention" else 16
    config = load_config("demo_ppd", [f"users.through={through}", f"lora.rank={rank}"])
    plan = make_plan(config)
    family: Any = load_family(config.model)
    family.load(NETWORK)
    width = users.make_encoder(config.users).width
    more = 0
    if rank:
        adapters.attach(family.network, config.lora)
        more = adapters.count(family.network, "default")[1]
    branch = user_branches.Kind(
        through, width, config.users.tokens, config.users.token_size, user_branches.HIDDEN if through == "time" else 0
    ).attach(family.network)
    assert plan.network.lora_parameters == more + sum(p.numel() for p in branch.parameters())
    assert plan.network.lora_modules == (adapters.count(family.network, "default")[0] if rank else len(branch.paths))
    assert ("weighed by users" if rank else "attentions to users (world_clip)") in render(plan)


@pytest.mark.parametrize("name", ["sdxl_ppd_pickapic", "demo_ppd"])
def test_recipes_pass_what_is_checked_before_weights_load(name: str, tmp_path: Path) -> None:
    from diffalign.config_loading import load_config

    check(load_config(name, [f"output_dir={tmp_path}"]))
