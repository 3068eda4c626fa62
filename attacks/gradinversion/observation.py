"""From what reached the server to what an attack works on: g, φ, the noise on g, its mask, and the batch size.

The observation has no field for the truth; nothing that is computed from it can have seen the truth.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from fedsec.federation.desk import ByLogits
from fedsec.types import Descent, ServerView

from .batch_statistics import Statistics, batch_norms, passes_of, read_statistics
from .entries import arrived, find_cut, logit_layer, resolve_layer, rounding_std, without_pruned
from .knowledge import Known, read
from .prior import Prior
from .simulation import Clip, Loss, Simulation, Stop, frozen_copy

MAD_TO_STD = 1.4826
"""Median absolute deviation of a Gaussian, inverted."""


@dataclass(frozen=True)
class Observation:
    """The effective gradient of one view and everything an attack may use to explain it."""

    simulation: Simulation
    gradient: Tensor
    """g (P,), in the units of φ."""
    floor: Tensor
    """(P,) standard deviation that rounding alone puts on each entry of g: float32 arithmetic, and quantisation."""
    prior: Prior
    image_shape: tuple[int, int, int]
    step: float
    """What one unit of g moves the parameters by: η·T, divided by DP-SGD's batch divisor."""
    noise_std: float = 0.0
    """Standard deviation of the defense's noise on each entry of g; 0: none is known of."""
    noise: Literal["gaussian", "laplace"] = "gaussian"
    kept: Tensor | None = None
    """(P,) bool, the entries that were sent and can be simulated; None: all."""
    sent: Tensor | None = None
    """(P,) bool, the entries that were sent, where more were than can be simulated; None: those of `kept`."""
    labels: Tensor | None = None
    """Told in advance; None: to be recovered."""
    statistics: Statistics | None = None
    """What was sent of BatchNorm's statistics, before and after the client's training; None: not looked at."""
    knowledge: tuple[str, ...] = ()
    """What of the defense this observation has taken into account, in words."""
    notes: tuple[str, ...] = ()

    @property
    def batch(self) -> int:
        """B, the number of images behind g."""
        return self.simulation.batch

    @cached_property
    def std(self) -> Tensor:
        """(P,) total standard deviation, infinite on entries that were not sent."""
        std = (self.floor**2 + self.noise_std**2).sqrt()
        return std if self.kept is None else torch.where(self.kept, std, torch.inf)

    @cached_property
    def as_sent(self) -> Observation:
        """The same with everything that was sent: for closed forms, which read g without simulating it."""
        return self if self.sent is None else replace(self, kept=self.sent, sent=None)

    @cached_property
    def eager(self) -> Observation:
        """The same, for loops that differentiate with plain autograd."""
        return replace(self, simulation=replace(self.simulation, eager=True))

    @cached_property
    def weights(self) -> Tensor:
        """(P,) 1 on entries that were sent, else 0."""
        return torch.ones_like(self.gradient) if self.kept is None else self.kept.to(self.gradient)

    @cached_property
    def norm(self) -> float:
        """‖g‖ over the entries that were sent."""
        return float((self.gradient * self.weights).norm())

    @cached_property
    def relative_floor(self) -> float:
        """Rounding as a share of ‖g‖."""
        return float((self.floor * self.weights).norm()) / max(self.norm, 1e-300)

    @cached_property
    def relative_noise(self) -> float:
        """Expected norm of the defense's noise as a share of ‖g‖."""
        return self.noise_std * math.sqrt(float(self.weights.sum())) / max(self.norm, 1e-300)

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """The parts of a flat vector by parameter name."""
        params = self.simulation.params
        parts = flat.split([p.numel() for p in params.values()])
        return {name: part.view_as(p) for (name, p), part in zip(params.items(), parts, strict=True)}

    @cached_property
    def gradients(self) -> dict[str, Tensor]:
        """g by parameter name."""
        return self.named(self.gradient)

    @cached_property
    def stds(self) -> dict[str, Tensor]:
        """`std` by parameter name."""
        return self.named(self.std)

    @cached_property
    def gradient_parts(self) -> tuple[Tensor, ...]:
        """g, one tensor a parameter."""
        return tuple(self.gradients.values())

    @cached_property
    def weight_parts(self) -> tuple[Tensor, ...]:
        """`weights`, one tensor a parameter."""
        return tuple(self.named(self.weights).values())

    @cached_property
    def complete(self) -> frozenset[str]:
        """Parameters whose whole gradient was sent and can be simulated."""
        return frozenset(n for n, w in self.named(self.weights).items() if bool((w > 0).all()))

    def whitened_square(self, simulated: Tensor) -> Tensor:
        """χ² = Σ ((φ − g)/s)² in float64, at the total noise."""
        return (((simulated - self.gradient).double() / self.std.double()) ** 2).sum()

    def reobserve(self, x: Tensor, y: Tensor) -> Tensor:
        """What g would be if the images were x: φ with the float32 rounding of a real update, without noise."""
        moved = torch.cat([p.reshape(-1) for p in self.simulation.params.values()])
        return -((moved - self.step * self.simulation.flat(x, y)) - moved) / self.step


