"""φ(x, y): what would this client have sent, had its images been x with labels y?

The differentiable twin of the client: the gradient of its loss at the broadcast model, then every deterministic step
of its defense (clipping, the constant divisor of DP-SGD), over one or several local steps. Values are in units of a
gradient: −Δ/(η·T) for T steps of plain SGD at rate η, times the batch divisor where DP-SGD releases a sum.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedsec.models.loss import task_loss
from fedsec.types import Task


def frozen_copy(model: nn.Module, mode: Literal["train", "eval"]) -> nn.Module:
    """A copy that can be differentiated functionally and shows no side effects.

    In train mode normalisation uses the batch's own moments and leaves its running statistics alone; dropout stays
    off in both modes, because the client's draw is unknown.
    """
    # Double backward of a single image is 15 % faster on contiguous than on channels-last weights.
    model = copy.deepcopy(model).eval().requires_grad_(False).to(memory_format=torch.contiguous_format)
    if mode == "train":
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.train()
                module.track_running_stats = False
                module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


class Clip(NamedTuple):
    """A bound on the norm of a vector."""

    norm: float
    order: int = 2
    """1 or 2."""


def clipped(grads: dict[str, Tensor], clip: Clip) -> dict[str, Tensor]:
    """The gradients, scaled so that the norm of all of them together is at most that of `clip`."""
    powers = [g.abs().sum() if clip.order == 1 else (g * g).sum() for g in grads.values()]
    # The floor keeps the root of an all-zero gradient differentiable.
    norm = torch.stack(powers).sum().clamp(min=1e-30) ** (1 / clip.order)
    factor = torch.clamp(clip.norm / norm, max=1.0)
    return {n: g * factor for n, g in grads.items()}


@dataclass(frozen=True)
class Simulation:
    """The client as the server can imitate it. Differentiable in the images and in soft labels."""

    model: nn.Module
    """A `frozen_copy` that holds the broadcast values."""
    names: tuple[str, ...]
    """The parameters whose gradients are observed, in the order of the flat vector."""
    task: Task
    batch: int
    """Images behind the observation."""
    lr: float = 1.0
    steps: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    batch_size: int | None = None
    """Images in one local step; None: all of them."""
    sample_clip: Clip | None = None
    """To what each image's gradient is clipped."""
    update_clip: Clip | None = None
    """To what the whole effective gradient is clipped: the clip of the update in units of a gradient."""
    divisor: float | None = None
    """DP-SGD: the observation is a sum over the images (not their mean), which the client divides by this constant."""
    clients: int = 1
    """Clients whose sums were averaged, where `divisor` is given."""
    eager: bool = False
    """Differentiate with plain autograd: twice as fast, but not under the transforms of `torch.func`."""

    @cached_property
    def params(self) -> dict[str, Tensor]:
        """The observed parameters at their broadcast values."""
        named = dict(self.model.named_parameters())
        return {name: named[name] for name in self.names}

    @cached_property
    def size(self) -> int:
        """P, the length of the observed vector."""
        return sum(p.numel() for p in self.params.values())

    @cached_property
    def double(self) -> Simulation:
        """The same in float64."""
        return replace(self, model=copy.deepcopy(self.model).double())

    def logits(self, x: Tensor) -> Tensor:
        """Outputs (B, C) of the broadcast model on images in [0, 1]."""
        out: Tensor = self.model(x)
        return out

    def flat(self, x: Tensor, y: Tensor) -> Tensor:
        """φ as one vector (P,)."""
        return torch.cat([part.reshape(-1) for part in self.parts(x, y)])

    def parts(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        """φ as one tensor a parameter, in the order of `names`.

        Several steps walk through the images in one fixed order, `batch_size` at a time, starting again at the
        first: the client's own shuffling is unknown (exact where all images fit into one step).
        """
        plain = self.steps == 1 and not self.weight_decay
        total = self._gradient(self.params, x, y) if plain else self._walk(x, y)
        if self.update_clip is not None:
            total = clipped(total, self.update_clip)
        return tuple(total[name] for name in self.names)

    def _loss_gradient(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if not self.eager:
            found: dict[str, Tensor] = grad(self._loss)(params, x, y)
            return found
        with torch.enable_grad():
            inputs = {n: p if p.requires_grad else p.detach().requires_grad_(True) for n, p in params.items()}
            parts = torch.autograd.grad(self._loss(inputs, x, y), list(inputs.values()), create_graph=True)
        return dict(zip(inputs, parts, strict=True))

    def _loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return task_loss(self.task)(functional_call(self.model, params, (x,)), y)

    def _gradient(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What one local step follows: the mean of the images' gradients, or their sum over the clients."""
        scale = 1.0 if self.divisor is None else len(x) / self.clients
        if self.sample_clip is None:
            return {n: g * scale for n, g in self._loss_gradient(params, x, y).items()}
        limit = self.sample_clip

        def one(image: Tensor, label: Tensor) -> dict[str, Tensor]:
            return clipped(grad(self._loss)(params, image[None], label[None]), limit)

        if len(x) == 1:
            alone = clipped(self._loss_gradient(params, x, y), limit)
            return {n: g * scale for n, g in alone.items()}
        return {n: g.mean(0) * scale for n, g in vmap(one)(x, y).items()}

    def _walk(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        size = len(x) if self.batch_size is None else min(self.batch_size, len(x))
        chunks = -(-len(x) // size)
        divisor = self.divisor or 1.0
        rate = self.lr / divisor
        start, params = self.params, self.params
        velocity = {n: torch.zeros_like(p) for n, p in start.items()}
        for step in range(self.steps):
            part = slice((step % chunks) * size, (step % chunks + 1) * size)
            grads = self._gradient(params, x[part], y[part])
            decay = self.weight_decay * divisor
            velocity = {n: self.momentum * velocity[n] + g + decay * params[n] for n, g in grads.items()}
            params = {n: p - rate * velocity[n] for n, p in params.items()}
        return {n: (start[n] - p) / (rate * self.steps) for n, p in params.items()}
