"""One way in which a client may have walked through its images, and how well given images explain the update then."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .gauss_newton import Problem
from .local_training import Order, distinct_orders
from .observation import Observation


@dataclass(frozen=True)
class Unrolled:
    """A candidate order of local training; the first epoch takes the images by their numbers."""

    observation: Observation
    """g, and φ in that order."""
    labels: Tensor
    """One row for each image of φ."""
    source: tuple[int, ...]
    """For each image its number before the renaming."""

    @property
    def problem(self) -> Problem:
        """φ(x) ≈ g with its noise, for Gauss–Newton."""
        seen = self.observation
        return Problem(lambda x: seen.simulation.flat(x, self.labels), seen.gradient, seen.std**2)

    def residual(self, images: Tensor) -> float:
        """‖φ − g‖/‖g‖ over what was sent; infinite where φ is not finite."""
        seen = self.observation
        difference = (seen.simulation.flat(images, self.labels) - seen.gradient) * seen.weights
        value = float(difference.norm()) / max(seen.norm, 1e-300)
        return value if value == value else float("inf")


def batch_size(observation: Observation) -> int:
    """Images in one local step."""
    return min(observation.simulation.batch_size or observation.batch, observation.batch)


def unrolled_along(observation: Observation, labels: Tensor, order: Order) -> Unrolled:
    """The training in this order, with the images renamed so that the first epoch takes them by their numbers."""
    seen = list(dict.fromkeys(i for part in order for i in part))
    source = [*seen, *(i for i in range(len(labels)) if i not in seen)]
    name = {old: new for new, old in enumerate(source)}
    renamed = tuple(tuple(sorted(name[i] for i in part)) for part in order)
    moved = replace(observation, simulation=replace(observation.simulation, order=renamed))
    return Unrolled(moved, labels[source], tuple(source))


def possible_orders(observation: Observation, labels: Tensor, limit: int) -> list[Unrolled] | None:
    """Every training that differs for images with these labels; None where there are more than `limit`."""
    kinds = [tuple(row) for row in labels.reshape(len(labels), -1).tolist()]
    found = distinct_orders(kinds, batch_size(observation), observation.simulation.steps, limit)
    return None if found is None else [unrolled_along(observation, labels, order) for order in found]


def best_order_for(observation: Observation, labels: Tensor, images: Tensor, limit: int) -> Unrolled | None:
    """The training in which these images (N, C, H, W) explain g best; None where there are more than `limit`."""
    orders = distinct_orders(range(len(labels)), batch_size(observation), observation.simulation.steps, limit)
    if orders is None:
        return None
    trainings = [unrolled_along(observation, labels, order) for order in orders]
    return min(trainings, key=lambda training: training.residual(images[list(training.source)]))


def one_step(observation: Observation) -> Observation:
    """The same update seen as one step of SGD over all images at rate η·T; exact to first order in η.

    With momentum m the T steps count Σ_t (1 − m^t)/(1 − m) times instead of T times.
    """
    simulation, m = observation.simulation, observation.simulation.momentum
    share = sum((1 - m**t) / (1 - m) for t in range(1, simulation.steps + 1)) / simulation.steps
    one = replace(simulation, steps=1, batch_size=None, order=None, momentum=0.0)
    scaled = replace(observation, simulation=one, gradient=observation.gradient / share)
    return replace(scaled, floor=observation.floor / share, noise_std=observation.noise_std / share)
