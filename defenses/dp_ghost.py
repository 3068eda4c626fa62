"""Clipped gradients in one backward pass without the gradients of single images, where that is cheaper.

Book-keeping (Bu et al. 2022, "Differentially private optimization on large model at small cost", algorithm 1): the
norm of an image's gradient in a layer follows from two small Gram matrices (Goodfellow 2015; for convolutions Bu et
al. 2022, section 3). Once all norms are known, one ordinary weight gradient of the layer, each image weighed by its
clipping factor, gives the clipped sum. Layers whose Gram matrices would be larger than the gradient keep the latter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from .dp_engines import Engine, Run, Sums, add_flat, clip_factors, flattened, layer_rules
from .per_sample import RULES, Layer, columns, padded, trainable_layers, unfolded, watch

Finish = Callable[[Tensor], Mapping[nn.Parameter, Tensor]]
"""Factors (B,) -> parameter -> Σ_i factor_i g_i."""

GRAM_COST = 1.5
"""A multiplication of small Gram matrices costs so much more than one of a weight gradient."""
MARGIN = 2.0
"""Rounding of a Gram norm, in units of its dtype's epsilon times the norm of the two matrices: added to it, so that
cancellation never lets a gradient pass unclipped."""
BLOCK = 2**22
"""Bytes of unfolded patches that are worked on at once."""


class Ghost(Engine):
    """Norms from Gram matrices, then one weighted backward pass through each layer's weights."""

    name: ClassVar[str] = "ghost"

    def add_piece(self, run: Run, x: Tensor, y: Tensor, units: Tensor, clip: float, sums: Sums) -> Tensor:
        """One forward pass, one backward pass through the activations, and one through the weights."""
        layers = list(trainable_layers(self.model, {**layer_rules(), **RULES}))
        book = Book(units)

        def collect() -> None:
            # The loss is a mean over images: all that the book holds is 1/B of each image's own gradient.
            factors = clip_factors(book.norms() * len(x), clip) * len(x)
            for part in book.sums(factors):
                for parameter, total in part.items():
                    sums[parameter].add_(total)

        with watch(layers, len(x), book.enter, book.count):
            return run(x, y, collect)


@dataclass
class Book:
    """What a backward pass leaves until the clipping factors are known."""

    units: Tensor

    def __post_init__(self) -> None:
        self._calls: Counter[int] = Counter()
        self._square: Tensor | float = 0.0
        self._finish: list[Finish] = []
        self._rows: dict[nn.Parameter, Tensor] = {}
        self._whole = int(self.units[-1]) + 1 == len(self.units)

    def count(self, layer: Layer) -> None:
        """A layer was called."""
        self._calls.update(map(id, layer.parameters))

    def enter(self, layer: Layer, inputs: list[Tensor], gradient: Tensor) -> None:
        """Take down one call of a layer."""
        once = all(self._calls[id(p)] == 1 for p in layer.parameters)
        if once and self._whole and all(p.requires_grad for p in layer.module.parameters(recurse=False)):
            entry = ghost_of(layer.module, inputs, gradient)
            if entry is not None:
                self._square = self._square + entry[0]
                self._finish.append(entry[1])
                return
        for parameter, rows in layer.rule(layer.module, inputs, gradient).items():
            earlier = self._rows.get(parameter)
            self._rows[parameter] = rows if earlier is None else earlier + rows

    def norms(self) -> Tensor:
        """(U,) norm of each unit's gradient over all layers."""
        square = self._square
        for rows in self._rows.values():
            square = square + torch.linalg.vector_norm(flattened(rows, self.units), dim=1).square()
        assert isinstance(square, Tensor)
        return square.sqrt()

    def sums(self, factors: Tensor) -> Any:
        """The weighted sums, layer by layer; each is forgotten as it is handed out."""
        while self._finish:
            yield self._finish.pop()(factors)
        while self._rows:
            parameter, rows = self._rows.popitem()
            total = torch.zeros_like(parameter)
            add_flat(total, factors @ flattened(rows, self.units), rows)
            yield {parameter: total}


def ghost_of(layer: nn.Module, inputs: list[Tensor], gradient: Tensor) -> tuple[Tensor, Finish] | None:
    """(B,) squared norms of a layer's gradients and the way to their weighted sum; None where rows are cheaper."""
    if type(layer) is nn.Linear and inputs[0].dim() == 2:
        return linear(layer, inputs[0], gradient)
    if type(layer) is nn.Conv2d and layer.groups == 1 and gram_is_cheaper(layer, gradient):
        return convolution(layer, inputs[0], gradient)
    return None


def linear(layer: nn.Linear, x: Tensor, gradient: Tensor) -> tuple[Tensor, Finish]:
    """The gradient of one image is an outer product: its norm is the product of two norms (Goodfellow 2015)."""
    x_square, g_square = x.square().sum(1), gradient.square().sum(1)
    square = x_square * g_square if layer.bias is None else (x_square + 1) * g_square

    def finish(factors: Tensor) -> dict[nn.Parameter, Tensor]:
        weighted = gradient * factors.unsqueeze(1)
        return _named(layer, weighted.T @ x, weighted.sum(0))

    return square, finish


def gram_is_cheaper(layer: nn.Conv2d, gradient: Tensor) -> bool:
    """Multiplications of two (h·w)² Gram matrices against those of the gradient itself (Bu et al. 2022, 3.3)."""
    positions = gradient.shape[2] * gradient.shape[3]
    width = layer.weight[0].numel()
    return GRAM_COST * positions * (width + layer.out_channels) < width * layer.out_channels


def convolution(layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> tuple[Tensor, Finish]:
    """‖Σ_t g_t a_tᵀ‖² = Σ_{t,s} (a_t·a_s)(g_t·g_s) over positions t, s with patches a_t."""
    rows = columns(gradient)
    patches = unfolded(layer, x)
    positions, width = rows.shape[1], layer.weight[0].numel()
    step = max(1, BLOCK // (4 * positions * width))
    squares = []
    for part, row in zip(patches.split(step), rows.split(step), strict=True):
        flat = part.reshape(len(part), positions, width)
        seen, sent = torch.bmm(flat, flat.transpose(1, 2)), torch.bmm(row, row.transpose(1, 2))
        exact = (seen * sent).sum((1, 2))
        rounding = torch.linalg.vector_norm(seen, dim=(1, 2)) * torch.linalg.vector_norm(sent, dim=(1, 2))
        squares.append(exact.clamp(min=0) + MARGIN * torch.finfo(exact.dtype).eps * rounding)
    square = torch.cat(squares)
    if layer.bias is not None:
        square = square + rows.sum(1).square().sum(1)

    def finish(factors: Tensor) -> dict[nn.Parameter, Tensor]:
        weighted = gradient * factors.view(-1, 1, 1, 1)
        return _named(layer, weight_gradient(layer, x, weighted), weighted.sum((0, 2, 3)))

    return square, finish


def weight_gradient(layer: nn.Conv2d, x: Tensor, gradient: Tensor) -> Tensor:
    """The ordinary gradient of a convolution's weight, summed over the batch."""
    simple = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    x, padding = (x, cast(tuple[int, int], layer.padding)) if simple else (padded(layer, x), (0, 0))
    result: Tensor = torch.ops.aten.convolution_backward(
        gradient, x, layer.weight, None, layer.stride, padding, layer.dilation, False, (0, 0), 1, (False, True, False)
    )[1]
    return result


def _named(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> dict[nn.Parameter, Tensor]:
    named = {cast(nn.Parameter, layer.weight): weight}
    return named if layer.bias is None else {**named, cast(nn.Parameter, layer.bias): bias}
