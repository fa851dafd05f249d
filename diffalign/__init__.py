"""Preference alignment for diffusion models; the loss core in `diffalign.losses` stands on its own."""

__version__ = "0.1.0.dev0"
