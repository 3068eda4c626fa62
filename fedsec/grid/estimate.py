"""How long will the rest take? Learned from the finished cells of the same grid, the most alike first."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from fedsec.config import Cell
from fedsec.grid.tasks import Task

Likeness = Callable[[Cell], Hashable]


def _federation(cell: Cell) -> Hashable:
    return (cell.data.name, cell.data.size, cell.model.name, cell.federation.rounds)


def _names(cell: Cell) -> Hashable:
    return tuple(spec.name for spec in cell.defense)


def _attack(cell: Cell) -> Hashable:
    return cell.attack.name if cell.attack else None


LIKENESS: tuple[Likeness, ...] = (
    lambda c: (_federation(c), str(c.attack), c.label()),
    lambda c: (_federation(c), _attack(c), _names(c)),
    lambda c: (_federation(c), _attack(c)),
    lambda c: _attack(c),
    lambda c: None,
)
"""From most alike to anything."""


@dataclass(frozen=True)
class Duration:
    """A time estimate."""

    seconds: float | None
    """Wall seconds with the given number of workers; None where nothing is finished that it could be learned from."""
    cells: int
    """Finished cells behind it."""

    def __str__(self) -> str:
        if self.seconds is None:
            return "no estimate yet: it is learned from finished cells, and there is none"
        return f"about {in_words(self.seconds)}, learned from {self.cells} finished cell{'s' * (self.cells != 1)}"


def in_words(seconds: float) -> str:
    """`40 s`, `12 min`, `3.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Clock:
    """Learns durations of trainings and attacks.

    Args:
        finished: (cell, its result).
    """

    def __init__(self, finished: Iterable[tuple[Cell, Mapping[str, Any]]] = ()) -> None:
        self.seen: dict[tuple[str, int, Hashable], list[float]] = {}
        self.cells = 0
        trainings: set[str] = set()
        for cell, result in finished:
            self.cells += 1
            self.learn(cell, "cell", result["cost"].get("attack_seconds"))
            if result["training"] not in trainings:
                trainings.add(result["training"])
                self.learn(cell, "train", result["cost"].get("seconds"))

    def learn(self, cell: Cell, kind: str, seconds: float | None) -> None:
        """One more measured duration."""
        if seconds is not None:
            for level, likeness in enumerate(LIKENESS):
                self.seen.setdefault((kind, level, likeness(cell)), []).append(seconds)

    def guess(self, task: Task) -> float | None:
        """Seconds of one task: the mean of the most alike ones."""
        for level, likeness in enumerate(LIKENESS):
            known = self.seen.get((task.kind, level, likeness(task.cell)))
            if known:
                return sum(known) / len(known)
        return None

    def remaining(self, tasks: Iterable[Task], jobs: int) -> Duration:
        """Wall time of these tasks: evenly spread, and at least the longest training with one of its attacks."""
        guesses = [self.guess(task) for task in tasks]
        known = [g for g in guesses if g is not None]
        if len(known) < len(guesses):
            return Duration(None, self.cells)
        return Duration(max(sum(known) / jobs, max(known, default=0.0)), self.cells)
