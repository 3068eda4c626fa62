"""Which moments did the client's BatchNorm layers see, and which ones would a candidate's images cause?

A client that trains in train mode moves its running statistics towards the moments of its batch: run_new =
(1 − m)·run_old + m·(moment). Where both ends are sent and one step lies between them, the moments follow exactly
(Hatamizadeh et al. 2023, 2202.06924). The running variance is the unbiased one; BatchNorm itself divides by n.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedsec.types import ServerView

from .candidate import NotApplicable
from .settings import BatchStatistics

Used = Literal["none", "running", "inferred"]


@dataclass(frozen=True)
class Moments:
    """Of the input of one BatchNorm layer, over images and positions."""

    mean: Tensor
    """(C,)."""
    variance: Tensor
    """(C,), divided by n, not by n − 1."""


@dataclass(frozen=True)
class Statistics:
    """What reached the server of the client's BatchNorm layers."""

    layers: tuple[str, ...]
    """Modules whose running statistics are shared."""
    mode: Literal["train", "eval"]
    """In which the client computed."""
    steps: int
    clients: int
    """Behind the update."""
    before: Mapping[str, Tensor] = field(default_factory=dict)
    """Buffer name -> value that was broadcast."""
    after: Mapping[str, Tensor] = field(default_factory=dict)
    """Buffer name -> value that the client sent back; empty: hidden."""
    momentum: Mapping[str, float] = field(default_factory=dict)
    """Module -> m of the client's step."""

    @property
    def shared(self) -> bool:
        """The client's statistics after training are visible, and its own."""
        return bool(self.layers) and bool(self.after) and self.clients == 1

    def refusal(self, used: Used) -> str | None:
        """Why these moments cannot honestly be had, if so."""
        if used == "none":
            return None
        if not self.layers:
            return "no BatchNorm statistics are sent"
        if self.clients > 1:
            return f"the statistics of {self.clients} clients are mixed"
        if used == "running":
            fresh = all(
                bool((self.before[f"{name}.running_mean"] == 0).all())
                and bool((self.before[f"{name}.running_var"] == 1).all())
                for name in self.layers
            )
            untrained = "the running statistics are still those of initialisation: they say nothing of images"
            return untrained if fresh else None
        if not self.after:
            return "the client's statistics after training are hidden"
        if self.mode == "eval":
            return "the client computed in eval mode: its running statistics did not move"
        if self.steps != 1:
            return f"{self.steps} local steps leave a mixture of their batches' moments, which one batch did not have"
        return None

    def strongest(self, wanted: BatchStatistics) -> Used:
        """The mode to use: the one asked for, or with auto the strongest honest one."""
        if wanted != "auto":
            return wanted
        order: tuple[Used, ...] = ("inferred", "running")
        return next((used for used in order if self.refusal(used) is None), "none")

    def reference(self, used: Used, counts: Mapping[str, int]) -> dict[str, Moments]:
        """Module -> the moments to match; empty for none.

        Args:
            used: where they come from.
            counts: module -> n, the numbers over which one channel's moments run: images times positions. A layer
                that images do not pass, such as one of a strategy's own, is not in it and matches nothing.

        Raises:
            NotApplicable: they cannot honestly be had.
        """
        reason = self.refusal(used)
        if reason is not None:
            raise NotApplicable(f"bn={used}: {reason}")
        if used == "none":
            return {}
        layers = [name for name in self.layers if name in counts]
        if used == "running":
            return {n: Moments(self.before[f"{n}.running_mean"], self.before[f"{n}.running_var"]) for n in layers}
        found = {}
        for name in layers:
            ends = [
                (self.before[f"{name}.{end}"], self.after[f"{name}.{end}"]) for end in ("running_mean", "running_var")
            ]
            mean, variance = (infer(old, new, self.momentum[name]) for old, new in ends)
            found[name] = Moments(mean, biased(variance, counts[name]).clamp(min=0))
        return found


def infer(before: Tensor, after: Tensor, momentum: float) -> Tensor:
    """(run_new − (1 − m)·run_old)/m: the moment that moved a running statistic; rounding grows 1/m-fold."""
    return ((after.double() - (1 - momentum) * before.double()) / momentum).to(before)


