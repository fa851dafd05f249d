"""The loss core on its own: a policy over four answers, trained in a plain torch loop. Needs torch only, takes a second.

python examples/loss_core.py

Someone prefers answer 3 to 2 to 1 to 0. DPO and IPO see pairs of answers, GRPO samples eight answers per step and sees their
rewards. The policy is a softmax over four logits, so what it has learnt can be read off as probabilities.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign import losses

REWARD = torch.tensor([0.0, 0.3, 0.6, 1.0])  # of each answer
REFERENCE = torch.full((4,), 0.25).log()  # the policy before training
STEPS = 200


def from_pairs(objective: losses.Objective, generator: torch.Generator) -> Tensor:
    """Train on judged pairs of answers that the reference wrote; returns the probabilities of the four answers."""
    objective.check(losses.Kind.TOKEN)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(STEPS):
        a, b = torch.randint(4, (2, 32), generator=generator)
        # The better one wins with the probability of a Bradley-Terry judge.
        a_wins = torch.rand(32, generator=generator) < (4 * (REWARD[a] - REWARD[b])).sigmoid()
        answers = torch.cat([torch.where(a_wins, a, b), torch.where(a_wins, b, a)])  # chosen rows first
        scores = losses.Scores.tokens(logits.log_softmax(0)[answers], REFERENCE[answers])
        optimizer.zero_grad()
        objective(scores, losses.Pairs.halves(32)).loss.backward()
        optimizer.step()
    return logits.detach().softmax(0)


def from_samples(objective: losses.Objective, generator: torch.Generator) -> Tensor:
    """Train on the policy's own answers and their rewards."""
    objective.check(losses.Kind.TOKEN)
    logits = torch.zeros(4, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    one_token = torch.ones(8, 1, dtype=torch.bool)
    for _ in range(STEPS):
        answers = torch.multinomial(logits.detach().softmax(0), 8, replacement=True, generator=generator)
        groups = losses.Groups(index=torch.arange(8), group=torch.zeros(8, dtype=torch.long), reward=REWARD[answers])
        scores = losses.Scores.tokens(
            logits.log_softmax(0)[answers][:, None], REFERENCE[answers][:, None], mask=one_token
        )
        optimizer.zero_grad()
        objective(scores, groups).loss.backward()
        optimizer.step()
    return logits.detach().softmax(0)


def main() -> None:
    """Print the probabilities of the four answers, worst to best."""
    rows = {
        "before": REFERENCE.exp(),
        "DPO": from_pairs(losses.DPO(beta=1.0), torch.Generator().manual_seed(0)),
        "IPO": from_pairs(losses.IPO(beta=1.0, reduction="sum"), torch.Generator().manual_seed(0)),
        "GRPO": from_samples(losses.GRPO(beta=0.0), torch.Generator().manual_seed(0)),
        "GRPO, held": from_samples(losses.GRPO(beta=1.0), torch.Generator().manual_seed(0)),
    }
    for name, probabilities in rows.items():
        print(f"{name:<11}", " ".join(f"{p:.3f}" for p in probabilities.tolist()))


if __name__ == "__main__":
    main()
