"""What did the adversary change in a round? Known to the simulation, never to the server or to a rule."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedsec.types import Payload, Update

if TYPE_CHECKING:
    from fedsec.defense import Aggregation
    from fedsec.federation.seats import Reply


def footprint(
    malicious: Collection[int], replies: Sequence[Reply], payloads: Sequence[Payload], result: Aggregation | None
) -> dict[str, Any]:
    """The entries of a round's record that only a simulation can fill in; nothing where nobody is malicious."""
    if not malicious:
        return {}
    computed = {r.client: r.content for r in replies if isinstance(r.content, Update)}
    sent = {p.client: p.forged for p in payloads if p.forged is not None}
    honest = [p.content.delta for p in payloads if isinstance(p.content, Update) and p.client not in malicious]
    deviation = None
    if honest and result is not None and result.delta is not None:
        mean = torch.stack(honest).mean(0)
        deviation = float((result.delta - mean).norm() / mean.norm().clamp(min=1e-30))
    return {
        "malicious": tuple(computed),
        "tampering": {k: _change(u, sent.get(k)) for k, u in computed.items()},
        "tampered": {r.client: r.tampered for r in replies if r.client in malicious},
        "deviation": deviation,
    }


def _change(computed: Update, sent: Update | None) -> float:
    """How far an update was moved; infinite where it can't be compared."""
    comparable = sent is not None and isinstance(sent.delta, Tensor) and sent.delta.is_floating_point()
    if sent is None or not comparable or sent.delta.shape != computed.delta.shape:
        return float("inf")
    if sent.num_samples != computed.num_samples and sent.delta is computed.delta:
        return float("inf")
    moved = float((sent.delta.to(computed.delta) - computed.delta).norm() / computed.delta.norm().clamp(min=1e-30))
    return moved if moved == moved else float("inf")


def changed_images(clean: tuple[Tensor, Tensor], poisoned: tuple[Tensor, Tensor]) -> int:
    """Images that differ in pixels or label; those added count too."""
    shared = min(len(clean[0]), len(poisoned[0]))
    differ = torch.zeros(shared, dtype=torch.bool, device=clean[0].device)
    for before, after in zip(clean, poisoned, strict=True):
        if before is not after:
            differ |= (before[:shared] != after[:shared]).reshape(shared, -1).any(1)
    return int(differ.sum()) + len(poisoned[0]) - shared