def biased(variance: Tensor, count: int) -> Tensor:
    """The variance divided by n, from the one divided by n − 1, which running statistics hold; n > 1."""
    return variance * ((count - 1) / count)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """The model's BatchNorm layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


def momentum_of(layer: _BatchNorm, passes: int = 1) -> float:
    """m of so many passes of one batch in train mode: 1 − Π(1 − m_i).

    Each m_i is fixed, or 1/(batches seen with it) where the layer keeps a plain average.
    """
    if layer.momentum is not None:
        each = [float(layer.momentum)] * passes
    else:
        assert layer.num_batches_tracked is not None
        each = [1.0 / (int(layer.num_batches_tracked) + i) for i in range(1, passes + 1)]
    return each[0] if passes == 1 else 1 - prod(1 - m for m in each)


@torch.no_grad()
def passes_of(model: nn.Module, forward: Callable[[], object]) -> dict[str, int]:
    """BatchNorm layer -> how often a batch passes it in one step: losses with terms of features look more than once."""
    counts: Counter[str] = Counter()

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda *_: counts.update([name])

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in batch_norms(model).items()]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return dict(counts)


def read_statistics(
    view: ServerView, model: nn.Module, mode: Literal["train", "eval"], passes: Mapping[str, int] | None = None
) -> Statistics:
    """What a view holds of the statistics.

    Args:
        view: what reached the server.
        model: the public architecture; of a layer without fixed momentum its counter is taken, as counters do not
            travel.
        mode: in which the client computed.
        passes: layer -> how often a batch passes it in one local step; once where not given.
    """
    device = next(model.parameters()).device
    names = set(view.buffer_layout.names)
    layers = {n: m for n, m in batch_norms(model).items() if {f"{n}.running_mean", f"{n}.running_var"} <= names}
    update = view.updates[0] if view.updates else None
    sent = None if update is None else update.buffers
    before = {} if view.buffers is None else view.buffer_layout.views(view.buffers)
    after = {} if sent is None else view.buffer_layout.views(sent)
    return Statistics(
        layers=tuple(layers) if before else (),
        mode=mode,
        steps=view.local_steps,
        clients=view.clients_in_sum,
        before={n: t.to(device) for n, t in before.items()},
        after={n: t.to(device) for n, t in after.items()},
        momentum={n: momentum_of(m, (passes or {}).get(n, 1)) for n, m in layers.items()},
    )


def used_by(view: ServerView, model: nn.Module, mode: Literal["train", "eval"], wanted: BatchStatistics) -> Used:
    """What an attack on this view knows of the statistics: a simulation in eval mode runs on the broadcast ones."""
    statistics = read_statistics(view, model, mode)
    used = statistics.strongest(wanted)
    if statistics.refusal(used) is not None:
        used = "none"
    return "running" if used == "none" and mode == "eval" and statistics.layers else used


def moments_of(model: nn.Module, names: tuple[str, ...], images: Tensor) -> dict[str, Moments]:
    """The moments that images (B, C, H, W) cause in front of the named layers; differentiable, and under `vmap`."""
    found: dict[str, Moments] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            over = tuple(d for d in range(x.ndim) if d != 1)
            mean = x.mean(over)
            centred = x - mean.view(1, -1, *[1] * (x.ndim - 2))
            found[name] = Moments(mean, (centred * centred).mean(over))

        return read

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def counts_of(model: nn.Module, names: tuple[str, ...], image: Tensor, batch: int) -> dict[str, int]:
    """Module -> n = B × positions, from one image (C, H, W)."""
    counts: dict[str, int] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: counts.update({name: batch * args[0][0, 0].numel()})

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    try:
        model(image[None].expand(2, -1, -1, -1))
    finally:
        for handle in handles:
            handle.remove()
    return counts


def distance(found: Mapping[str, Moments], reference: Mapping[str, Moments]) -> Tensor:
    """Σ_l ‖μ_l − μ̂_l‖/‖σ̂_l‖ + ‖σ²_l − σ̂²_l‖/‖σ̂²_l‖, divided by the number of layers.

    Yin et al. 2021 (2104.07586), equation 9, made free of units: in plain norms the layer with the largest
    activations decides alone.
    """
    terms = []
    for name, wanted in reference.items():
        level = wanted.variance.sum().clamp(min=1e-12)
        terms.append(_norm(found[name].mean - wanted.mean) / level.sqrt())
        terms.append(_norm(found[name].variance - wanted.variance) / _norm(wanted.variance).clamp(min=1e-12))
    return torch.stack(terms).sum() / len(reference)


def _norm(x: Tensor) -> Tensor:
    """‖x‖, differentiable at 0."""
    return ((x * x).sum() + 1e-24).sqrt()
