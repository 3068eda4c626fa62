"""What could a client notice of a crafted model before it trains on it? Three cheap looks at its tensors.

They cost milliseconds and need no data. A fire is a reason to ask the server, silence is no proof: they look for the
crafts of this package, and a server that knows them can avoid them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BIAS_RANGE = 100.0
"""Honest biases differ by a few units."""
DUPLICATE_SHARE = 0.1
"""Share of a layer's rows that are copies of another row of it. Random initialisation and training make none."""
ZERO_SHARE = 0.5
"""Share of the head's rows that are all zero."""


@dataclass(frozen=True)
class Detection:
    """One detector's answer."""

    value: float
    limit: float

    @property
    def fires(self) -> bool:
        """At or above the limit."""
        return self.value >= self.limit


def inspect(parameters: Mapping[str, Tensor], head: str | None) -> dict[str, Detection]:
    """Run all detectors on one received model.

    Args:
        parameters: the model's by name.
        head: the weight (classes, features) that makes the logits; None: unknown, and its detector is left out.

    Returns:
        `duplicate_rows`: the largest share of copied rows in any weight of at least two dimensions;
        `bias_range`: the largest difference between two entries of one vector; `zero_head_rows`: a share.
    """
    matrices = [p.detach().flatten(1) for p in parameters.values() if p.ndim > 1 and len(p) > 1]
    vectors = [p.detach() for p in parameters.values() if p.ndim == 1 and len(p) > 1]
    found = {
        "duplicate_rows": Detection(max((duplicate_share(m) for m in matrices), default=0.0), DUPLICATE_SHARE),
        "bias_range": Detection(max((float(v.max() - v.min()) for v in vectors), default=0.0), BIAS_RANGE),
    }
    if head is not None:
        rows = parameters[head].detach().flatten(1)
        found["zero_head_rows"] = Detection(float((rows == 0).all(1).float().mean()), ZERO_SHARE)
    return found


def duplicate_share(matrix: Tensor) -> float:
    """Share of the rows of an (m, n) matrix, m > 1, that equal an earlier one."""
    return 1 - len(torch.unique(matrix, dim=0)) / len(matrix)


def summarise(looks: Iterable[Mapping[str, Detection]]) -> dict[str, dict[str, Any]]:
    """Over all models that the victims received: the largest value of each detector, and how often it fires."""
    looks = list(looks)
    names = {name: None for look in looks for name in look}
    table: dict[str, dict[str, Any]] = {}
    for name in names:
        found = [look[name] for look in looks if name in look]
        fired = sum(d.fires for d in found) / len(found)
        table[name] = {"value": max(d.value for d in found), "limit": found[0].limit, "fires": fired}
    return table
