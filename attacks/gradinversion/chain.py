"""Which chain of layers leads from the image to the first fully connected layer, and how is each of them undone?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .candidate import NotApplicable
from .conv_solve import Geometry
from .trace import Call, Trace

PASS_THROUGH = frozenset({"flatten", "reshape", "view", "dropout", "contiguous", "unsqueeze", "squeeze", "to", "float"})


@dataclass(frozen=True)
class Inverse:
    """An element-wise activation, backwards: from its output h."""

    preactivation: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    """σ′ as a function of h."""
    low: float = -float("inf")
    high: float = float("inf")
    invertible: Callable[[Tensor], Tensor] = torch.ones_like
    """1 where h determines z, else 0."""


def inverse_of(call: Call) -> Inverse | None:
    """How to undo this call, if it is a known activation."""
    edge = 1e-9
    if call.name == "sigmoid":
        return Inverse(torch.logit, lambda h: h * (1 - h), edge, 1 - edge)
    if call.name == "tanh":
        return Inverse(torch.atanh, lambda h: 1 - h * h, -1 + edge, 1 - edge)
    if call.name == "softplus" and call.argument(1, "beta", 1) == 1:
        return Inverse(lambda h: h + torch.log(-torch.expm1(-h)), lambda h: -torch.expm1(-h), edge)
    if call.name == "leaky_relu":
        leak = float(call.argument(1, "negative_slope", 0.01))
        return Inverse(lambda h: torch.where(h > 0, h, h / leak), lambda h: torch.where(h > 0, 1.0, leak).to(h))
    if call.name == "relu":
        return Inverse(lambda h: h, lambda h: (h > 0).to(h), 0.0, invertible=lambda h: (h > 0).to(h))
    return None


@dataclass(frozen=True)
class ConvLayer:
    """One convolution of the chain, with the affine map of an evaluated BatchNorm and the activation after it."""

    weight: str
    bias: str | None
    geometry: Geometry
    activation: Inverse
    activation_name: str
    gain: Tensor | float = 1.0
    shift: Tensor | float = 0.0


@dataclass(frozen=True)
class Chain:
    """What the cascade can walk: image -> affine map of pixels -> convolutions -> one fully connected layer."""

    layers: tuple[ConvLayer, ...]
    weight: str
    bias: str
    pixel_gain: Tensor
    pixel_shift: Tensor
    """Input of the first layer = gain·pixel + shift, each (C, H, W)."""
    broken_at: str | None = None
    """Why the walk from the fully connected layer stops before the image."""


def find_chain(recorded: Trace, observed: frozenset[str]) -> Chain:
    """The chain up to the fully connected layer nearest to the image whose weight and bias gradients are observed.

    Raises:
        NotApplicable: no such layer.
    """
    linear = [i for i in recorded.find("linear") if _names(recorded, recorded.calls[i]) <= observed]
    if not linear:
        raise NotApplicable("no fully connected layer with bias whose whole gradient is observed")
    head = recorded.calls[linear[0]]
    weight, bias = recorded.name_of(head.args[1]), recorded.name_of(head.argument(2, "bias"))
    assert weight is not None and bias is not None
    first = min(recorded.find("conv2d", "linear"))
    broken, layers = None, []
    try:
        stop = recorded.chain_break(linear[0] + 1)
        if stop is not None:
            raise NotApplicable(f"operation {stop} ({recorded.calls[stop].name}) joins several branches")
        layers = _layers(recorded, first, linear[0], observed)
        gain, shift = _pixel_map(recorded, first)
    except NotApplicable as reason:
        broken = str(reason)
        gain = shift = torch.zeros(())
    return Chain(tuple(layers), weight, bias, gain, shift, broken)


def _names(recorded: Trace, call: Call) -> set[str]:
    """Weight and bias of a call; the empty name, which nobody observes, stands for a missing one."""
    return {recorded.name_of(call.args[1]) or "", recorded.name_of(call.argument(2, "bias")) or ""}


def _pixel_map(recorded: Trace, first: int) -> tuple[Tensor, Tensor]:
    """Gain and shift of the calls before the first layer, read off by running them on constant images."""
    image = recorded.image

    def prefix(pixels: Tensor) -> Tensor:
        out = pixels
        for call in recorded.calls[:first]:
            function = getattr(torch, call.name, None) or getattr(Tensor, call.name)
            out = function(*[out if a is call.source else a for a in call.args], **call.kwargs)
        return out

    for call in recorded.calls[:first]:
        if call.name not in PASS_THROUGH | {"sub", "div", "mul", "add", "true_divide", "rsub", "subtract", "divide"}:
            raise NotApplicable(f"not applicable at layer 1: {call.name} stands before it")
    shift = prefix(torch.zeros_like(image))
    gain = prefix(torch.ones_like(image)) - shift
    return gain.reshape(image.shape[1:]).double(), shift.reshape(image.shape[1:]).double()


def _layers(recorded: Trace, first: int, stop: int, observed: frozenset[str]) -> list[ConvLayer]:
    layers: list[ConvLayer] = []
    calls = [c for c in recorded.calls[first:stop] if c.name not in PASS_THROUGH]
    while calls:
        conv = calls.pop(0)
        where = f"not applicable at layer {len(layers) + 1}"
        if conv.name != "conv2d":
            raise NotApplicable(f"{where}: {_why_not(conv)}")
        weight, bias = recorded.name_of(conv.args[1]), recorded.name_of(conv.argument(2, "bias"))
        if weight is None or weight not in observed:
            raise NotApplicable(f"{where}: the gradient of its weight is not observed")
        if conv.argument(6, "groups", 1) != 1:
            raise NotApplicable(f"{where}: grouped convolutions are not implemented")
        gain: Tensor | float = 1.0
        shift: Tensor | float = 0.0
        if calls and calls[0].name == "batch_norm":
            gain, shift = batch_norm_map(calls.pop(0), where)
        activation = inverse_of(calls[0]) if calls else None
        if activation is None:
            raise NotApplicable(f"{where}: {_why_not(calls[0]) if calls else 'no activation follows it'}")
        name = calls.pop(0).name
        geometry = geometry_of(conv, where)
        layers.append(ConvLayer(weight, bias if bias in observed else None, geometry, activation, name, gain, shift))
    return layers


def _why_not(call: Call) -> str:
    assert call.source is not None
    inside, outside = call.source[0].numel(), _numel(call.output)
    if outside < inside:
        return f"{call.name} keeps {outside} of {inside} numbers"
    return f"{call.name} has no inverse that is known here"


def _numel(output: Tensor | tuple[Tensor, ...]) -> int:
    return (output if isinstance(output, Tensor) else output[0])[0].numel()


def geometry_of(call: Call, where: str) -> Geometry:
    """The shapes of a recorded convolution; `where` names it if they cannot be handled."""
    source, weight = call.source, call.args[1]
    assert source is not None
    padding = call.argument(4, "padding", 0)
    if isinstance(padding, str):
        raise NotApplicable(f"{where}: padding given as a word")
    stride, dilation = call.argument(3, "stride", 1), call.argument(5, "dilation", 1)
    shape = tuple(source.shape[1:])
    out = tuple(call.output.shape[1:])
    return Geometry(shape, out, tuple(weight.shape[2:]), _pair(stride), _pair(padding), _pair(dilation))  # type: ignore[arg-type]


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def batch_norm_map(call: Call, where: str) -> tuple[Tensor, Tensor]:
    """Gain and shift (O, 1) of a recorded BatchNorm in evaluation mode; `where` names it if it is in train mode."""
    if call.argument(5, "training", False):
        raise NotApplicable(f"{where}: BatchNorm in train mode makes δ depend on unknown moments")
    mean, var = call.argument(1, "running_mean").double(), call.argument(2, "running_var").double()
    weight, bias = call.argument(3, "weight"), call.argument(4, "bias")
    gain = (var + float(call.argument(7, "eps", 1e-5))).rsqrt() * (1.0 if weight is None else weight.double())
    shift = (0.0 if bias is None else bias.double()) - mean * gain
    return gain[:, None], shift[:, None]
