"""Who sits where in a federation, and what passes between them in a round: orders, replies and the record."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fedsec.attack import Attack
from fedsec.defense import Aggregator, Defense
from fedsec.federation.aggregate import WeightedMean
from fedsec.federation.planted import Planted
from fedsec.federation.sharing import Sharing
from fedsec.federation.strategy import Strategy
from fedsec.types import LocalRecipe, Payload, RoundContext, Update


@dataclass
class Seats:
    """Who sits where: everything that both sides of a federation agree on before the first round."""

    model: nn.Module
    """The one model object of this process; parameters are copied in and out of it."""
    recipe: LocalRecipe
    strategy: Strategy
    sharing: Sharing
    defenses: tuple[Defense, ...] = ()
    attack: Attack | None = None
    aggregator: Aggregator = field(default_factory=WeightedMean)
    malicious: frozenset[int] = frozenset()
    """Clients that the attack controls."""
    root: tuple[Tensor, Tensor] | None = None
    """Images and labels of the server's own, for rules that ask for them."""
    planted: Planted | None = None
    """Canaries that are gradients or clients; audit only."""


@dataclass(frozen=True)
class Turn:
    """One client's work order for a round."""

    client: int
    params: Tensor
    buffers: Tensor
    ctx: RoundContext
    """The client's own."""
    local: Tensor | None = None
    """The client's personal tensors from its last round, where the strategy keeps some."""
    max_steps: int | None = None
    """Local steps that its privacy budget still allows, where these are fewer than planned."""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """What its strategy keeps at the client."""
    received: Mapping[str, Tensor] = field(default_factory=dict)
    """What the server sends beside the model."""
    keep: bool = False
    """It trains for itself, after the last round, and sends nothing."""


@dataclass(frozen=True)
class Reply:
    """What a client's turn produced, or why it failed."""

    client: int
    content: Update | Payload | None
    """An encoded payload; an update still in clear where the adversary controls the client."""
    local: Tensor | None = None
    loss: float = float("nan")
    steps: int = 0
    seconds: float = 0.0
    failure: str | None = None
    tampered: int = 0
    """Images that an adversary's client changed or gave another label."""
    own: Mapping[str, Tensor] = field(default_factory=dict)
    """Simulation only: what the client's strategy keeps for its next turn."""
    seen: Any = None
    """Audit only: what the local steps showed of each canary image."""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in one round."""

    round: int
    participants: tuple[int, ...]
    failed: Mapping[int, str]
    """Client -> why nothing of it entered the aggregate."""
    flags: tuple[str, ...]
    loss: float
    upload_bytes: int
    """Mean bytes that one client sent."""
    seconds: float
    suspicion: Mapping[int, float] = field(default_factory=dict)
    weights: Mapping[int, float] = field(default_factory=dict)
    clipped: Mapping[int, float] = field(default_factory=dict)
    """Client -> factor of the safety clip."""
    shadows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    malicious: tuple[int, ...] = ()
    """Simulation only: who was the adversary's, among those who replied."""
    tampering: Mapping[int, float] = field(default_factory=dict)
    """Malicious client -> ‖sent − computed‖/‖computed‖, and `tampered` images it trained on."""
    tampered: Mapping[int, int] = field(default_factory=dict)
    deviation: float | None = None
    """‖A − m‖/‖m‖ with A the aggregate and m the mean of the honest updates, where somebody is malicious."""
