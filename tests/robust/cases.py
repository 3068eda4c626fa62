"""Rounds of random updates, and rules applied to them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedsec.robust.aggregator import RuleAggregator, apply
from fedsec.robust.geometry import measure
from fedsec.robust.rule import Rule, Seen, assumed_f
from fedsec.types import Payload, RoundContext, Update

CTX = RoundContext(0, 1, 5)


def rows(n: int, d: int = 60, seed: int = 0, noise: float = 1.0) -> NDArray[np.float32]:
    """A common direction plus independent noise."""
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(d) + noise * rng.standard_normal((n, d))).astype(np.float32)


def see(x: NDArray[np.float32], rule: Rule, **changes: Any) -> Seen:
    n = len(x)
    f = assumed_f(rule, n)[0]
    settings = {"clients": tuple(range(n)), "shares": np.full(n, 1 / n), "f": f, "generator": np.random.default_rng(0)}
    return Seen(measure([torch.tensor(row) for row in x]), **{**settings, **changes})


def aggregate(rule: Rule, x: NDArray[np.float32], **changes: Any) -> NDArray[np.float64]:
    """The rule alone: no safety clip, no memory."""
    tensors = [torch.tensor(row) for row in x]
    return apply(rule, tensors, [1.0] * len(x), see(x, rule, **changes))[0].double().numpy()


def one_round(aggregator: RuleAggregator, x: NDArray[np.float32], clients: list[int] | None = None, ctx: Any = CTX):
    """A whole round through the aggregator, equal weights."""
    ids = clients or list(range(len(x)))
    aggregator.begin(dict.fromkeys(ids, 1 / len(ids)), ctx)
    for client, row in zip(ids, x, strict=True):
        update = Update(client, torch.tensor(row), 10)
        aggregator.accumulate(Payload(client, update, 4 * len(row), 10), ctx)
    return aggregator.finish(ctx)
