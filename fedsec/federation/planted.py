"""Canaries that are gradients or whole updates: how they enter a training, and what an auditor reads of them.

A canary image keeps its place in its client's training set; its loss is scale·⟨θ, v⟩, so that its gradient is scale·v
whatever the model is, and defenses sample, clip and drown it as any other. Marked by a negative label: -1 - number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedsec.data.canaries import Canaries, CanaryKind
from fedsec.data.partition import Partition
from fedsec.defense import Aggregator, Defense, LocalStep
from fedsec.errors import ConfigError
from fedsec.federation.desk import Objective
from fedsec.federation.local import PlainStep, plain_objective
from fedsec.privacy.auditing import step_score
from fedsec.robust.aggregator import RuleAggregator
from fedsec.types import Layout, LocalRecipe, Payload, RoundContext, Update

if TYPE_CHECKING:
    from fedsec.federation.assemble import Federation

MAX_NUMBERS = 50_000_000
"""Numbers that random directions may take together."""
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """The unit vectors of m canaries.

    Args:
        layout: of the flat vector of all shared parameters.
    """

    layout: Layout
    count: int
    seed: int
    dirac: bool

    @cached_property
    def _drawn(self) -> Tensor:
        """Dirac: (m,) distinct coordinates of the largest layer; else (m, d) unit rows."""
        draw = RoundContext(self.seed, 0, 0)
        if self.dirac:
            largest = int(np.argmax(self.layout.sizes))
            size, start = self.layout.sizes[largest], sum(self.layout.sizes[:largest])
            if self.count > size:
                raise ConfigError(f"canaries={self.count}: the largest layer has {size:,} weights, one for each canary")
            found = draw.numpy("canary-directions").choice(size, self.count, replace=False)
            return torch.from_numpy(start + found.astype(np.int64))
        if self.count * self.layout.size > MAX_NUMBERS:
            raise ConfigError(
                f"canaries={self.count}: random directions of {self.layout.size:,} weights each do not fit into "
                "memory; take dirac, or fewer"
            )
        rows = torch.randn(self.count, self.layout.size, generator=draw.generator("canary-directions"))
        return torch.nn.functional.normalize(rows)

    def vector(self, number: int) -> Tensor:
        """(d,) of one canary."""
        drawn: Tensor = self._drawn[number]
        if not self.dirac:
            return drawn
        found = torch.zeros(self.layout.size)
        found[drawn] = 1.0
        return found

    def project(self, flat: Tensor) -> Tensor:
        """(m,) inner products with a flat vector (d,)."""
        return flat[self._drawn] if self.dirac else torch.mv(self._drawn, flat)


@dataclass
class Planted:
    """The gradient or client canaries of one training. Simulation and audit only; no attack sees it."""

    kind: CanaryKind
    directions: Directions
    included: NDArray[np.bool_]
    """(m,)."""
    owner: NDArray[np.int64]
    """(m,) client whose training set a canary image is in or was taken from; -1 of canaries that are clients."""
    clients: int
    """Real clients: canary clients have the numbers after them."""
    num_samples: int = 1
    """Images that a canary client says it has."""
    scores: Array = field(init=False)
    """(m,) what was seen of each canary image so far: larger, rather included."""

    def __post_init__(self) -> None:
        self.scores = np.zeros(len(self.included))
        self._witness: Witness | None = None

    @property
    def of_clients(self) -> bool:
        """Canaries are whole clients."""
        return self.kind.startswith("client")

    def step(
        self, model: Any, recipe: LocalRecipe, objective: Objective, defenses: Sequence[Defense], ctx: RoundContext
    ) -> PlainStep:
        """The innermost step of a client whose training set holds canary images."""
        scale = float(_known(defenses, ctx.client).get("clip_norm", 1.0))
        return PlantedStep(model, recipe, self.directions, 2 * scale, objective)

    def witness(
        self, step: LocalStep, recipe: LocalRecipe, defenses: Sequence[Defense], ctx: RoundContext, size: int
    ) -> Witness:
        """The outermost step: sees the sum that each local step released."""
        own = np.flatnonzero(self.owner == ctx.client)
        self._witness = Witness(step, recipe, self.directions, own, _known(defenses, ctx.client), size)
        return self._witness

    def seen(self) -> Array | None:
        """What the last witness in this process saw; asked once."""
        witness, self._witness = self._witness, None
        return None if witness is None else witness.score()

    def collect(self, client: int, seen: Array | None) -> None:
        """Add what the witness at one client saw in a round."""
        if seen is not None:
            self.scores[self.owner == client] += seen

    def payloads(self, defenses: Sequence[Defense], aggregator: Aggregator, ctx: RoundContext) -> list[Payload]:
        """What the canary clients send in a round: S·v each, through the clients' own defenses."""
        if not self.of_clients:
            return []
        found = []
        for number in np.flatnonzero(self.included).tolist():
            own = ctx.for_client(self.clients + number)
            scale = float(_known(defenses, 0, "update").get("clip_norm", 1.0))
            update = Update(self.clients + number, scale * self.directions.vector(number), self.num_samples)
            for defense in defenses:
                update = defense.on_upload(update, own)
            found.append(aggregator.encode(update, own))
        return found


