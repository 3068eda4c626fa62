"""What is there to compute, and what comes next? Trainings first, then the cells that stand on each. No processes here.

A training is computed once for all cells that share it; a worker goes on with the cells of the training that it holds
in memory, and starts another training before it takes cells from somebody else's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fedsec.config import Cell


@dataclass(frozen=True)
class Task:
    """One piece of work for a worker: a training, or one cell on a finished training."""

    kind: Literal["train", "cell"]
    training: str
    """Content hash of the training."""
    cell: Cell
    """The cell; of a training one that stands on it, and that wants all its updates where any does."""
    keep: tuple[int, ...] = ()
    """Rounds whose model the attacks on this training want to see."""

    @property
    def label(self) -> str:
        """For people: `training dp:epsilon=3, seed 0`."""
        if self.kind == "train":
            return f"training {self.cell.label()}, seed {self.cell.seed}"
        return f"{self.cell.attack or 'evaluation'} on {self.cell.label()}, seed {self.cell.seed}"


class Schedule:
    """Hands out tasks in an order that shares trainings.

    Args:
        cells: those to compute, in the order in which they were asked.
        training_of: cell id -> content hash of its training.
        keep: training -> rounds to keep.
        watching: ids of the cells whose attack reads all updates of the training, which are recorded only on demand.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        training_of: Mapping[str, str],
        keep: Mapping[str, tuple[int, ...]],
        watching: frozenset[str] = frozenset(),
    ) -> None:
        self.waiting: dict[str, list[Task]] = {}
        self.ready: dict[str, list[Task]] = {}
        self.untrained: list[Task] = []
        for cell in cells:
            key = training_of[cell.key()]
            if key not in self.waiting:
                self.waiting[key] = []
                group = [c for c in cells if training_of[c.key()] == key]
                asking = next((c for c in group if c.key() in watching), cell)
                self.untrained.append(Task("train", key, asking, keep.get(key, ())))
            self.waiting[key].append(Task("cell", key, cell, keep.get(key, ())))

    def next(self, held: str | None = None) -> Task | None:
        """The next task for a worker that holds the training `held`; None where none can start now."""
        if held is not None and self.ready.get(held):
            return self._take(held)
        if self.untrained:
            return self.untrained.pop(0)
        longest = max(self.ready, key=lambda key: len(self.ready[key]), default=None)
        return self._take(longest) if longest is not None else None

    def trained(self, key: str) -> None:
        """A training is finished: its cells can start."""
        self.ready[key] = self.waiting.pop(key)

    def abandoned(self, key: str) -> list[Task]:
        """A training failed: the cells that would have stood on it, which are dropped."""
        return self.waiting.pop(key)

    def remaining(self) -> Iterable[Task]:
        """All tasks that were not handed out."""
        yield from self.untrained
        for tasks in (*self.waiting.values(), *self.ready.values()):
            yield from tasks

    def _take(self, key: str) -> Task:
        task = self.ready[key].pop(0)
        if not self.ready[key]:
            del self.ready[key]
        return task
