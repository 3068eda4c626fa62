"""What a defense may do in a federated round: the base classes `Defense` and `Aggregator`.

A defense is a frozen dataclass. Its fields are its parameters: annotate them with
`Annotated[float, Field(gt=0, description="...")]` and the command line checks, converts and explains them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from fedsec.privacy.ledger import Event
    from fedsec.types import FederationPlan, Payload, PrivacySpent, RoundContext, Update


class LocalStep(Protocol):
    """One client's optimisation: how it draws batches and what it does with each. A defense may wrap both."""

    def batches(self, size: int, ctx: RoundContext) -> Iterator[Tensor]:
        """Index tensors, one a step, for one round of local training on `size` images."""
        ...

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """One optimisation step on one batch (possibly empty); returns the mean loss, detached."""
        ...

    model: nn.Module
    optimizer: torch.optim.Optimizer


def prescribed(step: LocalStep, y: Tensor) -> Tensor | None:
    """(B,) bool: images whose gradient is prescribed by an audit, and passes through no layer; None: none can be.

    A defense that computes gradients layer by layer has to take these images through autograd, one unit at a time.
    """
    inner: Any = step
    while inner is not None:
        if (marked := getattr(inner, "marked", None)) is not None:
            found: Tensor = marked(y)
            return found if bool(found.any()) else None
        inner = getattr(inner, "inner", None)
    return None


class Defense:
    """Identity by default; override what you need. Hooks are listed in the order in which a round calls them."""

    name: ClassVar[str]
    protects: ClassVar[str]
    """One line for `fedsec list defenses`."""

    def calibrate(self, plan: FederationPlan) -> Self:
        """Before training: fix what depends on client sizes and rounds, such as a noise multiplier."""
        return self

    def measure(self, model: nn.Module, image_shape: tuple[int, int, int]) -> Self:
        """Once, after `calibrate`: choose what depends on this machine's speed and memory, and never on the data."""
        return self

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """Change the architecture (BatchNorm to GroupNorm, a bottleneck). The adversary knows the result."""
        return model

    def local_step(self, step: LocalStep, ctx: RoundContext) -> LocalStep:
        """Client: wrap the optimisation (DP-SGD)."""
        return step

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        """Client: clip, add noise, prune, quantise."""
        return update

    def on_receive(self, updates: Sequence[Update], ctx: RoundContext) -> Sequence[Update]:
        """Server: screen or pre-aggregate what arrived in clear."""
        return updates

    def aggregator(self) -> Aggregator | None:
        """The rule that combines updates; at most one in a stack. Called once a run."""
        return None

    def on_aggregate(self, delta: Tensor, ctx: RoundContext) -> Tensor:
        """Server: change the aggregate before it is applied."""
        return delta

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """What the adversary is assumed to know of this defense at this client.

        Standard keys, which attacks understand without knowing the defense: `clip_norm` with `clip_scope`
        ("sample": per-image gradient, "update": whole update) and `clip_order` (1 or 2); `noise` ("gaussian" or
        "laplace") with `noise_std`, the standard deviation per entry of `Update.delta`; `noise_multiplier` and
        `batch_divisor` (DP-SGD: the noise is multiplier x clip norm on the *sum* of gradients, which is then
        divided by the constant `batch_divisor`); `mask` (bool tensor of entries that are sent).

        What follows the data cannot be known before the upload, but shows in it. Such keys say what to look for:
        `sparse` (true: entries that arrive as exactly zero were not sent); `quantisation_levels` (every entry is a
        whole multiple, at most this one, of a step: the largest magnitude divided by it) with `quantisation_scope`
        ("tensor" or "vector": how far that step reaches), or `quantisation_step` (a step that does not follow the
        data: one for all, or a tensor with one for each entry), either with `stochastic_rounding`; `pruned_layer`
        (the fully connected layer, "head" or a module's name, of whose weight gradient whole columns are set to
        zero); `stochastic` (names of modules, or last parts of them, that draw at random in every local step).
        """
        return {}

    def privacy(self) -> PrivacySpent | None:
        """What the whole run spends if every client takes part in every round; None: no differential-privacy claim."""
        return None

    def releases(self, ctx: RoundContext) -> Sequence[Event]:
        """What one client's turn in one round gives away: goes into the ledger before the turn starts."""
        return ()

    def allowance(self, client: int) -> int | None:
        """How many steps (releases, where a turn makes one) this client's budget covers in the run; None: any number.

        The round never trains a client beyond it.
        """
        return None

    def notes(self) -> tuple[str, ...]:
        """Sentences that a reader of the result has to know; printed with it."""
        return ()


