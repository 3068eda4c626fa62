"""How a client makes its upload smaller: it leaves entries out, or writes them with few bits. Claims no privacy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from fedsec.defense import Defense
from fedsec.errors import RunError
from fedsec.types import FederationPlan, Layout, RoundContext, Update, Wire

INDEX_BYTES = 4
SCALE_BYTES = 4


@dataclass(frozen=True)
class TopK(Defense):
    """The entries of largest magnitude are sent, all others are left out (Aji & Heafield 2017).

    There is no error feedback, which would send later what was left out before: it needs a client that remembers, and
    clients here keep nothing between rounds but their personal layers. On the wire are float32 values and their
    positions, as indices or as one bit an entry, whichever is shorter.
    """

    name: ClassVar[str] = "topk"
    protects: ClassVar[str] = "bandwidth, by sending the largest entries alone; no privacy"

    fraction: Annotated[float, Field(gt=0, le=1, description="share of the entries that is sent")] = 0.1

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        """Zero for what is not sent; at fraction 1 the update itself."""
        delta = update.delta
        sent = max(1, round(self.fraction * delta.numel()))
        if sent >= delta.numel():
            return update
        largest = delta.abs().topk(sent).indices
        kept = torch.zeros_like(delta).scatter_(0, largest, delta[largest])
        positions = min(INDEX_BYTES * sent, -(-delta.numel() // 8))
        wire = update.wire or Wire(delta.numel())
        return replace(update, delta=kept, wire=replace(wire, values=sent, overhead=wire.overhead + positions))

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """That entries are missing; which ones the upload itself shows."""
        return {"sparse": True} if self.fraction < 1 else {}


@dataclass(frozen=True)
class Int8(Defense):
    """Uniform quantisation, symmetric about zero: the entries are whole multiples of a step (Alistarh et al. 2017).

    The step is the largest magnitude over 2^(bits−1) − 1, of each tensor or of the whole vector, and travels with it.
    """

    name: ClassVar[str] = "int8"
    protects: ClassVar[str] = "bandwidth, by sending few bits an entry; no privacy"

    bits: Annotated[int, Field(ge=2, le=16, description="bits an entry, sign included")] = 8
    stochastic: Annotated[
        bool, Field(description="round up or down at random, right on average; false: to the nearest step")
    ] = False
    granularity: Annotated[
        Literal["tensor", "vector"], Field(description="one step for each tensor, or one for all")
    ] = "tensor"
    layout: Layout | None = field(default=None, repr=False, metadata={"internal": True})
    """Filled in by `calibrate`."""

    @property
    def levels(self) -> int:
        """Largest multiple of the step."""
        return int(2 ** (self.bits - 1) - 1)

    def calibrate(self, plan: FederationPlan) -> Self:
        """Remember where each tensor lies."""
        return replace(self, layout=plan.layout)

    def on_upload(self, update: Update, ctx: RoundContext) -> Update:
        """Round to the steps."""
        generator = ctx.generator("int8-rounding", update.delta.device) if self.stochastic else None
        parts = [quantise(part, self.levels, generator) for part in self._parts(update.delta)]
        wire = update.wire or Wire(update.delta.numel())
        overhead = wire.overhead + SCALE_BYTES * len(parts)
        return replace(update, delta=torch.cat(parts), wire=replace(wire, bits=self.bits, overhead=overhead))

    def public_knowledge(self, client: int) -> Mapping[str, Any]:
        """Levels, reach of a step, and kind of rounding; the steps themselves show in the upload."""
        return {
            "quantisation_levels": self.levels,
            "quantisation_scope": self.granularity,
            "stochastic_rounding": self.stochastic,
        }

    def _parts(self, delta: Tensor) -> tuple[Tensor, ...]:
        if self.granularity == "vector":
            return (delta,)
        if self.layout is None:
            raise RunError("int8: a step for each tensor needs their layout; call calibrate(plan) before training")
        return torch.split(delta, list(self.layout.sizes))


def quantise(vector: Tensor, levels: int, generator: torch.Generator | None = None) -> Tensor:
    """Round to whole multiples, at most `levels`, of max|v|/levels.

    Args:
        vector: (d,).
        levels: at least 1.
        generator: rounds up with the probability that is the remainder; None: to the nearest, half to even.

    Returns:
        (d,), off by at most a step (stochastic) or half of it.
    """
    step = vector.abs().max() / levels if vector.numel() else vector.new_zeros(())
    if not float(step) > 0:
        return torch.zeros_like(vector)
    exact = vector / step
    if generator is None:
        whole = exact.round()
    else:
        whole = (exact + torch.rand(vector.shape, generator=generator, device=vector.device)).floor()
    return whole.clamp(-levels, levels) * step
