"""Which private releases happened, and what they spend together: the append-only ledger of a federation."""

from __future__ import annotations

import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from fedsec.errors import RefusedError
from fedsec.privacy.accounting import Gaussian, Laplace, Mechanism, compose
from fedsec.types import PrivacySpent


@dataclass(frozen=True)
class Event:
    """One release by one client; `round` 0 stands for all rounds of a run together."""

    type: ClassVar[str]
    client: int
    round: int
    unit: str
    """Who is protected: neighbouring data sets differ in one such unit."""

    def mechanism(self) -> Mechanism | None:
        """What the accountant sees; None: no guarantee."""
        return None


@dataclass(frozen=True)
class DPSGDSteps(Event):
    """Steps of DP-SGD on Poisson batches."""

    type: ClassVar[str] = "dp_sgd"
    noise_multiplier: float
    q: float
    """Probability that one unit enters a step."""
    steps: int
    clip: float
    num_units: int
    expected_batch: float

    def mechanism(self) -> Mechanism:
        """Sampled Gaussian steps."""
        return Gaussian(self.noise_multiplier, self.q, self.steps)


@dataclass(frozen=True)
class LocalGaussian(Event):
    """Gaussian noise on whole updates before they leave the client."""

    type: ClassVar[str] = "local_gaussian"
    sigma: float
    """Standard deviation per entry."""
    sensitivity: float
    """Largest L2 distance between two updates."""
    releases: int = 1

    def mechanism(self) -> Mechanism:
        """Gaussian releases without sampling."""
        return Gaussian(self.sigma / self.sensitivity, 1.0, self.releases)


@dataclass(frozen=True)
class LocalLaplace(Event):
    """Laplace noise on whole updates before they leave the client."""

    type: ClassVar[str] = "laplace"
    scale: float
    sensitivity: float
    """Largest L1 distance between two updates."""
    releases: int = 1

    def mechanism(self) -> Mechanism:
        """Laplace releases."""
        return Laplace(self.scale / self.sensitivity, self.releases)


@dataclass(frozen=True)
class Heuristic(Event):
    """Noise or compression without a guarantee: written down, never turned into an ε."""

    type: ClassVar[str] = "heuristic"
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)


EVENTS: Mapping[str, type[Event]] = {c.type: c for c in (DPSGDSteps, LocalGaussian, LocalLaplace, Heuristic)}


def spent(events: Iterable[Event], delta: float, unit: str, assumptions: tuple[str, ...] = ()) -> PrivacySpent | None:
    """What all events with this unit spend; None where none of them gives a guarantee.

    Each client's events are composed, with its own sampling rate. A unit belongs to one client, so that the federation
    spends the maximum over clients, never the sum (parallel composition).
    """
    by_client: defaultdict[int, list[Mechanism]] = defaultdict(list)
    for event in events:
        if event.unit == unit and (mechanism := event.mechanism()) is not None:
            by_client[event.client].append(mechanism)
    if not by_client:
        return None
    results = {client: compose(mechanisms, delta) for client, mechanisms in sorted(by_client.items())}
    worst = max(results.values())
    notes = (f"accountant: {worst.note}",) if worst.note else ()
    per_client = {client: result.epsilon for client, result in results.items()}
    return PrivacySpent(worst.epsilon, worst.delta, unit, worst.accountant, (*assumptions, *notes), per_client)


class Ledger:
    """An append-only JSON-lines file of events that survives a restart.

    Args:
        path: opened where it exists, made by the first event otherwise.

    Raises:
        RefusedError: a line that cannot be read; without it every ε would be too small.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        self._events = [self._read(line, number) for number, line in enumerate(lines, start=1)]

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that was recorded, in order."""
        return tuple(self._events)

    def record(self, event: Event) -> None:
        """Write an event down, on disk before this returns; call it before the release leaves the client."""
        line = json.dumps({"type": event.type, **dataclasses.asdict(event)}, sort_keys=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._events.append(event)

    def spent(self, delta: float, unit: str, assumptions: tuple[str, ...] = ()) -> PrivacySpent | None:
        """What the recorded events with this unit spend (see `spent`)."""
        return spent(self._events, delta, unit, assumptions)

    def _read(self, line: str, number: int) -> Event:
        try:
            content = json.loads(line)
            return EVENTS[content.pop("type")](**content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RefusedError(
                f"{self.path}:{number}: not a ledger event ({error}); restore the file or start a new run, "
                "since an incomplete ledger proves no epsilon"
            ) from None
