"""φ(x, y): what would this client have sent, had its images been x with labels y?

The differentiable twin of the client: the gradient of its loss at the broadcast model, then every deterministic step
of its defense (clipping, the constant divisor of DP-SGD), over one or several local steps. Values are in units of a
gradient: −Δ/(η·T) for T steps of plain SGD at rate η, times the batch divisor where DP-SGD releases a sum.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

from fedsec.models.loss import penalties, task_loss
from fedsec.types import Task

from .local_training import Order, fixed_order

State = dict[str, Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""(model, images, labels) -> the mean loss of a batch."""
RECOMPUTE = 50_000_000
"""Steps times parameters above which the steps are computed again on the way back, instead of being kept in memory."""


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


class Judged(nn.Module):
    """A model and its loss in one, so that parameters can be put in where the loss reads more than logits."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self.loss = model, loss

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The loss of a batch."""
        return self.loss(self.model, x, y)


class Clip(NamedTuple):
    """A bound on the norm of a vector."""

    norm: float
    order: int = 2
    """1 or 2."""


class Stop(NamedTuple):
    """Where the simulation ends, because what happens behind is random or hidden."""

    module: str
    slope: Tensor
    """∂ℓ/∂(output of that module), (B, outputs)."""


def clipped(grads: dict[str, Tensor], clip: Clip) -> dict[str, Tensor]:
    """The gradients, scaled so that the norm of all of them together is at most that of `clip`."""
    factor = torch.clamp(clip.norm / _norm(grads, clip.order), max=1.0)
    return {n: g * factor for n, g in grads.items()}


def scaled_to(grads: dict[str, Tensor], norm: float) -> dict[str, Tensor]:
    """The gradients in their direction, with this L2 norm of all of them together."""
    factor = norm / _norm(grads, 2)
    return {n: g * factor for n, g in grads.items()}


def _norm(grads: dict[str, Tensor], order: int) -> Tensor:
    powers = [g.abs().sum() if order == 1 else (g * g).sum() for g in grads.values()]
    # The floor keeps the root of an all-zero gradient differentiable.
    return torch.stack(powers).sum().clamp(min=1e-30) ** (1 / order)


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
    loss_of: Callable[[torch.dtype], Loss | None] | None = None
    """What the client minimises, in this precision; None (or None of it): the task's loss."""
    lr: float = 1.0
    steps: int = 1
    momentum: float = 0.0
    weight_decay: float = 0.0
    pull: float = 0.0
    """Towards the broadcast values, joining each step's gradient."""
    batch_size: int | None = None
    """Images in one local step; None: all of them."""
    order: Order | None = None
    """Which images each local step takes; None: in the order of their numbers, epoch after epoch."""
    sample_clip: Clip | None = None
    """To what each image's gradient is clipped."""
    update_clip: Clip | None = None
    """To what the whole effective gradient is clipped: the clip of the update in units of a gradient."""
    norm: float | None = None
    """To what norm the effective gradient is brought, where only its direction is known."""
    stop: Stop | None = None
    """Where the loss is replaced by ⟨slope, output⟩: labels and everything behind have no influence."""
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
    def judged(self) -> Judged | None:
        """The model with a loss of its own, where the client has one."""
        loss = self.loss_of(next(self.model.parameters()).dtype) if self.loss_of is not None else None
        return None if loss is None else Judged(self.model, loss)

    @cached_property
    def size(self) -> int:
        """P, the length of the observed vector."""
        return sum(p.numel() for p in self.params.values())

    @cached_property
    def double(self) -> Simulation:
        """The same in float64."""
        if self.loss_of is not None:
            self.loss_of(torch.float64)
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

        Several steps walk through the images in `order`, or `batch_size` at a time, starting again at the first: the
        client's own shuffling is unknown (exact where all images fit into one step).
        """
        plain = self.steps == 1 and not self.weight_decay
        total = self._gradient(self.params, x, y) if plain else self._walk(x, y)
        if self.update_clip is not None:
            total = clipped(total, self.update_clip)
        if self.norm is not None:
            total = scaled_to(total, self.norm)
        return tuple(total[name] for name in self.names)

    def _loss_gradient(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if not self.eager:
            found: dict[str, Tensor] = grad(self._loss)(params, x, y)
            return found
        with torch.enable_grad():
            inputs = {n: p if p.requires_grad else p.detach().requires_grad_(True) for n, p in params.items()}
            loss, wanted = self._loss(inputs, x, y), list(inputs.values())
            parts = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True, materialize_grads=True)
        return dict(zip(inputs, parts, strict=True))

    def _loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        if self.stop is not None:
            return (self.stop.slope.to(x) * self._output(self.stop.module, params, x)).sum()
        with penalties(self.model) as extra:
            if self.judged is None:
                loss = task_loss(self.task)(functional_call(self.model, params, (x,)), y)
            else:
                loss = functional_call(self.judged, {f"model.{n}": p for n, p in params.items()}, (x, y))
        return loss + sum(extra) if extra else loss

    def _output(self, module: str, params: dict[str, Tensor], x: Tensor) -> Tensor:
        seen: list[Tensor] = []
        handle = self.model.get_submodule(module).register_forward_hook(lambda _, __, output: seen.append(output))
        try:
            functional_call(self.model, params, (x,))
        finally:
            handle.remove()
        return seen[0]

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
        divisor = self.divisor or 1.0
        rate, decay, pull = self.lr / divisor, self.weight_decay * divisor, self.pull * divisor
        start = self.params

        def advance(params: State, velocity: State, x: Tensor, y: Tensor) -> tuple[State, State]:
            grads = self._gradient(params, x, y)
            if pull:
                grads = {n: g + pull * (params[n] - start[n]) for n, g in grads.items()}
            velocity = {n: self.momentum * velocity[n] + g + decay * params[n] for n, g in grads.items()}
            return {n: p - rate * velocity[n] for n, p in params.items()}, velocity

        params = start
        velocity = {n: torch.zeros_like(p) for n, p in start.items()}
        for numbers in self.order or fixed_order(len(x), size, self.steps):
            part = list(numbers) if len(numbers) < len(x) or self.order else slice(None)
            if self.eager and self.steps * self.size > RECOMPUTE:
                params, velocity = checkpoint(advance, params, velocity, x[part], y[part], use_reentrant=False)
            else:
                params, velocity = advance(params, velocity, x[part], y[part])
        return {n: (start[n] - p) / (rate * self.steps) for n, p in params.items()}
