"""Which convolutions stand in front of the fully connected layer, each with its activation and pooling, last one first?

Unlike `chain`, which needs every operation from the image on to be invertible, this walk starts at the head and is
content with what it gets.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .candidate import NotApplicable
from .chain import PASS_THROUGH, Inverse, batch_norm_map, geometry_of, inverse_of
from .conv_solve import Geometry
from .trace import Call, Trace


@dataclass(frozen=True)
class Block:
    """A convolution with what follows it up to the next one."""

    weight: str
    bias: str | None
    geometry: Geometry
    activation: Inverse
    windows: Tensor
    """(M, K) positions that are pooled into one number; K = 1 without pooling."""
    first: bool
    """Its input are the pixels."""
    gain: Tensor | float = 1.0
    shift: Tensor | float = 0.0

    @property
    def pooled(self) -> bool:
        """Max pooling follows."""
        return self.windows.shape[1] > 1


def find_blocks(recorded: Trace, head: str, observed: frozenset[str]) -> tuple[list[Block], str]:
    """The blocks in front of the fully connected layer `head`, the last one first, and what ended the walk."""
    position = next(i for i in recorded.find("linear") if recorded.name_of(recorded.calls[i].args[1]) == head)
    blocks: list[Block] = []
    try:
        while position > 0:
            position, group = _group(recorded, position)
            blocks.append(_block(recorded, group, observed, position))
            if blocks[-1].first:
                break
    except NotApplicable as reason:
        return blocks, str(reason)
    return blocks, "no layer is left"


def _group(recorded: Trace, position: int) -> tuple[int, list[Call]]:
    """The calls from the nearest convolution before `position` up to there, and where that convolution is."""
    group: list[Call] = []
    while position > 0:
        call, after = recorded.calls[position - 1], recorded.calls[position]
        output: Tensor = call.output
        if after.source is not output:
            raise NotApplicable(f"{after.name} joins several branches")
        position -= 1
        unchanged = call.name.startswith("adaptive") and output.shape == call.args[0].shape
        if call.name not in PASS_THROUGH and not unchanged:
            group.insert(0, call)
        if call.name == "conv2d":
            return position, group
    raise NotApplicable("no convolution is left")


def _block(recorded: Trace, group: list[Call], observed: frozenset[str], position: int) -> Block:
    conv, *rest = group
    weight, bias = recorded.name_of(conv.args[1]), recorded.name_of(conv.argument(2, "bias"))
    where = f"not applicable at {(weight or 'a convolution').removesuffix('.weight')}"
    if weight is None or weight not in observed:
        raise NotApplicable(f"{where}: the gradient of its weight is not observed")
    if conv.argument(6, "groups", 1) != 1:
        raise NotApplicable(f"{where}: grouped convolutions are not implemented")
    geometry = geometry_of(conv, where)
    gain: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    if rest and rest[0].name == "batch_norm":
        gain, shift = batch_norm_map(rest.pop(0), where)
    # Activations rise, so that it does not matter whether they stand before the pooling or after it.
    pools = [call for call in rest if call.name == "max_pool2d"]
    others = [call for call in rest if call.name != "max_pool2d"]
    activation = inverse_of(others[0]) if len(others) == 1 else None
    if activation is None or len(pools) > 1:
        names = ", ".join(call.name for call in rest) or "nothing"
        raise NotApplicable(f"{where}: {names} after it cannot be undone")
    windows = _windows(pools[0], where) if pools else torch.arange(geometry.positions)[:, None]
    first = not any(call.name == "conv2d" for call in recorded.calls[:position])
    return Block(weight, bias, geometry, activation, windows.to(conv.args[1].device), first, gain, shift)


def _windows(call: Call, where: str) -> Tensor:
    """The positions (M, K) of each window; padding is replaced by a position of the same window."""
    source = call.source
    assert source is not None
    kernel, padding = call.argument(1, "kernel_size"), call.argument(3, "padding", 0)
    stride, dilation = call.argument(2, "stride") or kernel, call.argument(4, "dilation", 1)
    height, width = source.shape[2:]
    number = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    found = F.unfold(number, kernel, dilation, padding, stride)[0].T.round().long() - 1
    if len(found) != call.output[0, 0].numel():
        raise NotApplicable(f"{where}: max pooling with ceil_mode is not implemented")
    return torch.where(found < 0, found.max(1, keepdim=True).values, found)
