"""How a batch becomes the sum of its clipped gradients: engines that give the same sum at different cost.

A unit is what is clipped: an image, or a patient with several images of the batch, whose gradients are averaged first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .per_sample import Layer, any_layer, per_sample_gradients, watch

Run = Callable[[Tensor, Tensor, Callable[[], None]], Tensor]
"""(images, labels, what to do after the backward pass) -> mean loss: the client's own step, its optimiser held back."""
Sums = Mapping[nn.Parameter, Tensor]

VMAP_CHUNK = 16


class Engine(ABC):
    """Adds the clipped gradients of a batch to running sums.

    Args:
        model: prepared by `make_private`.
        max_bytes: how much memory the gradients of single images may take together.
    """

    name: ClassVar[str]

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        self.model = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.piece = max(1, max_bytes // self.bytes_per_image())

    def bytes_per_image(self) -> int:
        """What one more image in a piece costs at most, beside its activations."""
        return 4 * sum(p.numel() for p in self.parameters)

    def add(self, run: Run, x: Tensor, y: Tensor, units: Tensor, clip: float, sums: Sums) -> Tensor:
        """Add every unit's clipped gradient to `sums`, in pieces that fit into memory.

        Args:
            x: (B, C, H, W) with B ≥ 1. y: (B, ...).
            units: (B,) the unit of each image, ascending from 0.
            clip: largest L2 norm of one unit's gradient, over all parameters together.

        Returns:
            the mean loss over the images.
        """
        total = torch.zeros((), device=x.device, dtype=x.dtype)
        for start, stop in pieces(units, self.piece):
            part = slice(start, stop)
            total += self.add_piece(run, x[part], y[part], units[part] - units[start], clip, sums) * (stop - start)
        return total / len(x)

    @abstractmethod
    def add_piece(self, run: Run, x: Tensor, y: Tensor, units: Tensor, clip: float, sums: Sums) -> Tensor:
        """As `add`, for whole units that fit into memory together."""


class Hooks(Engine):
    """The gradient of every image in memory at once, by rules for each kind of layer (see `per_sample`)."""

    name: ClassVar[str] = "hooks"

    def add_piece(self, run: Run, x: Tensor, y: Tensor, units: Tensor, clip: float, sums: Sums) -> Tensor:
        """One forward and one backward pass."""

        def collect() -> None:
            rows = {p: g for p in self.parameters if (g := getattr(p, "grad_sample", None)) is not None}
            add_clipped(rows, units, clip, sums)

        with per_sample_gradients(self.model, layer_rules(), len(x)):
            return run(x, y, collect)


class VMap(Engine):
    """The whole model as one layer, run again for chunks of images under `torch.func.vmap`: for any architecture
    without randomness."""

    name: ClassVar[str] = "vmap"

    def __init__(self, model: nn.Module, max_bytes: int) -> None:
        super().__init__(model, max_bytes)
        self.piece = min(self.piece, VMAP_CHUNK)

    def add_piece(self, run: Run, x: Tensor, y: Tensor, units: Tensor, clip: float, sums: Sums) -> Tensor:
        """A forward and a backward pass for the loss, and another of each for the gradients."""
        layer = Layer("", self.model, tuple(self.parameters), any_layer)

        def sink(layer: Layer, inputs: list[Tensor], gradient: Tensor) -> None:
            add_clipped(layer.rule(layer.module, inputs, gradient * len(x)), units, clip, sums)

        with watch([layer], len(x), sink):
            return run(x, y, lambda: None)


class MicroBatch(Engine):
    """One unit after the other: slow on small models, but it needs nothing but autograd and no memory."""

    name: ClassVar[str] = "microbatch"

    def add_piece(self, run: Run, x: Tensor, y: Tensor, units: Tensor, clip: float, sums: Sums) -> Tensor:
        """One forward and one backward pass for each unit."""
        total = torch.zeros((), device=x.device, dtype=x.dtype)

        def collect() -> None:
            with_gradient = [p for p in self.parameters if p.grad is not None]
            gradients = [p.grad for p in with_gradient if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            torch._foreach_mul_(gradients, clip_factors(norm, clip))
            torch._foreach_add_([sums[p] for p in with_gradient], gradients)

        twice = len(x) and any(isinstance(m, nn.Conv2d) and m.groups > 1 for m in self.model.modules())
        for start, stop in pieces(units, 1):
            images, labels = x[start:stop], y[start:stop]
            if twice and len(images) == 1:
                # PyTorch 2.15 is wrong for a single channels_last image under grouped convolutions: show it twice.
                images, labels = images.repeat(2, 1, 1, 1), torch.cat([labels, labels])
            total += run(images, labels, collect) * (stop - start)
        return total / len(x)


def pieces(units: Tensor, size: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of whole units with at most `size` images, or of one unit where that alone has more."""
    _, counts = torch.unique_consecutive(units, return_counts=True)
    start = stop = 0
    for count in counts.tolist():
        if stop > start and stop + count - start > size:
            yield start, stop
            start = stop
        stop += count
    if stop > start:
        yield start, stop


def add_clipped(rows: Mapping[nn.Parameter, Tensor], units: Tensor, clip: float, sums: Sums) -> None:
    """Clip each unit's gradient over all parameters jointly, and add the results to `sums`.

    Args:
        rows: (B, *shape) gradients of each image's own loss. units: (B,).
    """
    flat = {p: flattened(r, units) for p, r in rows.items()}
    norms = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(f, dim=1) for f in flat.values()]), dim=0)
    factors = clip_factors(norms, clip)
    for parameter, matrix in flat.items():
        add_flat(sums[parameter], factors @ matrix, rows[parameter])


def clip_factors(norms: Tensor, clip: float) -> Tensor:
    """min(1, C/‖g‖)."""
    return (clip / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)


def flattened(rows: Tensor, units: Tensor) -> Tensor:
    """(B, *shape) as (U, numel), the mean over each unit's images; entries in memory order, so that nothing moves."""
    flat = rows.permute(0, *_memory_order(rows)).flatten(1)
    count = int(units[-1]) + 1
    if count == len(rows):
        return flat
    total = flat.new_zeros(count, flat.shape[1]).index_add_(0, units, flat)
    return total / torch.bincount(units, minlength=count).to(flat.dtype).unsqueeze(1)


def add_flat(total: Tensor, vector: Tensor, rows: Tensor) -> None:
    """Add a weighted sum of rows that `flattened` reordered."""
    order = _memory_order(rows)
    back = sorted(range(len(order)), key=lambda i: order[i])
    total.add_(vector.view([rows.shape[i] for i in order]).permute(back))


def _memory_order(rows: Tensor) -> list[int]:
    strides = rows.stride()
    return sorted(range(1, rows.dim()), key=lambda i: -strides[i])


def layer_rules() -> Mapping[type[nn.Module], Any]:
    """Opacus' rules for the kinds of layers that have none of ours."""
    from opacus import GradSampleModule

    rules: Mapping[type[nn.Module], Any] = GradSampleModule.GRAD_SAMPLERS
    return rules


class HeldOptimizer:
    """Stands before an optimiser: the client's own step calls it, and what happens is up to the engine."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.collect: Callable[[], None] = lambda: None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.optimizer, name)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of the last pass."""
        self.optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """Hand the gradients to the engine; the optimiser itself steps once for the whole batch, by `PrivateStep`."""
        self.collect()


def zeros_for(parameters: Iterable[nn.Parameter]) -> dict[nn.Parameter, Tensor]:
    """Running sums, each in its parameter's own memory order: fused optimisers read it so, whatever strides say."""
    return {p: torch.zeros_like(p, memory_format=torch.preserve_format) for p in parameters}
