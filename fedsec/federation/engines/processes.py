"""One process a core with one thread each; images and model vectors lie in shared memory.

A worker that dies or hangs costs its client the round and nothing else: the worker is replaced.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.multiprocessing as mp
from torch import Tensor

from fedsec.errors import FedsecError, RunError
from fedsec.federation.engines.base import ClientData, Engine, reason
from fedsec.federation.round import client_turn
from fedsec.federation.seats import Reply, Seats, Turn
from fedsec.machine import COMPILER, prepare_for_small_networks, usable_cores
from fedsec.types import Payload, Update, sorted_by_client

START_TIMEOUT = 120.0
"""Seconds that a worker may take to import torch and receive its data."""


class Processes(Engine):
    """A pool of workers that take turns as they become free, the longest first.

    Args:
        seats: sent once to every worker.
        data: the clients' images; moved to shared memory.
        workers: number of processes; by default one for each core this process may use.
        timeout: seconds after which a client's turn is given up.
    """

    def __init__(
        self, seats: Seats, data: ClientData, workers: int | None = None, timeout: float | None = None
    ) -> None:
        self.seats = seats
        self.data = data
        # One piece of shared memory for all images, whoever's they are: each piece takes a file descriptor.
        self.columns = _shared([x for x, _ in data]), _shared([y for _, y in data])
        self.timeout = timeout
        self.context = mp.get_context("forkserver")
        self.context.set_forkserver_preload(["fedsec.federation.engines.processes", COMPILER])
        # The common broadcast; and a row for each worker, in which an update comes back.
        count = min(workers or usable_cores(), len(data))
        self.broadcast = torch.empty(seats.sharing.params.size).share_memory_()
        self.deltas = torch.empty(count, seats.sharing.params.size).share_memory_()
        self.pool = [self._start(row) for row in range(count)]

    def _start(self, row: int) -> _Worker:
        ours, theirs = self.context.Pipe()
        sizes = [len(x) for x, _ in self.data]
        arguments = (theirs, self.seats, self.columns, sizes, self.broadcast, self.deltas[row])
        process = self.context.Process(target=_serve, args=arguments, daemon=True)
        try:
            process.start()
        except RuntimeError as error:
            raise RunError(
                "worker processes cannot start: put the call under `if __name__ == '__main__':` or use engine='serial'"
            ) from error
        theirs.close()
        return _Worker(process, ours, row)

    def train(self, turns: Sequence[Turn]) -> list[Reply]:
        """All turns, as workers become free."""
        return list(self._replies(turns, deque(sorted(turns, key=lambda t: -len(self.data[t.client][0])))))

    def stream(self, turns: Sequence[Turn]) -> Iterator[Reply]:
        """In client order, with no more than two replies a worker waiting for an earlier one."""
        expected = deque(sorted(t.client for t in turns))
        waiting: dict[int, Reply] = {}
        window = 2 * len(self.pool)

        def may_start(turn: Turn) -> bool:
            return len(expected) < window or turn.client < expected[window - 1] or turn.client == expected[0]

        for reply in self._replies(turns, deque(sorted_by_client(turns)), may_start):
            waiting[reply.client] = reply
            while expected and expected[0] in waiting:
                yield waiting.pop(expected.popleft())

    def _replies(
        self, turns: Sequence[Turn], queue: deque[Turn], may_start: Callable[[Turn], bool] = lambda turn: True
    ) -> Iterator[Reply]:
        # Turns carry the broadcast only where a malicious server sent something else than the common model.
        common = turns[0].params if turns else None
        if common is not None:
            self.broadcast.copy_(common)
        idle = list(self.pool)
        busy: dict[int, _Worker] = {}
        while queue or busy:
            while queue and idle and may_start(queue[0]):
                worker = idle.pop()
                worker.give(queue.popleft(), common)
                busy[id(worker)] = worker
            for worker in self._finished(list(busy.values())):
                del busy[id(worker)]
                reply = worker.take(self.deltas)
                if reply.failure is not None and not worker.process.is_alive():
                    self.pool.remove(worker)
                    worker = self._start(worker.row)
                    self.pool.append(worker)
                idle.append(worker)
                yield reply

    def _finished(self, busy: list[_Worker]) -> list[_Worker]:
        """Wait until a worker has replied, died, or run out of time (then it is killed)."""
        handles: dict[Any, _Worker] = {w.pipe: w for w in busy} | {w.process.sentinel: w for w in busy}
        patience = None
        if self.timeout is not None:
            patience = max(0.0, min(w.deadline(self.timeout) for w in busy) - time.monotonic())
        ready = {id(w): w for handle in wait(list(handles), patience) for w in [handles[handle]]}
        if self.timeout is not None:
            for worker in busy:
                if id(worker) not in ready and time.monotonic() >= worker.deadline(self.timeout):
                    worker.kill(f"timeout: no reply within {self.timeout:g} s")
                    ready[id(worker)] = worker
        return list(ready.values())

    def close(self) -> None:
        """Stop all workers."""
        for worker in self.pool:
            worker.stop()
        self.pool = []


def _shared(parts: Sequence[Tensor]) -> Tensor:
    """All parts one after the other in shared memory; they become views of it, so that nothing is there twice."""
    rows = sum(len(part) for part in parts)
    like = torch.channels_last if parts[0].ndim == 4 else torch.contiguous_format
    whole: Tensor = (
        torch.empty((rows, *parts[0].shape[1:]), dtype=parts[0].dtype).contiguous(memory_format=like).share_memory_()
    )
    for part, view in zip(parts, whole.split([len(part) for part in parts]), strict=True):
        view.copy_(part)
        part.set_(view)
    return whole


class _Worker:
    """The parent's end of one worker process."""

    def __init__(self, process: Any, pipe: Connection, row: int) -> None:
        self.process = process
        self.pipe = pipe
        self.row = row
        self.turn: Turn | None = None
        self.since = 0.0
        self.ready = False
        self.verdict: str | None = None

    def deadline(self, timeout: float) -> float:
        return self.since + timeout

    def give(self, turn: Turn, common: Tensor | None) -> None:
        if not self.ready:  # its imports are not the client's fault: the clock starts when the worker is up
            if not self.pipe.poll(START_TIMEOUT):
                raise RunError(f"a worker process did not start within {START_TIMEOUT:g} s; use engine=serial")
            with contextlib.suppress(EOFError):
                self.pipe.recv()
            self.ready = True
        self.turn = turn
        self.since = time.monotonic()
        light = dataclasses.replace(turn, params=turn.params[:0]) if turn.params is common else turn
        try:
            self.pipe.send(light)
        except (BrokenPipeError, OSError):
            self.process.join(5)

    def take(self, deltas: Tensor) -> Reply:
        """The reply, with the update's vector read from shared memory."""
        assert self.turn is not None
        client, self.turn = self.turn.client, None
        try:
            if self.verdict is not None or not self.pipe.poll():
                raise EOFError
            reply, shared = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(5)
            code = self.process.exitcode
            return Reply(client, None, failure=self.verdict or f"its worker process died (exit code {code})")
        if isinstance(reply, FedsecError):
            raise reply
        assert isinstance(reply, Reply)
        return dataclasses.replace(reply, content=_swap(reply.content, deltas[self.row].clone())) if shared else reply

    def kill(self, verdict: str) -> None:
        self.verdict = verdict
        self.process.kill()
        self.process.join(5)

    def stop(self) -> None:
        with contextlib.suppress(BrokenPipeError, OSError):
            self.pipe.send(None)
        self.process.join(2)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self.pipe.close()


