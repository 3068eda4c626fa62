"""The values that travel between the steps of a federated round, and the results that come out of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor, nn

Seat = Literal["server", "malicious-server", "client", "outsider"]
Task = Literal["binary", "multiclass", "ordinal", "multilabel"]


@dataclass(frozen=True)
class Layout:
    """Names, shapes and order of the tensors that one flat vector holds.

    Every update, broadcast and aggregate of a run is one contiguous float32 vector in this order, so that norms,
    noise, masks and Gram matrices need no loop over layers; `views` gives the layers back without a copy.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """The layout of these tensors, in their order."""
        return cls(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor."""
        return tuple(int(np.prod(shape)) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self.sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The named tensors inside a flat vector of length `size`; they share its memory."""
        if flat.numel() != self.size:
            raise ValueError(f"a vector of {flat.numel()} elements does not fit a layout of {self.size}")
        parts = torch.split(flat, list(self.sizes))
        return {n: p.view(s) for n, s, p in zip(self.names, self.shapes, parts, strict=True)}

    def flatten(self, tensors: Mapping[str, Tensor], out: Tensor | None = None) -> Tensor:
        """Copy the named tensors into one float32 vector (into `out` where given)."""
        if out is None:
            device = next(iter(tensors.values())).device if self.names else torch.device("cpu")
            out = torch.empty(self.size, dtype=torch.float32, device=device)
        for name, view in self.views(out).items():
            view.copy_(tensors[name].detach())
        return out


@dataclass(frozen=True)
class RoundContext:
    """Where and when a hook runs, and the only source of its randomness.

    Every generator is a pure function of (seed, round, client, purpose): engines give the same draws in any order.
    """

    seed: int
    round: int
    """1-based; 0 before training starts."""
    rounds: int
    client: int | None = None
    """The client whose turn it is; None on the server."""
    cohort: tuple[int, ...] | None = None
    """The clients that this round was dealt to; None: every client of the federation."""
    origin: int | None = None
    """The run's own seed, where `seed` is another one; None: they are the same."""

    def for_client(self, client: int) -> RoundContext:
        """The same round seen from one client's seat."""
        return replace(self, client=client)

    def adversary(self) -> RoundContext:
        """The context that attacks get: its streams are fixed by the seed too, but tell nothing about other draws."""
        return self.apart("adversary")

    def apart(self, purpose: str) -> RoundContext:
        """The same place with draws of its own; what all participants draw alike stays."""
        return replace(self, seed=self.entropy(purpose), origin=self.seed if self.origin is None else self.origin)

    def common(self, purpose: str) -> int:
        """A seed for what every participant of a run draws alike, such as a random teacher."""
        seed = self.seed if self.origin is None else self.origin
        return replace(self, seed=seed, round=0, client=None).entropy(purpose)

    def entropy(self, purpose: str) -> int:
        """A 63-bit seed for one purpose."""
        text = f"{self.seed}/{self.round}/{self.client}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator for one purpose."""
        return torch.Generator(device=device).manual_seed(self.entropy(purpose))

    def numpy(self, purpose: str) -> np.random.Generator:
        """A fresh NumPy generator for one purpose."""
        return np.random.default_rng(self.entropy(purpose))


@dataclass(frozen=True)
class LocalRecipe:
    """How clients train: the part of the protocol that every participant, and so every adversary, knows."""

    task: Task
    num_classes: int
    lr: float
    momentum: float
    weight_decay: float
    batch_size: int
    epochs: int | None
    """Local epochs a round; None where `steps` is given."""
    steps: int | None
    """Local optimisation steps a round; None where `epochs` is given."""
    mode: Literal["train", "eval"] = "train"
    """Mode of normalisation layers and dropout while the client computes its gradients."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """Momentum is SGD's; AdamW's weight decay is decoupled from the gradient."""


@dataclass(frozen=True)
class FederationPlan:
    """What is fixed before the first round; a defense calibrates itself on it."""

    recipe: LocalRecipe
    rounds: int
    client_sizes: tuple[int, ...]
    """Training images of each client."""
    client_patients: tuple[int, ...] | None = None
    """Distinct patients of each client, where the data set knows them."""
    patient_ids: tuple[tuple[int, ...], ...] | None = field(default=None, repr=False)
    """The patient of each of a client's training images, where the data set knows them; the same number everywhere."""
    clients_per_round: float | None = None
    """How many clients take part in a round on average; None: all of them."""
    layout: Layout | None = None
    """Of the updates: which entries belong to which tensor."""
    weights: tuple[float, ...] | None = None
    """What the strategy gives each client when all reply; None: in proportion to `client_sizes`."""

    def steps_per_round(self, client: int) -> int:
        """Optimisation steps that this client takes in one round."""
        if self.recipe.steps is not None:
            return self.recipe.steps
        assert self.recipe.epochs is not None
        return self.recipe.epochs * -(-self.client_sizes[client] // self.recipe.batch_size)


@dataclass(frozen=True)
class Wire:
    """How an update's vector is written down, where a defense made it shorter than four bytes an entry."""

    values: int
    """Numbers that travel."""
    bits: int = 32
    """Of each of them."""
    overhead: int = 0
    """Bytes beside them: positions, scales."""

    @property
    def num_bytes(self) -> int:
        """Size on the wire."""
        return -(-self.values * self.bits // 8) + self.overhead


@dataclass(frozen=True)
class Update:
    """What one client sends, before it is encoded."""

    client: int
    delta: Tensor
    """(d,) float32: shared trainable tensors after local training minus those received."""
    num_samples: int
    """The number of training images that the client claims."""
    buffers: Tensor | None = None
    """(b,) float32: shared floating-point buffers (BatchNorm statistics) after local training, absolute values."""
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    """Side reports that the strategy declares."""
    wire: Wire | None = None
    """How short `delta` is on the wire; None: as float32. Describes this vector, and is void once it is replaced."""


@dataclass(frozen=True)
class Peers:
    """What the adversary sees of a round when it finishes the updates of the clients that it controls."""

    honest: tuple[Update, ...]
    """Updates in clear of the honest clients that its knowledge extends to (`Attack.sees`)."""
    own: tuple[Update, ...]
    """What its own clients computed, before it changes anything."""
    clients: int
    """All that replied in this round."""
    params: Tensor | None = None
    """(d,) the model that was broadcast."""
    aggregator: Any = None
    """The server's `Aggregator`, where the attack `knows_rule`."""


@dataclass(frozen=True)
class Probe:
    """Images on which a backdoor is tried: none of them is of the target class."""

    clean: Tensor
    """(N, C, H, W) without trigger."""
    triggered: Tensor
    """(M, C, H, W) with it."""
    target: int


@dataclass(frozen=True)
class Payload:
    """What travels from a client to the server."""

    client: int
    content: Any
    """An `Update` in clear, or whatever the aggregator's `encode` made of it."""
    num_bytes: int
    """Size on the wire."""
    num_samples: int | None = None
    """The claimed number of training images, where it travels in clear."""
    norm: float | None = None
    """‖Δ‖ as the server's screening measured it."""
    stages: Mapping[str, float] = field(default_factory=dict)
    """Simulation only: CPU seconds of the client's stages of encoding."""
    forged: Update | None = None
    """Simulation only: what a malicious client had encoded. No view holds it."""


@dataclass(frozen=True)
class Descent:
    """What a client's way adds to the recipe's steps, as far as it is the same for everybody."""

    pull: float = 0.0
    """μ: pull·(θ' − θ) joins every gradient, θ being what was received."""
    repeats: int = 1
    """Optimiser steps on each batch."""
    share: float = 1.0
    """Of the way that was gone, how much is sent."""


class Imitation(Protocol):
    """How a curious server imitates a client whose strategy trains in another way than the recipe alone says."""

    @property
    def descent(self) -> Descent:
        """What the client's steps do beside following the gradient."""

    def trained(self, view: ServerView, model: nn.Module) -> tuple[ServerView, nn.Module]:
        """The view of the part of the network that the client trains, and that part; both as they are, if it is all."""

    def objective(
        self, model: nn.Module, images: Tensor, labels: Tensor
    ) -> Callable[[nn.Module, Tensor, Tensor], Tensor] | None:
        """The mean loss that a step minimises, differentiable in the images; None: the task's own.

        Args:
            model: the architecture, holding what was broadcast; of any precision. It is copied, not kept.
            images, labels: in place of the client's, whose class counts and moments are unknown.
        """


@dataclass(frozen=True)
class ServerView:
    """What really reached the server in one round, and what it may be assumed to know. Attacks see nothing else."""

    round: int
    params: Tensor
    """(d,) what was broadcast."""
    buffers: Tensor | None
    layout: Layout
    buffer_layout: Layout
    updates: tuple[Update, ...]
    """The clients' updates in clear or, where the aggregator hides individuals, one entry: their weighted mean."""
    clients_in_sum: int
    """1 where updates are individual, else the number of clients behind the single entry of `updates`."""
    recipe: LocalRecipe
    local_steps: int
    """Optimisation steps behind each update."""
    knowledge: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Defense name -> its `public_knowledge` of the first update's client (Kerckhoffs: the adversary knows the defense,
    not its secrets). A victim's view holds one update."""
    sent: Mapping[int, Tensor] = field(default_factory=dict)
    """Client -> (d,) what it was sent instead of `params`, where the strategy gives each client another model."""
    imitation: Imitation | None = None
    """How a victim's loss can be imitated where the strategy trains with another one than the task's."""
    oracle_labels: Tensor | None = None
    """True labels, only where the user asked for a told-in-advance attack; stamped into every result."""


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the number of independent units behind it."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int | None]:
        """JSON form; NaN, which JSON lacks, becomes null."""
        values = {"value": self.value, "low": self.low, "high": self.high}
        return {**{k: None if v != v else float(v) for k, v in values.items()}, "n": int(self.n)}


@dataclass(frozen=True)
class PrivacySpent:
    """One line of the privacy ledger, composed over the whole run. `epsilon` is never a per-round figure."""

    epsilon: float
    delta: float
    unit: str
    accountant: str
    assumptions: tuple[str, ...] = ()
    per_client: Mapping[int, float] = field(default_factory=dict)


def sorted_by_client(items: Iterable[Any]) -> list[Any]:
    """In client order: sums are then the same whichever engine produced the parts."""
    return sorted(items, key=lambda item: item.client)


def to_json(value: Any) -> Any:
    """Estimates become objects, NaN becomes null."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if isinstance(value, Mapping):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(v) for v in value]
    if isinstance(value, float):
        return None if value != value else value
    return value.item() if hasattr(value, "item") else value
