"""A user's own network, as `--model tests.audit.networks:mlp` names it."""

from __future__ import annotations

from torch import nn

NAME = "tests.audit.networks:mlp"


def mlp(num_classes: int) -> nn.Module:
    """Memorises a few hundred images in seconds. Without ReLU: at rates that memorise, all of its units die."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 256), nn.Tanh(), nn.Linear(256, num_classes))


def small(num_classes: int) -> nn.Module:
    """So few weights that random directions in all of them are cheap."""
    return nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(49, 32), nn.Tanh(), nn.Linear(32, num_classes))
