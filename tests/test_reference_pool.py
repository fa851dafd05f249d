"""A pool of earlier checkpoints as the reference (SePPO)."""

import torch

from diffalign import adapters
from diffalign.config import LoraConfig, ModelConfig, ReferenceConfig
from diffalign.families import NETWORK, load_family
from diffalign.references import Reference


def network_and(tiny_folder):
    family = load_family(ModelConfig(family="sdxl", pretrained=str(tiny_folder)))
    family.load(NETWORK)
    return family.network, adapters.attach(family.network, LoraConfig(rank=2, targets="attention"), seed=0)


def walk(reference, params, steps, every=2):
    """Fill every parameter with the step's number after each step; which checkpoint is the reference after it."""
    seen = []
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in params:
                p.fill_(float(step))
        reference.after_step(step)
        ((weight, weights),) = reference.parts()
        assert weight == 1.0
        seen.append(None if weights is None else float(weights[0].flatten()[0]))
    return seen


def test_one_of_the_base_and_all_earlier_copies_is_drawn_and_never_the_policy_itself(tiny_folder):
    network, params = network_and(tiny_folder)
    seen = walk(Reference(ReferenceConfig(scheme="pool", every=2), network, params, seed=1), params, 60)
    assert seen[:2] == [None, None]
    for step, drawn in enumerate(seen, start=1):
        assert drawn is None or (drawn % 2 == 0 and drawn <= step - step % 2 - 2)
    assert seen[0::2][1:] == seen[1::2][:-1]  # it changes after every second step only
    assert len(set(seen)) > 8
    again = walk(Reference(ReferenceConfig(scheme="pool", every=2), network, params, seed=1), params, 60)
    other = walk(Reference(ReferenceConfig(scheme="pool", every=2), network, params, seed=2), params, 60)
    assert seen == again != other


def test_a_pool_survives_a_checkpoint(tiny_folder):
    network, params = network_and(tiny_folder)
    config = ReferenceConfig(scheme="pool", every=2)
    whole = Reference(config, network, params, seed=1)
    seen = walk(whole, params, 20)
    part = Reference(config, network, params, seed=1)
    walk(part, params, 10)
    resumed = Reference(config, network, params, seed=1)
    resumed.load_state_dict(part.state_dict())
    tail = []
    for step in range(11, 21):
        with torch.no_grad():
            for p in params:
                p.fill_(float(step))
        resumed.after_step(step)
        weights = resumed.parts()[0][1]
        tail.append(None if weights is None else float(weights[0].flatten()[0]))
    assert tail == seen[10:]