@dataclass(frozen=True)
class Aggregation:
    """What an aggregation rule returns for one round."""

    delta: Tensor | None
    """(d,) to add to the model; None: the rule found no safe answer, and the model stays as it was."""
    buffers: Tensor | None = None
    """(b,) the new shared buffers; None: keep the old ones."""
    weights: Mapping[int, float] = field(default_factory=dict)
    """Client -> its share in the aggregate, where the rule has one."""
    suspicion: Mapping[int, float] = field(default_factory=dict)
    """Client -> score, larger is more suspicious. Empty where individuals are hidden."""
    clipped: Mapping[int, float] = field(default_factory=dict)
    """Client -> factor by which its update was shortened before the rule saw it."""
    shadows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Rule that was not applied -> its weights and suspicion on the same updates, or why it had no answer."""
    flags: tuple[str, ...] = ()
    rejected: Mapping[int, str] = field(default_factory=dict)
    """Client -> why its payload was left out, where only the rule itself could tell."""


class Aggregator(ABC):
    """Combines the clients' updates. `encode` runs at the client, the rest on the server.

    One object lives for a whole run, so a rule may keep state between rounds, keyed by client id.
    """

    sees_individuals: ClassVar[bool] = True
    """False: the server learns the sum alone, and so does every attack from its seat."""
    alone: ClassVar[str] = ""
    """Why no other rule can stand in its place, and what to choose instead."""

    def readable(self, payload: Payload) -> Update | None:
        """What of this payload the server can read; None: nothing of its own, it enters a sum alone."""
        return payload.content if self.sees_individuals else None

    def report(self) -> Mapping[str, Any]:
        """After training: what a result says of this rule under `cost.aggregation` (sizes, seconds, keys, errors)."""
        return {}

    def notes(self) -> tuple[str, ...]:
        """After training: sentences that a reader of the result has to know."""
        return ()

    def memory(self) -> Mapping[str, Any]:
        """What this rule carries from round to round: tensors, numbers and texts, in nested mappings."""
        return {}

    def recall(self, memory: Mapping[str, Any]) -> None:  # noqa: B027
        """Go on from a `memory` of before the server was stopped."""

    @property
    def needs_root(self) -> bool:
        """The server has to train on images of its own in every round, and `receive_root` is told the update."""
        return False

    def turned_away(self, clients: Collection[int]) -> None:  # noqa: B027
        """Server: before a round starts, who replied in it and did not pass the screening."""

    def receive_root(self, delta: Tensor) -> None:  # noqa: B027
        """Server: the update (d,) that its own images give in this round."""

    def encode(self, update: Update, ctx: RoundContext) -> Payload:
        """Client: turn an update into what travels. In clear by default."""
        from fedsec.types import Payload

        beside = [*update.extras.values(), *([] if update.buffers is None else [update.buffers])]
        whole = beside if update.wire is not None else [update.delta, *beside]
        num_bytes = sum(t.numel() * t.element_size() for t in whole) + (update.wire.num_bytes if update.wire else 0)
        return Payload(update.client, update, num_bytes, update.num_samples)

    @abstractmethod
    def begin(self, weights: Mapping[int, float], ctx: RoundContext) -> None:
        """Server: a round starts; `weights` (summing to 1) is what the strategy gives each client that replied."""

    @abstractmethod
    def accumulate(self, payload: Payload, ctx: RoundContext) -> None:
        """Server: take in one payload; called in client order."""

    @abstractmethod
    def finish(self, ctx: RoundContext) -> Aggregation:
        """Server: the result of the round."""