def observe(
    view: ServerView,
    model: nn.Module,
    prior: Prior,
    image_shape: tuple[int, int, int],
    *,
    adaptive: bool = True,
    mode: Literal["train", "eval"] | None = None,
) -> Observation:
    """Turn a view into an observation.

    Args:
        view: what reached the server.
        model: the public architecture, any weights; it is copied.
        prior: what public images look like.
        image_shape: (C, H, W).
        adaptive: use what is publicly known of the defense; False treats the update as an undefended one.
        mode: of normalisation layers while the client computed; None: as the recipe says.
    """
    device = prior.mean.device
    recipe = view.recipe
    if view.imitation is not None:
        view, model = view.imitation.trained(view, model)
    descent = Descent() if view.imitation is None else view.imitation.descent
    view = replace(view, local_steps=max(1, view.local_steps) * descent.repeats)
    steps = view.local_steps
    known = read(view.knowledge if adaptive else {})
    update, hidden = view.updates[0], view.clients_in_sum > 1
    loss_of = _imitated(view, model, prior)
    batch = update.num_samples or view.clients_in_sum * images_each(view)
    twin = frozen_copy(model, mode or recipe.mode).to(device)
    _load(twin, view)
    step = recipe.lr * steps * descent.share / (known.divisor or 1.0)
    notes = list(_assumed(view, twin, steps, batch))
    if loss_of is not None:
        notes.append("the strategy's loss is simulated, with public images for what it counts of the client's own")
    if hidden and known.update_clip is not None:
        notes.append("each client's clipping inside the sum cannot be simulated: only the direction is matched")
    if hidden and known.sparse:
        notes.append("which client sent which entry of the sum is unknown; the simulation has all of them send it")
    clip = known.update_clip
    clip = None if clip is None or hidden else Clip(clip.norm / step, clip.order)
    # Weight decay is known exactly; taken out of g, it leaves a gradient that closed forms understand.
    subtract = steps == 1 and clip is None
    simulation = Simulation(
        model=twin,
        names=view.layout.names,
        task=recipe.task,
        batch=batch,
        loss_of=loss_of,
        lr=recipe.lr,
        steps=steps,
        momentum=recipe.momentum,
        weight_decay=0.0 if subtract else recipe.weight_decay,
        pull=descent.pull,
        batch_size=None if hidden else recipe.batch_size,
        sample_clip=known.sample_clip,
        update_clip=clip,
        divisor=known.divisor,
        clients=view.clients_in_sum,
    )
    labels = None if view.oracle_labels is None else view.oracle_labels.to(device)
    if labels is not None and len(labels) != batch:
        notes.append(f"labels of {len(labels)} of {batch} images were told: too few to use")
        labels = None
    params, delta = view.params.to(device), update.delta.to(device)
    gradient = -delta / step
    if subtract and recipe.weight_decay:
        gradient = gradient - recipe.weight_decay * (known.divisor or 1.0) * params
    # Clients that were summed added their noise independently.
    std = ((known.step_std**2 / steps + (known.update_std / step) ** 2) / view.clients_in_sum) ** 0.5
    observation = Observation(
        simulation=simulation,
        gradient=gradient,
        floor=rounding(simulation, gradient, step, steps),
        prior=prior,
        image_shape=image_shape,
        step=step,
        noise_std=std,
        noise=known.noise,
        labels=labels,
        statistics=read_statistics(view, model, mode or recipe.mode, _passes(simulation, prior)),
        knowledge=known.used,
        notes=tuple(notes),
    )
    observation = _without_missing(observation, view, known)
    observation = _with_cells(observation, view, known)
    observation = _up_to_random(observation, view, known)
    observation = _up_to_logits(observation)
    if hidden and known.update_clip is not None:
        length = (observation.norm**2 - std**2 * len(gradient)) ** 0.5 if observation.relative_noise < 1 else 0.0
        length = max(length, 0.1 * observation.norm)
        observation = replace(observation, simulation=replace(observation.simulation, norm=length))
    return observation


