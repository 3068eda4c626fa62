"""What homomorphic and secure aggregation share: one weighted vector a client, a sum that alone is opened.

Every client sends w_k·(Δ_k ‖ buffers_k) and w_k itself inside the encoding, so that no sample count travels in clear;
the opened sum is divided by the opened Σ w_k. Weights are those of the strategy when all clients reply, relative to
the largest: a cap on them has to be fixed before training, since nobody who sees a round's sizes is left to apply it.
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsec.defense import Aggregation, Aggregator
from fedsec.errors import ConfigError, PayloadError
from fedsec.types import FederationPlan, Layout, Payload, RoundContext, Update

Vector = npt.NDArray[np.float64]
MIN_CLIENTS = 3
"""In a sum of two, either of the two learns the other's update by subtracting its own."""
PER_SUM = frozenset({"decrypt", "unmask"})
PROBE_VALUES, PROBE_CLIENTS = 10_000, 10


@dataclass(frozen=True)
class Envelope:
    """What one client hands in: numbers here are public, the rest is unreadable."""

    agreement: bytes
    """Digest of everything that all clients must have in common: keys, parameters, who takes part."""
    values: int
    """Entries of the update."""
    buffers: int
    body: tuple[bytes, ...]
    digest: bytes
    """Of the body: finds what was damaged on the way, not what its sender forged."""
    clear: Tensor | None = None
    """(d,) entries that travel in clear, zero elsewhere, where only a part is encrypted."""

    @property
    def num_bytes(self) -> int:
        """Size on the wire, without the clear part."""
        return len(self.agreement) + len(self.digest) + 16 + sum(map(len, self.body))


@dataclass(frozen=True)
class Opened:
    """The sum over the clients that were opened together."""

    total: Vector
    """Σ w_k·(values ‖ buffers)."""
    weight: float
    """Σ w_k."""
    clients: int


