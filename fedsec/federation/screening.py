"""What a server checks before it lets a client's update near the model.

Nothing that a client sends may crash the server or put a NaN into the model; who was turned away, and why, is part
of the result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from fedsec.types import Layout, Payload, Update

SIZE_LIMIT = 10**7
"""Largest sample count that is believed."""
MAX_NORM_RATIO = 1e6
"""Largest norm of an update, in medians of the round."""


def screen(
    payloads: Sequence[Payload], params: Layout, buffers: Layout
) -> tuple[list[Payload], dict[int, str], list[str]]:
    """Split payloads in clear into acceptable ones and rejected clients.

    Returns:
        the accepted payloads; rejected client -> reason; flags for claims that were replaced or dropped.
    """
    accepted: list[Payload] = []
    rejected: dict[int, str] = {}
    flags: list[str] = []
    for payload in payloads:
        reason = _fault(payload, params)
        if reason is None:
            accepted.append(_without_bad_buffers(payload, buffers, flags))
        else:
            rejected[payload.client] = reason
    norms = {p.client: float(torch.linalg.vector_norm(p.content.delta)) for p in accepted}
    limit = MAX_NORM_RATIO * sorted(norms.values())[len(norms) // 2] if norms else 0.0
    for client, norm in norms.items():
        if limit > 0 and norm > limit:
            rejected[client] = f"magnitude: update norm {norm:.3g} is more than {MAX_NORM_RATIO:.0e} x the median"
    accepted = [dataclasses.replace(p, norm=norms[p.client]) for p in accepted if p.client not in rejected]
    return _with_believable_sizes(accepted, flags), rejected, flags


def _fault(payload: Payload, params: Layout) -> str | None:
    update = payload.content
    if not isinstance(update, Update) or not isinstance(update.delta, torch.Tensor):
        return f"type: the payload is {type(update).__name__}, not an update"
    delta = update.delta
    if not delta.is_floating_point() or delta.is_complex():
        return f"dtype: the update is {delta.dtype}"
    if tuple(delta.shape) != (params.size,):
        return f"shape: the update has shape {tuple(delta.shape)}, expected ({params.size},)"
    # One read pass: a sum of squares is non-finite if any element is.
    if not torch.isfinite(torch.dot(delta, delta)) and not torch.isfinite(delta).all():
        bad = ~torch.isfinite(delta)
        name = next(n for n, view in params.views(bad).items() if view.any())
        return f"non_finite: {int(bad.sum())} values are NaN or infinite, first in {name}"
    return None


def _without_bad_buffers(payload: Payload, layout: Layout, flags: list[str]) -> Payload:
    """Drop a client's buffers where they are malformed: a variance below zero is no statistic."""
    buffers = payload.content.buffers
    if buffers is None:
        return payload
    good = (
        isinstance(buffers, torch.Tensor)
        and tuple(buffers.shape) == (layout.size,)
        and bool(torch.isfinite(buffers).all())
        and all(bool((v >= 0).all()) for n, v in layout.views(buffers).items() if n.endswith("running_var"))
    )
    if good:
        return payload
    flags.append(f"client {payload.client}: buffer_invalid, its normalisation statistics were dropped")
    return dataclasses.replace(payload, content=dataclasses.replace(payload.content, buffers=None))


def _with_believable_sizes(payloads: list[Payload], flags: list[str]) -> list[Payload]:
    """Replace impossible sample counts by the median of the believable ones (1 where there is none)."""

    def believable(size: object) -> bool:
        return isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= SIZE_LIMIT

    sizes = sorted(p.num_samples for p in payloads if p.num_samples is not None and believable(p.num_samples))
    median = sizes[len(sizes) // 2] if sizes else 1
    result = []
    for payload in payloads:
        if not believable(payload.num_samples):
            flags.append(f"client {payload.client}: size_invalid, claimed {payload.num_samples!r}, using {median}")
            payload = dataclasses.replace(payload, num_samples=median)
        result.append(payload)
    return result