class PlantedStep(PlainStep):
    """Plain SGD in which marked images have a prescribed gradient."""

    def __init__(
        self,
        model: Any,
        recipe: LocalRecipe,
        directions: Directions,
        scale: float,
        objective: Objective | None = None,
    ) -> None:
        super().__init__(model, recipe, self._with_canaries)
        self.of_images = objective or plain_objective(recipe.task)
        self.directions = directions
        self.scale = scale
        """Length of a canary's gradient: above the clip norm, so that clipping makes it as long as allowed."""

    def marked(self, y: Tensor) -> Tensor:
        """(B,) bool: whose gradient is prescribed, and so comes through no layer (see `LocalStep`)."""
        return (y if y.ndim == 1 else y[:, 0]) < 0

    def _with_canaries(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """Mean over images of the client's own objective, or of scale·⟨θ, v⟩ for canaries."""
        canary = self.marked(y)
        if not bool(canary.any()):
            return self.of_images(model, x, y)
        real = ~canary
        total = self.of_images(model, x[real], y[real]) * int(real.sum()) if bool(real.any()) else x.new_zeros(())
        tensors = dict(model.state_dict(keep_vars=True))
        for mark in (y if y.ndim == 1 else y[:, 0])[canary].tolist():
            views = self.directions.layout.views(self.directions.vector(-1 - int(mark)))
            value = torch.stack([(tensors[n] * v.to(x.device)).sum() for n, v in views.items()]).sum()
            # Minus its own value: the loss in the log is that of real images.
            total = total + self.scale * (value - value.detach())
        return total / len(x)


class Witness:
    """Stands around a client's step and reads, of every step, the released sum along each canary's direction.

    θ_t − θ_{t+1} = lr·V_{t+1} and V_{t+1} = m V_t + g + w θ_t give g, the (noised, divided) sum that defenses let
    through. Where clip norm, noise multiplier and divisor are public, the score is the log-likelihood ratio of all
    steps; else the plain sum.
    """

    def __init__(
        self,
        inner: LocalStep,
        recipe: LocalRecipe,
        directions: Directions,
        own: NDArray[np.int64],
        known: Mapping[str, Any],
        size: int,
    ) -> None:
        self.inner = inner
        self.model = inner.model
        self.optimizer = inner.optimizer
        self.recipe = recipe
        self.directions = directions
        self.own = own
        self.known = known
        self.size = size
        self._velocity = np.zeros(len(own))
        self._sums: list[Array] = []

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """The inner step's."""
        return self.inner.batches(size, ctx)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One step, and what it changed."""
        before = self._read()
        loss = self.inner(x, y)
        velocity = (before - self._read()) / self.recipe.lr
        gradient = velocity - self.recipe.momentum * self._velocity - self.recipe.weight_decay * before
        self._velocity = velocity
        self._sums.append(gradient)
        return loss

    def _read(self) -> Array:
        flat = self.directions.layout.flatten(dict(self.model.state_dict())).cpu()
        return self.directions.project(flat).double().numpy()[self.own]

    def score(self) -> Array:
        """(m_k,) of this client's canaries, from all steps of a round."""
        if not self._sums or not len(self.own):
            return np.zeros(len(self.own))
        sums = np.stack(self._sums, axis=1)
        z, divisor, clip = (self.known.get(k) for k in ("noise_multiplier", "batch_divisor", "clip_norm"))
        if not z or not divisor or not clip:
            return np.asarray(sums.sum(1))
        return step_score(sums * divisor / clip, z, min(1.0, divisor / max(1, self.size)))


def with_planted(federation: Federation, canaries: Canaries, dealt: Partition) -> Federation:
    """A federation whose canaries are gradients or clients.

    Args:
        dealt: who owned which images before some of the canaries were left out.

    Raises:
        ConfigError: an adversary or a rule that canaries would disturb.
    """
    seats, cell = federation.seats, federation.cell
    if cell.federation.engine == "flower":
        raise ConfigError(f"canary={canaries.kind}: what they show stays on the nodes; use engine=serial or processes")
    if canaries.unit != "client" and seats.recipe.optimizer != "sgd":
        raise ConfigError(f"canary={canaries.kind}: read from SGD's steps; use optimizer=sgd, or canaries of clients")
    if seats.attack is not None and (seats.attack.changes_training or seats.attack.victims() is not None):
        raise ConfigError(f"canary={canaries.kind}: {seats.attack.name} needs a training without them; use another run")
    if canaries.unit == "client" and (
        not seats.aggregator.sees_individuals or isinstance(seats.aggregator, RuleAggregator)
    ):
        raise ConfigError(f"canary={canaries.kind}: {cell.label()} weighs or hides clients; use dp_client, or no rule")
    owner = np.full(len(canaries.rows), -1)
    clients = []
    for k, (own, left) in enumerate(zip(dealt.clients, federation.rows, strict=True)):
        owner[np.isin(canaries.rows, own)] = k
        numbers = {row: i for i, row in enumerate(canaries.rows.tolist())}
        marks = {p: numbers[row] for p, row in enumerate(left.tolist()) if row in numbers}
        x, y = federation.clients[k]
        clients.append((x, mark(y, marks)))
    seed = RoundContext(cell.seed, 0, 0).entropy("canaries")
    planted = Planted(
        kind=canaries.kind,
        directions=Directions(seats.sharing.params, len(owner), seed, canaries.kind.endswith("dirac")),
        included=canaries.included,
        owner=owner,
        clients=len(federation.clients),
        num_samples=max(1, round(float(np.mean(federation.plan.client_sizes)))),
    )
    return replace(federation, clients=tuple(clients), seats=replace(seats, planted=planted))


def mark(y: Tensor, numbers: Mapping[int, int]) -> Tensor:
    """Labels of a client with its canaries marked.

    Args:
        y: (n,) or (n, L). numbers: position among the client's images -> canary.
    """
    y = y.clone()
    for position, number in numbers.items():
        y[position] = -1 - number
    return y


def _known(defenses: Sequence[Defense], client: int | None, scope: str = "sample") -> Mapping[str, Any]:
    """What is public of the defense that clips single gradients, or whole updates."""
    for defense in defenses:
        known = defense.public_knowledge(0 if client is None else client)
        if known.get("clip_scope") == scope and math.isfinite(known.get("clip_norm", math.inf)):
            return known
    return {}