class HiddenSum(Aggregator):
    """Base of the rules whose server learns the weighted mean and nobody's own update.

    Args:
        name: of the defense, for messages.
        plan: as the defense was calibrated on; None before that, and then nothing can be encoded.
        min_clients: fewer contributors than this are never opened.
    """

    sees_individuals: ClassVar[bool] = False

    def __init__(self, name: str, plan: FederationPlan | None, min_clients: int = MIN_CLIENTS) -> None:
        self.name = name
        self.plan = plan
        self.min_clients = min_clients
        self.seconds: dict[str, float] = {}
        self.encoded = 0
        self.openings = 0
        self._rms = 0.0
        self._device = torch.device("cpu")
        self._payloads: list[Payload] = []

    # --- the client ------------------------------------------------------------------------------------------------

    @property
    def clients(self) -> tuple[int, ...]:
        """All clients of the federation."""
        return tuple(range(len(self._plan.client_sizes)))

    def weight(self, client: int) -> float:
        """Of this client, relative to the heaviest: in [0, 1]."""
        weights = self._plan.weights or self._plan.client_sizes
        return weights[client] / max(weights)

    def vector(self, update: Update) -> tuple[Vector, Vector]:
        """The values and buffers of an update, unweighted, in double precision.

        Raises:
            PayloadError: an entry is NaN or infinite.
            ConfigError: the strategy wants side reports, which would travel in clear.
        """
        if update.extras:
            raise ConfigError(f"{self.name}: the strategy's side reports would travel unencrypted; choose another one")
        self._device = update.delta.device
        values = update.delta.detach().cpu().double().numpy().ravel()
        buffers = np.zeros(0) if update.buffers is None else update.buffers.detach().cpu().double().numpy().ravel()
        for part in (values, buffers):
            if not np.isfinite(part).all():
                where = self.entry(int(np.flatnonzero(~np.isfinite(part))[0])) if part is values else "the buffers"
                count = int((~np.isfinite(part)).sum())
                raise PayloadError(f"non_finite: {count} values are NaN or infinite, first in {where}")
        return values, buffers

    def bounded(self, part: Vector, bound: float, what: str, option: str) -> None:
        """Hold a part to the range that all clients agreed on, so that no sum can leave the ring.

        Raises:
            PayloadError: an entry lies outside.
        """
        largest = float(np.abs(part).max()) if part.size else 0.0
        if largest > bound:
            where = self.entry(int(np.abs(part).argmax())) if what == "values" else what
            raise PayloadError(f"overflow: |{largest:.4g}| in {where} is above {bound:.4g}; {option}")

    def entry(self, index: int) -> str:
        """The tensor in which an entry of the update lies."""
        layout: Layout | None = self._plan.layout
        if layout is None or index >= layout.size:
            return f"entry {index}"
        return layout.names[int(np.searchsorted(np.cumsum(layout.sizes), index, side="right"))]

    def envelope(
        self, values: int, buffers: int, body: Sequence[bytes], clear: Tensor | None, ctx: RoundContext
    ) -> Envelope:
        """Seal a body for the wire."""
        return Envelope(self.agreement(ctx), values, buffers, tuple(body), digest(body), clear)

    @abstractmethod
    def agreement(self, ctx: RoundContext) -> bytes:
        """Digest of what all clients of a round have to agree on."""

    # --- the server ------------------------------------------------------------------------------------------------

    def begin(self, weights: Mapping[int, float], ctx: RoundContext) -> None:
        """A round starts. The strategy's weights are of no use: each client's own is inside its payload."""
        self._payloads = []

    def accumulate(self, payload: Payload, ctx: RoundContext) -> None:
        """Keep one payload; nothing of it can be read."""
        self._payloads.append(payload)

    def finish(self, ctx: RoundContext) -> Aggregation:
        """The weighted mean, opened once and for at least `min_clients` clients; else None, unopened."""
        payloads, self._payloads = self._payloads, []
        rejected = self.faults(payloads, ctx)
        payloads = [p for p in payloads if p.client not in rejected]
        if len(payloads) >= self.needed(ctx):
            opened, more = self.open(payloads, ctx)
            rejected |= more
            payloads = [p for p in payloads if p.client not in rejected]
        else:
            opened = None
        if opened is None:
            reason = f"{self.name}: {len(payloads)} usable payloads, fewer than {self.needed(ctx)}: discarded unopened"
            return Aggregation(None, rejected=rejected, flags=(reason,))
        for payload in payloads:
            for stage, spent in payload.stages.items():
                self.spent(stage, spent)
        self.encoded += len(payloads)
        return self.mean(opened, payloads[0].content, rejected)

    def needed(self, ctx: RoundContext) -> int:
        """Contributors without whom nothing is opened."""
        return self.min_clients

    def faults(self, payloads: Sequence[Payload], ctx: RoundContext) -> dict[int, str]:
        """Client -> why its payload cannot enter the sum."""
        expected = self.agreement(ctx)
        rejected: dict[int, str] = {}
        for payload in payloads:
            content = payload.content
            if isinstance(content, PayloadError):
                rejected[payload.client] = str(content)
            elif not isinstance(content, Envelope):
                rejected[payload.client] = f"type: the payload is {type(content).__name__}, not an envelope"
            elif content.agreement != expected:
                rejected[payload.client] = "agreement: made with other keys, parameters or participants"
            elif digest(content.body) != content.digest:
                rejected[payload.client] = "damaged: the payload does not match its checksum"
        sizes = {p.client: (p.content.values, p.content.buffers) for p in payloads if p.client not in rejected}
        if sizes:
            usual = Counter(sizes.values()).most_common(1)[0][0]
            rejected |= {
                k: f"shape: {size} entries, the others have {usual}" for k, size in sizes.items() if size != usual
            }
        return rejected

    @abstractmethod
    def open(self, payloads: Sequence[Payload], ctx: RoundContext) -> tuple[Opened | None, dict[int, str]]:
        """Add up and open; None where too few are left. Also names the clients whose payloads turned out unusable."""

    def mean(self, opened: Opened, envelope: Envelope, rejected: Mapping[int, str]) -> Aggregation:
        """Σ w_k v_k / Σ w_k as the server gets it."""
        if opened.weight <= 0:
            return Aggregation(None, rejected=rejected, flags=(f"{self.name}: no contributor has any weight",))
        average = torch.from_numpy(opened.total / opened.weight)
        self._rms = float(average[: envelope.values].square().mean().sqrt())
        average = average.float().to(self._device)
        buffers = average[envelope.values :] if envelope.buffers else None
        return Aggregation(average[: envelope.values], buffers, rejected=rejected)

    # --- the result ------------------------------------------------------------------------------------------------

    def measured_error(self) -> dict[str, float]:
        """Root-mean-square and largest error of a weighted mean, on random vectors as long as those of the run.

        The clients' own vectors never meet in clear, so their true sum is known to nobody; these vectors have the
        scale of the last aggregate and go through the very same code.
        """
        rng = np.random.default_rng(0)
        clients = self.clients[:PROBE_CLIENTS]
        ctx = RoundContext(0, 0, 0, cohort=clients)
        rows = [rng.normal(0, self._rms or 1e-2, PROBE_VALUES).astype(np.float32) for _ in clients]
        probe = self.twin()
        probe.begin({}, ctx)
        for k, row in enumerate(rows):
            probe.accumulate(probe.encode(Update(k, torch.from_numpy(row), 1), ctx.for_client(k)), ctx)
        payloads, probe._payloads = probe._payloads, []
        opened, _ = probe.open(payloads, ctx)
        assert opened is not None
        exact = sum(self.weight(k) * row.astype(np.float64) for k, row in enumerate(rows))
        error = opened.total / opened.weight - exact / sum(self.weight(k) for k in range(len(rows)))
        return {"rms_error": float(np.sqrt(np.mean(error**2))), "max_error": float(np.abs(error).max())}

    @abstractmethod
    def twin(self) -> HiddenSum:
        """The same rule with a state of its own, to measure with."""

    def spent(self, stage: str, seconds: float) -> None:
        """Count CPU seconds."""
        self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds

    def stage_seconds(self) -> dict[str, float]:
        """CPU seconds of each stage: for one payload, and of opening for one sum."""
        counts = {stage: self.openings if stage in PER_SUM else self.encoded for stage in self.seconds}
        return {f"{s}_seconds": round(total / max(1, counts[s]), 6) for s, total in self.seconds.items()}

    @property
    def _plan(self) -> FederationPlan:
        if self.plan is None:
            raise ConfigError(f"{self.name}: call calibrate(plan) before training")
        return self.plan


def enough(name: str, plan: FederationPlan, min_clients: int) -> None:
    """Refuse a federation in which a sum tells one client another's update.

    Raises:
        ConfigError: too few clients.
    """
    if len(plan.client_sizes) < min_clients:
        raise ConfigError(
            f"{name}: {len(plan.client_sizes)} clients; it needs {min_clients} or more (in a sum of two, each learns "
            "the other's update by subtracting its own): use --clients 3"
        )


def digest(parts: Sequence[bytes]) -> bytes:
    """16 bytes that change when any byte, or any boundary, of the parts does."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        state.update(len(part).to_bytes(8, "little"))
        state.update(part)
    return state.digest()


def agreed(*items: Any) -> bytes:
    """16 bytes that stand for parameters in common."""
    return digest([repr(item).encode() for item in items])
