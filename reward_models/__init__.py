"""Reward models, one self-contained file each, found by file name. The contract is `diffalign.rewards.Reward`."""