def _swap(content: Update | Payload | None, delta: Tensor) -> Update | Payload | None:
    """Replace the vector of an update in clear, wherever it sits."""
    if isinstance(content, Update):
        return dataclasses.replace(content, delta=delta)
    assert isinstance(content, Payload)
    return dataclasses.replace(content, content=_swap(content.content, delta))


def _serve(
    pipe: Connection,
    seats: Seats,
    columns: tuple[Tensor, Tensor],
    sizes: list[int],
    broadcast: Tensor,
    delta: Tensor,
) -> None:
    """A worker's life: one turn after the other until told to stop or the parent is gone."""
    prepare_for_small_networks()
    data = tuple(zip(*(column.split(sizes) for column in columns), strict=True))
    # Tensors arrive in shared memory: without a copy, all workers would train the same parameters at once.
    seats = dataclasses.replace(seats, model=copy.deepcopy(seats.model))
    try:
        pipe.send(None)
        while (turn := pipe.recv()) is not None:
            if turn.params.numel() == 0:
                turn = dataclasses.replace(turn, params=broadcast)
            pipe.send(_carry_out(seats, turn, data, delta))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        os._exit(0)


def _carry_out(seats: Seats, turn: Turn, data: ClientData, delta: Tensor) -> tuple[Reply | FedsecError, bool]:
    """A turn's reply, and whether its update's vector was left in shared memory instead of the reply."""
    try:
        reply = client_turn(seats, turn, *data[turn.client])
    except FedsecError as error:
        return error, False
    except Exception as error:
        return Reply(turn.client, None, failure=reason(error)), False
    update = reply.content.content if isinstance(reply.content, Payload) else reply.content
    if not isinstance(update, Update) or update.delta.shape != delta.shape:
        return reply, False
    delta.copy_(update.delta)
    return dataclasses.replace(reply, content=_swap(reply.content, torch.empty(0))), True
