"""Which entries of an upload arrived, which of them can be simulated, and how coarsely is each written down?

Masks and rounding cells that follow the data are not known beforehand: they are read off the upload itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedsec.models.base import last_linear
from fedsec.types import Layout, ServerView

from .knowledge import Known
from .trace import Trace, trace

VISIBLE = 3.0
"""Standard deviations of noise that a sent entry must stand out by, where unsent ones carry noise too."""
EMPTY = 8.0
"""An entry below so many standard deviations of its rounding is zero."""


class Cut(NamedTuple):
    """The last place that a random module leaves untouched: the output of a fully connected layer."""

    module: str
    bias: str
    """Of that layer."""
    before: frozenset[str]
    """Parameters up to there, its own included."""


def arrived(view: ServerView, known: Known) -> Tensor | None:
    """(P,) bool: the entries of the update that were sent; None: all, or nobody can tell.

    Unsent entries are exactly zero. Where noise was put on top of them, only those count as sent that stand out of it.
    In a sum over clients, each of which has left out others, those remain that anybody sent.
    """
    mask = known.mask
    if known.sparse:
        delta = view.updates[0].delta
        sent = delta != 0
        if bool(sent.all()) and known.update_std > 0:
            sent = delta.abs() > VISIBLE * known.update_std
        mask = sent if mask is None else mask.to(sent.device) & sent
    return mask


def rounding_std(view: ServerView, known: Known) -> Tensor | float | None:
    """Standard deviation of the quantisation error on each entry of the update; None: its size cannot be told.

    A cell of width s has variance s²/12 when rounded to the nearest. Rounded at random it is s²/6, the mean over all
    places in the cell.
    """
    step: Tensor | float = 0.0
    if known.quantisation_step is not None:
        step = known.quantisation_step
    elif known.quantisation_levels is not None:
        if view.clients_in_sum > 1:
            return None
        step = _visible_step(view.updates[0].delta, view.layout, known)
    cells: float = ((6.0 if known.stochastic_rounding else 12.0) * view.clients_in_sum) ** 0.5
    return step / cells


def _visible_step(delta: Tensor, layout: Layout, known: Known) -> Tensor:
    """(P,) the largest magnitude over the number of levels, of each tensor or of the whole vector."""
    levels = known.quantisation_levels
    assert levels is not None
    if known.quantisation_scope == "vector":
        return (delta.abs().max() / levels).expand_as(delta)
    parts = torch.split(delta, list(layout.sizes))
    return torch.cat([(part.abs().max() / levels).expand_as(part) for part in parts])


def without_pruned(
    mask: Tensor | None, gradient: Tensor, floor: Tensor, layout: Layout, layer: str, *, visible: bool
) -> Tensor:
    """Drop the pruned columns of a layer's weight gradient from a mask.

    Args:
        mask: (P,) bool, or None.
        gradient: g (P,), without weight decay.
        floor: (P,) its rounding.
        layout: of both.
        layer: name of a fully connected layer.
        visible: pruned columns are zero in g; else all columns have to go.
    """
    mask = torch.ones_like(gradient, dtype=torch.bool) if mask is None else mask.clone()
    name = f"{layer}.weight"
    if name not in layout.names:
        return mask
    empty = (layout.views(gradient)[name].abs() <= EMPTY * layout.views(floor)[name]).all(0)
    layout.views(mask)[name][:, empty | (not visible)] = False
    return mask


def resolve_layer(model: nn.Module, name: str) -> str:
    """A layer's name in the model; "head" stands for the last fully connected one."""
    return last_linear(model) if name == "head" else name


def logit_layer(model: nn.Module, image: Tensor) -> tuple[str | None, str | None]:
    """Names of weight and bias of the last fully connected layer on an image's way; None where there is none."""
    recorded = trace(model, image)
    linear = recorded.find("linear")
    if not linear:
        return None, None
    call = recorded.calls[linear[-1]]
    return recorded.name_of(call.args[1]), recorded.name_of(call.argument(2, "bias"))


def find_cut(model: nn.Module, image: Tensor, stochastic: tuple[str, ...], layout: Layout) -> Cut | None:
    """Where to stop in front of a module that draws at random; None: nothing before it can be told apart.

    The cut is the output of the module's first fully connected layer, which is not random yet. Whatever happens behind
    it, random or hidden, the gradients of the parameters up to there are those of ⟨δ, output⟩, and for one image δ is
    the layer's own bias gradient: known, with the labels and all draws in it.
    """
    drawn = [n for n, _ in model.named_modules() if any(n == s or n.endswith(f".{s}") for s in stochastic)]
    recorded = trace(model, image)
    before: list[str] = []
    for call in recorded.calls:
        used = _parameters(recorded, call.args, call.kwargs)
        before += used
        owner = used[0].rpartition(".")[0] if used else ""
        if call.name != "linear" or not any(owner == d or owner.startswith(f"{d}.") for d in drawn):
            continue
        bias = recorded.name_of(call.argument(2, "bias"))
        shared = frozenset(before) & set(layout.names)
        return Cut(owner, bias, shared) if bias in shared else None
    return None


def _parameters(recorded: Trace, args: tuple[object, ...], kwargs: object) -> list[str]:
    values = [*args, *(kwargs.values() if isinstance(kwargs, dict) else ())]
    return [name for value in values if (name := recorded.name_of(value)) is not None]