def _imitated(view: ServerView, model: nn.Module, prior: Prior) -> Callable[[torch.dtype], Loss | None] | None:
    """The client's loss by precision, where its strategy has one of its own."""
    imitation = view.imitation
    if imitation is None:
        return None
    whole = copy.deepcopy(model).eval().requires_grad_(False).to(prior.mean.device)
    _load(whole, view)

    @cache  # it is asked for inside transforms, where nothing can be made
    def loss_of(dtype: torch.dtype) -> Loss | None:
        fitting = whole if next(whole.parameters()).dtype == dtype else copy.deepcopy(whole).to(dtype)
        return imitation.objective(fitting, prior.images, prior.labels)

    return loss_of if loss_of(next(whole.parameters()).dtype) is not None else None


def _passes(simulation: Simulation, prior: Prior) -> dict[str, int]:
    """How often a batch passes each BatchNorm layer, where the client's loss is not the task's."""
    judged = simulation.judged
    if judged is None or not batch_norms(simulation.model):
        return {}
    x, y = prior.images[:1], prior.labels[:1]
    x, y = x.expand(simulation.batch, *x.shape[1:]), y.expand(simulation.batch, *y.shape[1:])
    return passes_of(simulation.model, lambda: judged(x, y))


def _without_missing(observation: Observation, view: ServerView, known: Known) -> Observation:
    """Drop entries that were not sent, and pruned columns."""
    g = observation.gradient
    mask = arrived(view, known)
    mask = None if mask is None else mask.to(g.device)
    # Several steps, clients or draws on top of one another leave no column exactly zero.
    visible = view.local_steps <= 1 and view.clients_in_sum == 1 and observation.noise_std == 0
    visible = visible and not known.unknown_noise and not observation.simulation.weight_decay
    for name in known.pruned_layers:
        layer = resolve_layer(observation.simulation.model, name)
        mask = without_pruned(mask, g, observation.floor, view.layout, layer, visible=visible)
    return replace(observation, kept=mask)


def _with_cells(observation: Observation, view: ServerView, known: Known) -> Observation:
    """Count quantisation as rounding; estimate noise whose size is not known."""
    std = rounding_std(view, known)
    if std is None or known.unknown_noise:
        return estimate_noise(observation)
    std = std.to(observation.floor) if isinstance(std, Tensor) else torch.full_like(observation.floor, std)
    return replace(observation, floor=(observation.floor**2 + (std / observation.step) ** 2).sqrt())


def _up_to_random(observation: Observation, view: ServerView, known: Known) -> Observation:
    """Simulate no further than to a module that draws at random."""
    simulation = observation.simulation
    if not known.stochastic:
        return observation
    cut = find_cut(simulation.model, observation.prior.mean[None].clone(), known.stochastic, view.layout)
    if cut is None:
        return replace(
            observation, notes=(*observation.notes, "random layers are simulated by what they are on average")
        )
    sent = observation.weights > 0
    before = observation.named(torch.zeros_like(sent))
    for name in cut.before:
        before[name][:] = True
    kept = sent & torch.cat([part.reshape(-1) for part in before.values()])
    note = f"matched up to {cut.module}, which no draw has touched"
    if _one_step_of_one_image(simulation) and bool(observation.named(sent)[cut.bias].all()):
        simulation = _stopped(observation, cut.module, cut.bias)
    else:
        note += "; what comes back from behind is simulated without the draws"
    return replace(observation, simulation=simulation, kept=kept, sent=sent, notes=(*observation.notes, note))


