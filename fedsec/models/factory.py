"""A user's own network, or one of torchvision's: `package.module:factory`. Names code that the user chose to run."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from fedsec.errors import ConfigError
from fedsec.models.base import Backbone, InputSize, Normalised


class Foreign(Backbone):
    """Any network that takes images and gives logits; grey images are repeated where it wants three channels."""

    def __init__(self, net: nn.Module, channels: int, image_size: int) -> None:
        super().__init__()
        self.net = net
        self.input = InputSize(channels, image_size, exact=True)
        first = next((m for m in net.modules() if isinstance(m, nn.Conv2d)), None)
        self.repeats = first.in_channels // channels if first is not None else 1
        linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise ConfigError(f"{type(net).__name__} has no fully connected layer that makes the logits")
        self._last = [linear[-1]]  # in a list: a second name for its weights would spoil the state dict
        self.embed_dim = linear[-1].in_features

    def embed(self, x: Tensor) -> Tensor:
        """What enters the last fully connected layer."""
        seen: list[Tensor] = []
        hook = self._last[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.forward(x)
        finally:
            hook.remove()
        return seen[-1].flatten(1)

    def head(self, features: Tensor) -> Tensor:
        """The last fully connected layer."""
        return self._last[0](features)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Logits of normalised images."""
        return self.net(x.repeat(1, self.repeats, 1, 1) if self.repeats > 1 else x)  # type: ignore[no-any-return]


def from_factory(name: str, num_classes: int, in_channels: int, image_size: int, seed: int) -> Normalised:
    """Import a factory, give it those of our arguments that it takes, and wrap the result.

    Raises:
        ConfigError: no such module or function, or it did not return a network.
    """
    module, _, function = name.partition(":")
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--model {name}: cannot be imported: {error}; write package.module:factory") from None
    offered: dict[str, Any] = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    taken = inspect.signature(factory).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
    arguments = {k: v for k, v in offered.items() if k in taken or (open_ended and k == "num_classes")}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        net = factory(**arguments)
    if isinstance(net, Normalised):
        return net
    if not isinstance(net, nn.Module):
        raise ConfigError(f"--model {name}: gave a {type(net).__name__}, not a torch network")
    return Normalised(net if isinstance(net, Backbone) else Foreign(net, in_channels, image_size))
