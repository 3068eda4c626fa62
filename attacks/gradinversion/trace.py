"""Which operations turn the image into logits, and do they form a chain?

One forward pass is recorded at the level of torch functions, so that modules, functional calls and the normalisation
of the wrapper all look alike; no symbolic tracing, hence no trouble with control flow.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Call:
    """One torch function that took part in the forward pass."""

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    source: Tensor | None
    """The activation that entered; None where several met (a skip connection, attention)."""
    output: Any

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, whether it was passed by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)


class _Recorder(TorchFunctionMode):
    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.alive: dict[int, Tensor] = {id(x): x}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        flat = [leaf for a in (*args, *kwargs.values()) for leaf in (a if isinstance(a, list | tuple) else (a,))]
        inputs = [a for a in flat if isinstance(a, Tensor) and id(a) in self.alive]
        outputs = [o for o in (out if isinstance(out, list | tuple) else (out,)) if isinstance(o, Tensor)]
        if inputs and outputs:
            source = inputs[0] if len({id(i) for i in inputs}) == 1 else None
            name = getattr(func, "__name__", str(func)).lstrip("_")
            self.calls.append(Call(name, args, kwargs, source, out))
            self.alive.update({id(o): o for o in outputs})
        return out


@dataclass(frozen=True)
class Trace:
    """A recorded forward pass."""

    calls: tuple[Call, ...]
    image: Tensor
    parameter_names: Mapping[int, str]
    """id of a parameter -> its name."""

    def name_of(self, tensor: Any) -> str | None:
        """The parameter that this tensor is, if it is one."""
        return self.parameter_names.get(id(tensor))

    def find(self, *names: str) -> list[int]:
        """Positions of the calls with one of these names."""
        return [i for i, call in enumerate(self.calls) if call.name in names]

    def chain_break(self, stop: int) -> int | None:
        """The first call before `stop` that does not take exactly the output of the call before it."""
        current: Any = self.image
        for i, call in enumerate(self.calls[:stop]):
            if call.source is not current:
                return i
            current = call.output
        return None


def trace(model: nn.Module, image: Tensor) -> Trace:
    """Record one forward pass of `model` on `image` (1, C, H, W)."""
    recorder = _Recorder(image)
    with torch.no_grad(), recorder:
        model(image)
    return Trace(tuple(recorder.calls), image, {id(p): n for n, p in model.named_parameters()})