def _up_to_logits(observation: Observation) -> Observation:
    """For one image, read the slope of a loss with unknown constants off the last layer's bias: it ends there."""
    simulation, judged = observation.simulation, observation.simulation.judged
    if judged is None or not isinstance(judged.loss, ByLogits) or simulation.stop is not None:
        return observation
    weight, bias = logit_layer(simulation.model, observation.prior.mean[None].clone())
    if weight is None or bias is None or observation.noise_std > 0 or not _one_step_of_one_image(simulation):
        return observation
    if bias not in observation.complete:
        return observation
    simulation = _stopped(observation, weight.rpartition(".")[0], bias)
    note = "the loss's slope is read off the last layer's bias"
    return replace(observation, simulation=simulation, notes=(*observation.notes, note))


def _one_step_of_one_image(simulation: Simulation) -> bool:
    return simulation.batch == 1 and simulation.steps == 1 and not simulation.weight_decay


def _stopped(observation: Observation, module: str, bias: str) -> Simulation:
    """The simulation up to a fully connected layer whose bias gradient is the slope of the loss at its output."""
    stop = Stop(module, observation.gradients[bias][None])
    # The slope was clipped and scaled with everything else.
    changed = {"sample_clip": None, "update_clip": None, "divisor": None, "clients": 1}
    return replace(observation.simulation, stop=stop, **changed)  # type: ignore[arg-type]


def images_each(view: ServerView) -> int:
    """Images behind one client's update, as the protocol has it; up to one short batch too many."""
    epochs = view.recipe.epochs
    return view.recipe.batch_size * (view.local_steps // epochs if epochs else 1)


@torch.no_grad()
def _load(twin: nn.Module, view: ServerView) -> None:
    tensors = dict(twin.named_parameters()) | dict(twin.named_buffers())
    pairs = [(view.layout, view.params)] + ([] if view.buffers is None else [(view.buffer_layout, view.buffers)])
    for layout, flat in pairs:
        for name, values in layout.views(flat).items():
            if name in tensors:  # in train mode the twin has no running statistics to fill
                tensors[name].copy_(values)


def _assumed(view: ServerView, twin: nn.Module, steps: int, batch: int) -> list[str]:
    notes = []
    private = [n for n, _ in twin.named_parameters() if n not in set(view.layout.names)]
    if private:
        notes.append(f"{len(private)} tensors are not shared; the model's initial values stand in for them")
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in twin.modules()):
        notes.append("the client's dropout draw is unknown; the simulation uses none")
    if steps > 1 and batch > view.recipe.batch_size:
        notes.append("the order of the client's batches is unknown; one fixed partition is assumed")
    return notes


def rounding(simulation: Simulation, gradient: Tensor, step: float, steps: int) -> Tensor:
    """Standard deviation of float32 rounding: of the stored parameters after each step, and of the gradient itself.

    A parameter θ is stored with a spacing of ulp(θ), which in g becomes ulp(θ)/(√12·step); the gradient's own
    rounding is taken as 2e-7 of the root mean square of its row.
    """
    floors = []
    parts = gradient.split([p.numel() for p in simulation.params.values()])
    for p, g in zip(simulation.params.values(), parts, strict=True):
        spacing = torch.nextafter(p.abs(), torch.full_like(p, torch.inf)) - p.abs()
        rows = g.view(len(p), -1) if p.ndim > 1 else g.view(1, -1)
        own = 2e-7 * rows.pow(2).mean(1, keepdim=True).sqrt().expand_as(rows).reshape(-1)
        floors.append((own**2 + steps * (spacing.reshape(-1) / step) ** 2 / 12).sqrt())
    return torch.cat(floors).clamp(min=1e-20)


def estimate_noise(observation: Observation, images: int = 8) -> Observation:
    """Fill in a noise level that the defense does not publish, from the entries that carry least signal.

    Those are the tenth of the entries whose gradient on public images is smallest; their median magnitude, times
    1.4826, estimates the standard deviation (from above, as some signal remains). Needs P ≥ 100 to mean anything.
    """
    simulation = replace(observation.simulation, batch=1, clients=1)
    x, y = observation.prior.images[:images], observation.prior.labels[:images]
    typical = torch.stack([simulation.flat(a[None], b[None]) for a, b in zip(x, y, strict=True)]).pow(2).mean(0)
    typical = torch.where(observation.weights > 0, typical, torch.inf)
    quiet = typical.argsort()[: max(1, int(observation.weights.sum()) // 10)]
    std = MAD_TO_STD * float(observation.gradient[quiet].abs().median())
    note = f"noise level estimated from the update: {std:.3g} per entry"
    return replace(observation, noise_std=std, notes=(*observation.notes, note))
