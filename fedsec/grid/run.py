"""The one entry point behind `fedsec sweep` and `fedsec.sweep`: all cells of a grid, resumed where they were left."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedsec.api import finished_cells, with_shortcuts
from fedsec.config import Cell, expand
from fedsec.errors import ConfigError
from fedsec.grid.estimate import Clock, Duration, in_words
from fedsec.grid.tasks import Schedule, Task
from fedsec.grid.workers import Outcome, Workers
from fedsec.machine import usable_cores
from fedsec.progress import Progress
from fedsec.store import RunFolder, default_folder

REBUILD_SECONDS = 20.0
"""results.jsonl is brought up to date this often."""


@dataclass
class Plan:
    """What a sweep has to do, before it does anything."""

    cells: list[Cell]
    training_of: dict[str, str]
    """Cell id -> content hash of its training."""
    keep: dict[str, tuple[int, ...]]
    folder: Path
    tables: Mapping[str, Any]
    jobs: int
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)
    watching: frozenset[str] = frozenset()
    """Ids of the cells whose attack reads all updates of its training."""

    @property
    def open(self) -> list[Cell]:
        """Cells without a result."""
        return [cell for cell in self.cells if cell.key() not in self.finished]

    def schedule(self) -> Schedule:
        """Who is still to be computed."""
        return Schedule(self.open, self.training_of, self.keep, self.watching)

    def clock(self) -> Clock:
        """What the finished cells took."""
        return Clock((cell, self.finished[cell.key()]) for cell in self.cells if cell.key() in self.finished)

    def duration(self) -> Duration:
        """Estimate of the whole rest; trainings that lie on the disk cost nothing."""
        kept = {path.parent.name for path in self.folder.glob("artifacts/train-*/training.json")}
        tasks = [t for t in self.schedule().remaining() if not (t.kind == "train" and t.training in kept)]
        return self.clock().remaining(tasks, self.jobs)


def sweep(
    tables: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    jobs: int | None = None,
    max_minutes: float | None = None,
    progress: Progress | None = None,
    name: str | None = None,
    **shortcuts: Any,
) -> dict[str, Any]:
    """Compute all cells of a grid in several processes; trainings that cells share are done once.

    The same call again computes only what is missing, and tries failed cells again.

    Args:
        tables: the configuration, as a recipe in TOML holds it; lists span the grid.
        out: run folder; by default `runs/<name>-<hash>`.
        data_dir: where data sets are looked up first.
        jobs: processes of one thread each; by default one a core, on a GPU one.
        max_minutes: nothing new is started after so many minutes, and what is in progress then is given up.
        progress: told how far it is.
        name: of the default run folder.
        shortcuts: as of `fedsec.run`.

    Returns:
        `{"run": folder, "cells": [...], "failed": [...], "unfinished": n}`: results, why others have none, and how
        many were not reached.

    Raises:
        FedsecError: the grid cannot be carried out as written. A cell that fails raises nothing.
    """
    asked = plan(tables, out=out, jobs=jobs, name=name, **shortcuts)
    folder = RunFolder(asked.folder)
    with folder.alone():
        return carry_out(asked, folder, Path(data_dir) if data_dir else None, progress or Progress(), max_minutes)


def carry_out(
    asked: Plan, folder: RunFolder, data_dir: Path | None, progress: Progress, max_minutes: float | None = None
) -> dict[str, Any]:
    """Compute what a plan still lacks, in a folder that is held `alone`; returns what `sweep` returns."""
    folder.begin(asked.tables, asked.cells, asked.cells[0].federation.device)
    _sweep_up(folder)
    asked.finished = finished_cells(asked.cells, folder, data_dir, progress)
    try:
        failed = _compute(asked, folder, data_dir, progress, max_minutes)
    finally:
        folder.rebuild()
    done = [asked.finished[c.key()] for c in asked.cells if c.key() in asked.finished]
    return {
        "run": str(folder.path),
        "cells": done,
        "failed": failed,
        "unfinished": len(asked.cells) - len(done) - len(failed),
    }


def plan(
    tables: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    jobs: int | None = None,
    name: str | None = None,
    **shortcuts: Any,
) -> Plan:
    """The cells of a grid and what is known of them; computes and writes nothing.

    Raises:
        ConfigError: an unknown plugin or parameter, or a stack that cannot work.
    """
    asked = serial_by_default(with_shortcuts(tables or {}, shortcuts))
    cells = expand(asked)
    return plan_of(cells, asked, Path(out) if out else None, jobs, name)


def serial_by_default(tables: dict[str, Any]) -> dict[str, Any]:
    """The cells use the processes up, so that a federation gets one."""
    federation = tables.get("federation", {})
    if federation.get("engine", "auto") == "auto":
        return {**tables, "federation": {**federation, "engine": "serial"}}
    return tables


def plan_of(
    asked_cells: Sequence[Cell], tables: Mapping[str, Any], out: Path | None, jobs: int | None, name: str | None = None
) -> Plan:
    """As `plan`, of cells that need not be resolved."""
    from fedsec.experiment import shared_rounds, training_key_of, wants_history
    from fedsec.federation.assemble import resolve

    cells = [resolve(cell) for cell in asked_cells]
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs={jobs}: at least one process has to work")
    count = jobs or (usable_cores() if all(c.federation.device == "cpu" for c in cells) else 1)
    if count > 1 and any(c.federation.engine == "processes" for c in cells):
        raise ConfigError("engine=processes starts a process a core in each job; leave engine out, or use --jobs 1")
    training_of = {c.key(): training_key_of(c) for c in cells}
    folder = out or default_folder(cells, name=name)
    watching = frozenset(c.key() for c in cells if wants_history(c))
    result = Plan(cells, training_of, shared_rounds(cells), folder, tables, count, watching=watching)
    if (folder / "cells").is_dir():
        opened = RunFolder.open(folder)
        result.finished = {c.key(): done for c in cells if (done := opened.finished(c.key())) is not None}
    return result


def _compute(
    asked: Plan, folder: RunFolder, data_dir: Path | None, progress: Progress, max_minutes: float | None
) -> list[dict[str, Any]]:
    """Work through the schedule; returns the records of failed cells."""
    from fedsec.federation.assemble import dataset_of

    todo = asked.open
    for cell in {(c.data.name, c.data.size, c.data.splits): c for c in todo}.values():
        dataset_of(cell, data_dir)  # a data set that is not there stops all of it, at once
    end = time.monotonic() + 60 * max_minutes if max_minutes is not None else None
    progress.stage("cells", len(asked.cells))
    progress.advance(len(asked.finished))
    if not todo:
        return []
    keeper = Keeper(asked, folder, progress)
    schedule = asked.schedule()
    workers = Workers(min(asked.jobs, len(todo)), folder.path / "artifacts", data_dir)
    try:
        while True:
            late = end is not None and time.monotonic() >= end
            for worker in workers.idle():
                task = None if late else schedule.next(worker.held)
                if task is not None:
                    worker.submit(task)
            if late or not workers.busy():
                break
            for outcome in workers.wait(None if end is None else max(0.0, end - time.monotonic())):
                keeper.take(outcome, schedule)
            keeper.show(workers.busy(), list(schedule.remaining()))
    finally:
        workers.close()
    return keeper.failed


class Keeper:
    """Writes down what comes back from the workers."""

    def __init__(self, asked: Plan, folder: RunFolder, progress: Progress) -> None:
        self.asked, self.folder, self.progress = asked, folder, progress
        self.failed: list[dict[str, Any]] = []
        self.clock = asked.clock()
        self.rebuilt = time.monotonic()

    def take(self, outcome: Outcome, schedule: Schedule) -> None:
        """Keep a result; record a failure, of a training for every cell that would have stood on it."""
        task = outcome.task
        if outcome.failed:
            lost = schedule.abandoned(task.training) if task.kind == "train" else [task]
            for item in lost:
                self._fail(item.cell, outcome, task.kind)
            return
        if task.kind == "train":
            schedule.trained(task.training)
            if outcome.value:  # it was computed, not read
                self.clock.learn(task.cell, "train", outcome.seconds)
            return
        key = task.cell.key()
        self.asked.finished[key] = outcome.value
        self.clock.cells += 1
        self.clock.learn(task.cell, "cell", outcome.seconds)
        now = time.monotonic()
        self.folder.finish(key, outcome.value, rebuild=now - self.rebuilt > REBUILD_SECONDS)
        self.rebuilt = now if now - self.rebuilt > REBUILD_SECONDS else self.rebuilt

    def _fail(self, cell: Cell, outcome: Outcome, stage: str) -> None:
        record = {
            "id": cell.key(),
            "attack": cell.attack.to_table() if cell.attack else None,
            "defense": [spec.to_table() for spec in cell.defense],
            "seed": cell.seed,
            "stage": "training" if stage == "train" else "attack",
            "reason": outcome.reason,
            "traceback": outcome.trace.splitlines(),
        }
        self.folder.fail(cell.key(), record)
        self.failed.append(record)
        who = f"{cell.attack or 'no attack'} on {cell.label()}, seed {cell.seed}"
        self.progress.message(f"failed: {who}: {outcome.reason}")

    def show(self, busy: Sequence[Task], waiting: Sequence[Task]) -> None:
        """How far it is, what is being computed, and how long the rest takes."""
        rest = self.clock.remaining([*waiting, *busy], self.asked.jobs).seconds
        notes = [task.label for task in busy]
        if rest is not None and busy:
            notes.append(f"{in_words(rest)} left")
        if self.failed:
            notes.append(f"{len(self.failed)} failed")
        self.progress.advance(len(self.asked.finished) + len(self.failed), "; ".join(notes))


def _sweep_up(folder: RunFolder) -> None:
    """Remove what a killed process left half-written; nobody else is at work in this folder."""
    left = [path for place in (".", "artifacts", "cells", "failed") for path in (folder.path / place).glob(".*")]
    for path in left:
        if path.name == ".lock":
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
