"""How much of its budget has a search used: CPU seconds, or work counted in a way that every machine repeats?

CPU seconds are what an attacker pays, but two runs never stop at the same step. Counted work is the same on any machine
however busy it is, so that a search which its budget cuts off gives the same images again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from .settings import ClockKind

# Seconds that a core of a common server of 2024 takes with counting, which costs some 10 µs an operation: fitted to
# attacks on LeNet, a small CNN and ResNet-18, good to a factor of two or so, which a budget can bear.
PER_OPERATION = 1.5e-5
PER_FLOP = 5e-11
PER_ENTRY = 2e-10
PER_READING = 1e-6
"""So that a loop without tensors comes to its end, too."""


def _entries(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    if isinstance(value, (tuple, list)):
        return sum(_entries(item) for item in value)
    return 0


def _decomposition(args: tuple[Any, ...]) -> float:
    """Floating-point operations of a factorisation or a solution, some 4·m·n·min(m, n) of the largest matrix."""
    sizes = [a.shape for a in args if isinstance(a, torch.Tensor) and a.ndim >= 2]
    return max((4.0 * s.numel() * min(s[-2:]) for s in sizes), default=0.0)


class WorkMeter(TorchDispatchMode):
    """Counts what the tensor operations under it would take on the reference machine, in `seconds`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seconds = 0.0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        count = flop_registry.get(packet)
        if count is not None:
            flops = float(count(*args, **kwargs, out_val=out))
        else:
            name = packet.__name__
            heavy = "linalg_" in name or "cholesky" in name or "triangular" in name
            flops = _decomposition(args) if heavy and "norm" not in name else 0.0
        self.seconds += PER_OPERATION + PER_FLOP * flops + PER_ENTRY * (_entries(out) + _entries(args))
        return out

    def read(self) -> float:
        """Seconds of work so far."""
        self.seconds += PER_READING
        return self.seconds


_meter: ContextVar[WorkMeter | None] = ContextVar("meter", default=None)


def now() -> float:
    """Seconds on the clock that is in force; only differences mean something."""
    meter = _meter.get()
    return time.process_time() if meter is None else meter.read()


@contextmanager
def clocked(kind: ClockKind) -> Iterator[None]:
    """Count budgets in CPU seconds or in work until the end of the block."""
    if kind == "cpu" or _meter.get() is not None:
        yield
        return
    with WorkMeter() as meter:
        token = _meter.set(meter)
        try:
            yield
        finally:
            _meter.reset(token)


@contextmanager
def uncounted() -> Iterator[None]:
    """Work inside the block is free: for what a process does once and keeps, whoever happens to come first."""
    meter = _meter.get()
    before = 0.0 if meter is None else meter.seconds
    yield
    if meter is not None:
        meter.seconds = before


@dataclass
class Clock:
    """A budget of seconds, CPU time or work as `clocked` says, counted from construction."""

    budget: float
    read: Callable[[], float] = now
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.read()

    @property
    def used(self) -> float:
        """Seconds since the start."""
        return self.read() - self.started

    @property
    def left(self) -> float:
        """Seconds that remain, never negative."""
        return max(0.0, self.budget - self.used)

    @property
    def fraction(self) -> float:
        """Share of the budget that is used up, at most 1."""
        return min(1.0, self.used / self.budget) if self.budget > 0 else 1.0

    def share(self, fraction: float) -> Clock:
        """A new clock with this fraction of what is left."""
        return Clock(self.left * fraction)
