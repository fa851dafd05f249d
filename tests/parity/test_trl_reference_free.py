"""TRL's experimental CPO (with SimPO and AlphaPO), ORPO and TPO trainers, from logits to loss."""

from types import MethodType, SimpleNamespace

import pytest
import torch
from torch.nn.functional import softplus
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.experimental.orpo.orpo_trainer import log1mexp as trl_log1mexp
from trl.experimental.tpo.tpo_trainer import TPOTrainer
from trl_stubs import DTYPES, PROMPT, TOLERANCE, Model, assert_parity, ragged_mask, trainer

from diffalign import losses
from diffalign.losses import Items, Layout, Pairs, Scores, links
from diffalign.losses.transforms import log1mexp

PAIRS, LONGEST, VOCABULARY = 3, 6, 11


class Batch:
    """Logits of chosen, rejected and gold responses after prompts of two tokens."""

    def __init__(self, seed, dtype, branches=2):
        g = torch.Generator().manual_seed(seed)
        rows, width = branches * PAIRS, PROMPT + LONGEST
        self.mask = ragged_mask(rows, LONGEST, seed)
        self.ids = torch.randint(0, VOCABULARY, (rows, width), generator=g)
        self.logits = torch.randn(rows, width, VOCABULARY, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
        self.attention = torch.cat([torch.ones(rows, PROMPT, dtype=torch.bool), self.mask], 1)

    def halves(self):
        """As the data collator of CPO and ORPO gives it."""
        labels = self.ids.masked_fill(~self.attention, -100).clone()
        labels[:, :PROMPT] = -100
        batch = {}
        for name, rows in (("chosen", slice(0, PAIRS)), ("rejected", slice(PAIRS, 2 * PAIRS))):
            batch[f"{name}_input_ids"] = self.ids[rows]
            batch[f"{name}_attention_mask"] = self.attention[rows].long()
            batch[f"{name}_labels"] = labels[rows]
        return batch

    def trl(self, cls, **settings):
        """TRL's loss of CPO or ORPO."""
        stub = trainer(pad_token_id=0, padding_value=0, **settings)
        for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss"):
            if name in vars(cls):
                setattr(stub, name, MethodType(vars(cls)[name], stub))
        stub.concatenated_inputs, stub.get_batch_logps = cls.concatenated_inputs, cls.get_batch_logps
        return cls.get_batch_loss_metrics(stub, Model(logits=self.logits), self.halves())[0]

    def cpo(self, loss_type, *, beta, alpha=0.0, gamma=0.5, cpo_alpha=0.0, smoothing=0.0):
        return self.trl(
            CPOTrainer,
            loss_type=loss_type,
            beta=beta,
            alpha=alpha,
            simpo_gamma=gamma,
            cpo_alpha=cpo_alpha,
            label_smoothing=smoothing,
        )

    def scores(self):
        """Ours: log-probabilities of every token after the first, prompt and response apart."""
        logp = self.logits[:, :-1].log_softmax(-1).gather(2, self.ids[:, 1:, None])[..., 0]
        prompt = -logp[:, : PROMPT - 1].sum(1)
        length = torch.full((len(prompt),), PROMPT - 1)
        return Scores.tokens(logp[:, PROMPT - 1 :], mask=self.mask, prompt_imitation=prompt, prompt_length=length)

    def ours(self, name, layout=None, **settings):
        return losses.find(name)(**settings)(self.scores(), layout or Pairs.halves(PAIRS)).loss

    def agree(self, theirs, name, *, layout=None, rtol=1e-5, **settings):
        assert_parity(theirs, self.ours(name, layout, **settings), self.logits, rtol)


# -- CPO, SLiC, SimPO, AlphaPO -----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cpo(smoothing, dtype):
    batch = Batch(0, dtype)
    trl = batch.cpo("sigmoid", beta=0.1, cpo_alpha=1.0, smoothing=smoothing)
    batch.agree(trl, "cpo", beta=0.1, label_smoothing=smoothing, rtol=TOLERANCE[dtype])


@DTYPES
def test_hinge_without_reference_is_slic(dtype):
    batch = Batch(1, dtype)
    trl = batch.cpo("hinge", beta=0.3, cpo_alpha=0.1)
    batch.agree(trl, "slic", beta=0.3, margin=1.0, imitation_weight=0.1, rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize(("imitation", "smoothing"), [(0.0, 0.0), (0.0, 0.1), (0.5, 0.0)])
def test_simpo(imitation, smoothing, dtype):
    batch = Batch(2, dtype)
    trl = batch.cpo("simpo", beta=2.0, gamma=1.0, cpo_alpha=imitation, smoothing=smoothing)
    ours = {"gamma_beta_ratio": 0.5, "imitation_weight": imitation, "label_smoothing": smoothing}
    batch.agree(trl, "simpo", beta=2.0, **ours, rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("alpha", [0.25, -0.5])
def test_alphapo(alpha, dtype):
    batch = Batch(3, dtype)
    trl = batch.cpo("simpo", beta=2.5, alpha=alpha, gamma=0.1)
    batch.agree(trl, "alphapo", beta=2.5, alpha=alpha, gamma=0.1, rtol=TOLERANCE[dtype])


@DTYPES
def test_square_link_without_reference(dtype):
    """TRL's `ipo` in this trainer: mean log-probabilities of the policy alone. Not a named objective of ours."""
    batch = Batch(4, dtype)
    scores = batch.scores()
    mean = scores.theta / scores.length
    ours = links.square(0.1 * (mean[:PAIRS] - mean[PAIRS:]), beta=0.1).mean()
    assert_parity(batch.cpo("ipo", beta=0.1), ours, batch.logits, TOLERANCE[dtype])


def test_trl_defaults_are_not_simpo():
    """beta 0.1, gamma 0.5 and an imitation term: a target of 5 nats per token."""
    batch = Batch(5, torch.float32)
    trl = batch.cpo("simpo", beta=0.1, gamma=0.5, cpo_alpha=1.0)
    batch.agree(trl, "simpo", beta=0.1, gamma_beta_ratio=5.0, imitation_weight=1.0)


# -- ORPO --------------------------------------------------------------------------------------------------------------


def test_orpo():
    """TRL computes the odds in float32 whatever comes in."""
    batch = Batch(6, torch.float32)
    batch.agree(batch.trl(ORPOTrainer, beta=0.1), "orpo", odds_weight=0.1)
    batch.agree(batch.trl(ORPOTrainer, beta=1.0), "orpo", odds_weight=1.0)


def test_trl_orpo_imitates_the_prompt_too():
    """Against the formula: cross-entropy over prompt and response of the chosen rows, minus the odds term."""
    batch = Batch(7, torch.float32)
    logp = batch.logits[:, :-1].log_softmax(-1).gather(2, batch.ids[:, 1:, None])[..., 0]
    mean = (logp[:, PROMPT - 1 :] * batch.mask).sum(1) / batch.mask.sum(1)
    odds = mean - (1 - mean.exp()).log()
    both = batch.attention[:PAIRS, 1:]
    expected = -logp[:PAIRS][both].mean() + 0.1 * softplus(odds[PAIRS:] - odds[:PAIRS]).mean()
    torch.testing.assert_close(batch.ours("orpo"), expected)
    torch.testing.assert_close(batch.trl(ORPOTrainer, beta=0.1), expected)
    assert batch.ours("orpo", imitate_prompt=False).item() != pytest.approx(expected.item(), rel=1e-3)


def test_trl_orpo_gradient_is_nan_where_a_probability_rounds_to_one():
    """Its log1mexp selects after computing both branches; ours gives each branch an argument that is safe for it."""
    x = torch.zeros(2, requires_grad=True)
    assert torch.isnan(torch.autograd.grad(trl_log1mexp(x).sum(), x)[0]).all()
    assert torch.isfinite(torch.autograd.grad(log1mexp(x).sum(), x)[0]).all()
    stub = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    stub.odds_ratio_loss = MethodType(ORPOTrainer.odds_ratio_loss, stub)
    certain = torch.tensor([0.0, -1.0], requires_grad=True)
    trl = stub.odds_ratio_loss(certain[:1], certain[1:])[0].mean()
    assert torch.isnan(torch.autograd.grad(trl, certain)[0]).any()
    scores = Scores.tokens(certain, length=torch.ones(2))
    ours = losses.find("orpo")(imitate_prompt=False)(scores, Pairs.halves(1)).loss
    assert torch.isfinite(torch.autograd.grad(ours, certain)[0]).all()


# -- TPO ---------------------------------------------------------------------------------------------------------------


def tpo(batch, loss_type, *, beta, alpha=1.0, gamma=0.5, smoothing=0.0):
    stub = trainer(loss_type=loss_type, beta=beta, tpo_alpha=alpha, tpo_l_gamma=gamma, label_smoothing=smoothing)
    rows = slice(None) if alpha else slice(0, 2 * PAIRS)
    completion = batch.attention.clone()
    completion[:, :PROMPT] = False
    inputs = {
        "input_ids": batch.ids[rows],
        "attention_mask": batch.attention[rows].long(),
        "completion_mask": completion[rows].long(),
    }
    return TPOTrainer._compute_loss(stub, Model(logits=batch.logits[rows]), inputs, False)


GOLD = Layout(pairs=Pairs.halves(PAIRS), items=Items(index=torch.arange(2 * PAIRS, 3 * PAIRS)))


@DTYPES
@pytest.mark.parametrize(("alpha", "smoothing"), [(1.0, 0.0), (0.3, 0.1), (0.0, 0.0)])
def test_tpo(alpha, smoothing, dtype):
    batch = Batch(8, dtype, branches=3)
    trl = tpo(batch, "sigmoid", beta=0.1, alpha=alpha, smoothing=smoothing)
    ours = {"imitation_weight": alpha, "label_smoothing": smoothing}
    batch.agree(trl, "tpo", beta=0.1, layout=GOLD, **ours, rtol=TOLERANCE[dtype])


@DTYPES
@pytest.mark.parametrize("loss_type", ["hinge", "ipo"])
def test_other_links_of_tpo(loss_type, dtype):
    """Hinge on sums is `slic` without imitation; the square link on means is no named objective of ours."""
    batch = Batch(10, dtype, branches=3)
    trl = tpo(batch, loss_type, beta=0.3, alpha=0.0)
    if loss_type == "hinge":
        batch.agree(trl, "slic", beta=0.3, imitation_weight=0.0, rtol=TOLERANCE[dtype])
        return
    scores = batch.scores()
    mean = scores.theta / scores.length
    ours = links.square(0.3 * (mean[:PAIRS] - mean[PAIRS : 2 * PAIRS]), beta=0.3).mean()
    assert_parity(trl, ours, batch.logits, TOLERANCE[dtype])


@DTYPES
def test_tpo_length_normalised(dtype):
    batch = Batch(9, dtype, branches=3)
    trl = tpo(batch, "tpo-l", beta=2.0, gamma=0.5)
    batch.agree(trl, "tpo_l", beta=2.0, gamma=0.5, layout=GOLD, rtol=TOLERANCE[dtype])
