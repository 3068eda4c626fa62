"""Processes of one thread each that compute tasks. One that dies costs its task, with the reason, and is replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
import traceback
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from fedsec.errors import reason_of
from fedsec.grid.tasks import Task


@dataclass(frozen=True)
class Outcome:
    """What became of a task: a result, or the reason why there is none."""

    task: Task
    value: Any = None
    reason: str = ""
    trace: str = ""
    seconds: float = 0.0

    @property
    def failed(self) -> bool:
        """There is no result."""
        return bool(self.reason)


class Workers:
    """A fixed number of worker processes.

    Args:
        count: processes; each uses one thread.
        artifacts: where trainings and reconstructions are kept.
        data_dir: where data sets are looked up first.
    """

    def __init__(self, count: int, artifacts: Path, data_dir: Path | None) -> None:
        self.context = get_context("forkserver")
        self.context.set_forkserver_preload(["fedsec.experiment"])
        self.arguments = (artifacts, data_dir)
        self.pool = [self._start() for _ in range(count)]

    def _start(self) -> _Worker:
        ours, theirs = self.context.Pipe()
        # Not a daemon: an attack may start processes of its own.
        process = self.context.Process(target=serve, args=(theirs, *self.arguments), daemon=False)
        process.start()
        theirs.close()
        return _Worker(process, ours)

    def idle(self) -> list[_Worker]:
        """Workers without a task."""
        return [worker for worker in self.pool if worker.task is None]

    def busy(self) -> list[Task]:
        """Tasks in progress."""
        return [worker.task for worker in self.pool if worker.task is not None]

    def wait(self, timeout: float | None) -> list[Outcome]:
        """Outcomes that have come in; empty when the time is over first."""
        by_pipe = {worker.pipe: worker for worker in self.pool if worker.task is not None}
        return [self._outcome(by_pipe[pipe]) for pipe in wait(list(by_pipe), timeout) if isinstance(pipe, Connection)]

    def _outcome(self, worker: _Worker) -> Outcome:
        task = worker.task
        assert task is not None
        worker.task = None
        seconds = time.monotonic() - worker.since
        try:
            value, reason, trace = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join(5)
            code = worker.process.exitcode
            how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
            extra = "; is the memory full? Try --jobs 1" if code == -signal.SIGKILL else ""
            worker.close()
            self.pool[self.pool.index(worker)] = self._start()
            return Outcome(task, reason=f"its process ended ({how}){extra}")
        return Outcome(task, value, reason, trace, seconds)

    def close(self) -> None:
        """End all workers, in the middle of a task too."""
        for worker in self.pool:
            worker.close()


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    task: Task | None = None
    held: str | None = None
    """The training in its memory."""
    since: float = 0.0

    def submit(self, task: Task) -> None:
        self.task, self.held, self.since = task, task.training, time.monotonic()
        # A worker that has died meanwhile is noticed by `wait`.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.pipe.send(task)

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError, OSError):
            if self.task is None:
                self.pipe.send(None)
        self.pipe.close()
        if self.task is not None:
            self.process.terminate()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def serve(pipe: Connection, artifacts: Path, data_dir: Path | None) -> None:
    """A worker: computes the tasks that come through the pipe until None comes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the main process decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    stages: dict[str, Any] = {}
    while (task := pipe.recv()) is not None:
        for other in stages.keys() - {task.training}:
            del stages[other]
        pipe.send(attempt(task, artifacts, data_dir, stages))


def attempt(task: Task, artifacts: Path, data_dir: Path | None, stages: dict[str, Any]) -> tuple[Any, str, str]:
    """A task's value, or the reason why it has none and the traceback."""
    from fedsec.experiment import open_stage, run_cell

    try:
        if task.kind == "train":
            return open_stage(task.cell, artifacts, data_dir, stages=stages, keep=task.keep).computed, "", ""
        return run_cell(task.cell, artifacts, data_dir, stages=stages, keep=task.keep, workers=1), "", ""
    except Exception as error:
        return None, reason_of(error), traceback.format_exc()


def _end_with_parent() -> None:
    """Without this a worker whose parent was killed would go on, and write beside the next sweep."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
