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
from fedsec.privacy.accounting import Gaussian, Laplace, Mechanism, compose_group
from fedsec.types import PrivacySpent

PARTS = "ledgers"
"""Folder with one ledger for each training of a run: processes that train at the same time do not write into each
other's. The run's `ledger.jsonl` is made of them."""


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

    @property
    def count(self) -> int:
        """Noisy steps, or releases where a turn makes one."""
        return 1

    def limited(self, count: int) -> Event:
        """The same with no more than `count` steps."""
        return self


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
    """The client's own images or patients: `q` comes from them."""
    expected_batch: float
    """Units in a batch on average: what sums are divided by."""
    sampler: str = "poisson"
    group: int = 1
    """Clipped units (images) that belong to one protected unit (a patient), at most."""
    rng: str = "seeded"
    adjacency: str = "add_remove"

    def mechanism(self) -> Mechanism:
        """Sampled Gaussian steps."""
        return Gaussian(self.noise_multiplier, self.q, self.steps)

    @property
    def count(self) -> int:
        """Steps."""
        return self.steps

    def limited(self, count: int) -> DPSGDSteps:
        """The same with no more than `count` steps."""
        return dataclasses.replace(self, steps=min(self.steps, count))


@dataclass(frozen=True)
class GaussianSum(Event):
    """Gaussian noise that the server puts on a sum of clipped updates, seen from one of the clients in it."""

    type: ClassVar[str] = "gaussian_sum"
    noise_multiplier: float
    """Standard deviation of the noise divided by the clip norm."""
    clip: float
    participation: str = "full"
    """Written down; it never lowers an ε, since the server knows who took part."""
    noise_by: str = "server"
    releases: int = 1
    rng: str = "seeded"
    adjacency: str = "add_remove"

    def mechanism(self) -> Mechanism:
        """Gaussian releases without sampling."""
        return Gaussian(self.noise_multiplier, 1.0, self.releases)


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


EVENTS: Mapping[str, type[Event]] = {
    c.type: c for c in (DPSGDSteps, GaussianSum, LocalGaussian, LocalLaplace, Heuristic)
}


def spent(events: Iterable[Event], delta: float, unit: str, assumptions: tuple[str, ...] = ()) -> PrivacySpent | None:
    """What all events with this unit spend; None where none of them gives a guarantee.

    Each client's events are composed, with its own sampling rate. A unit belongs to one client, so that the federation
    spends the maximum over clients, never the sum (parallel composition).
    """
    by_client: defaultdict[int, list[Mechanism]] = defaultdict(list)
    sizes: defaultdict[int, int] = defaultdict(lambda: 1)
    for event in events:
        if event.unit == unit and (mechanism := event.mechanism()) is not None:
            by_client[event.client].append(mechanism)
            sizes[event.client] = max(sizes[event.client], getattr(event, "group", 1))
    if not by_client:
        return None
    results = {client: compose_group(ms, delta, sizes[client]) for client, ms in sorted(by_client.items())}
    worst = max(results.values())
    notes = (f"accountant: {worst.note}",) if worst.note else ()
    per_client = {client: result.epsilon for client, result in results.items()}
    return PrivacySpent(worst.epsilon, worst.delta, unit, worst.accountant, (*assumptions, *notes), per_client)


@dataclass(frozen=True)
class Attempt:
    """One training in the file: what it claims, and everything that it released."""

    training: str
    header: Mapping[str, Any]
    events: list[Event] = field(default_factory=list)
    finished: bool = False


class Ledger:
    """The append-only JSON-lines file of a run: for each training a header, its events, and a line when it is done.

    Args:
        path: read where it exists, made by the first line otherwise.

    Raises:
        RefusedError: a line that cannot be read; without it every ε would be too small.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attempts: list[Attempt] = []
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, start=1):
            self._read(line, number)

    @property
    def events(self) -> tuple[Event, ...]:
        """Everything that was recorded, in order."""
        return tuple(event for attempt in self.attempts for event in attempt.events)

    def begin(self, training: str, **header: Any) -> None:
        """Start a training: all events until the next `begin` are its own."""
        self._write({"type": "training", "training": training, **header})
        self.attempts.append(Attempt(training, header))

    def resume(self, training: str, after: int) -> None:
        """Go on with the attempt that was cut off after this round; without one, nothing happens.

        What a later round had released already is released again: seeded noise is the same noise and counts once, noise
        of the operating system counts twice.
        """
        if self.attempts and self.attempts[-1].training == training and not self.attempts[-1].finished:
            self._write({"type": "resumed", "training": training, "after": after})
            self._forget(after)

    def _forget(self, after: int) -> None:
        kept = [e for e in self.attempts[-1].events if e.round <= after or getattr(e, "rng", "seeded") != "seeded"]
        self.attempts[-1] = dataclasses.replace(self.attempts[-1], events=kept)

    def record(self, event: Event) -> None:
        """Write an event down, on disk before this returns; call it before the release leaves the client."""
        if not self.attempts:
            self.begin("unnamed")
        self._write({"type": event.type, **dataclasses.asdict(event)})
        self.attempts[-1].events.append(event)

    def finish(self) -> None:
        """The training that was begun last is complete."""
        last = self.attempts[-1]
        self._write({"type": "finished", "training": last.training, "events": len(last.events)})
        self.attempts[-1] = dataclasses.replace(last, finished=True)

    def of(self, training: str) -> tuple[Event, ...]:
        """All that one training released.

        Attempts that were cut off count too. Only where their noise came from the seed they do not: the next attempt
        released the very same numbers again.
        """
        attempts = [a for a in self.attempts if a.training == training]
        last = attempts[-1:]
        counted = [a for a in attempts[:-1] if any(getattr(e, "rng", "seeded") != "seeded" for e in a.events)]
        return tuple(event for attempt in (*counted, *last) for event in attempt.events)

    def check(self, training: str, events: int) -> None:
        """Hold a finished training against the file.

        Raises:
            RefusedError: the file is gone or shorter than what the training released.
        """
        found = len(self.of(training))
        if found < events:
            raise RefusedError(
                f"{self.path}: {found} events for {training}, which released {events}; restore the file or start a new "
                "run, since an incomplete ledger proves no epsilon"
            )

    def spent(self, delta: float, unit: str, assumptions: tuple[str, ...] = ()) -> PrivacySpent | None:
        """What the recorded events with this unit spend (see `spent`)."""
        return spent(self.events, delta, unit, assumptions)

    def _write(self, content: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(content, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _read(self, line: str, number: int) -> None:
        try:
            content = json.loads(line)
            kind = content.pop("type")
            if kind == "training":
                self.attempts.append(Attempt(content.pop("training"), content))
            elif kind == "finished":
                complete = len(self.attempts[-1].events) == content["events"]
                if not complete or content["training"] != self.attempts[-1].training:
                    raise ValueError("events are missing before it")
                self.attempts[-1] = dataclasses.replace(self.attempts[-1], finished=True)
            elif kind == "resumed":
                if content["training"] != self.attempts[-1].training:
                    raise ValueError("it resumes another training")
                self._forget(int(content["after"]))
            else:
                event = EVENTS[kind](**content)
                if not self.attempts:
                    self.attempts.append(Attempt("unnamed", {}))
                self.attempts[-1].events.append(event)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise RefusedError(
                f"{self.path}:{number}: not a ledger event ({error}); restore the file or start a new run, "
                "since an incomplete ledger proves no epsilon"
            ) from None
