"""Updates that malicious clients make up from the honest ones they know. Pure functions of the known updates.

Notation: u_i the h known honest updates, m their mean, σ their standard deviation by coordinate (divisor h − 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from fedsec.robust.geometry import CHUNK, Geometry, combine, measure

Direction = Literal["mean", "std", "sign"]
LEAST_Z = 0.3
"""ALIE's z where its formula gives none: few attackers leave it at or below zero, which would be no attack."""


@dataclass(frozen=True)
class Known:
    """The honest updates that the adversary knows, and what it derives from them."""

    updates: tuple[Tensor, ...]
    """h vectors (d,)."""

    @cached_property
    def mean(self) -> Tensor:
        """m."""
        return combine(self.updates, [1 / len(self.updates)] * len(self.updates))

    @cached_property
    def std(self) -> Tensor:
        """σ; zero where only one update is known."""
        mean = self.mean
        out = torch.zeros_like(mean)
        if len(self.updates) < 2:
            return out
        away = torch.empty(min(CHUNK, len(mean)), dtype=mean.dtype, device=mean.device)
        for start in range(0, len(mean), CHUNK):  # blocks that stay in the cache, row by row
            centre, total = mean[start : start + CHUNK], out[start : start + CHUNK]
            for update in self.updates:
                torch.sub(update[start : start + CHUNK], centre, out=away[: len(centre)])
                total.addcmul_(away[: len(centre)], away[: len(centre)])
            total.div_(len(self.updates) - 1).sqrt_()
        return out

    @cached_property
    def geometry(self) -> Geometry:
        """How the known updates lie to each other."""
        return measure(self.updates)

    @cached_property
    def median_norm(self) -> float:
        """Median of ‖u_i‖."""
        return float(np.median([float(u.norm()) for u in self.updates]))

    def direction(self, kind: Direction) -> Tensor:
        """p, pointing away from the honest mean: −m/‖m‖, −σ or −sign(m)."""
        if kind == "std":
            return -self.std
        return -self.mean.sign() if kind == "sign" else -self.mean / self.mean.norm().clamp(min=1e-30)


def alie_z(clients: int, malicious: int) -> float:
    """ALIE's z = Φ⁻¹((n − f − s)/(n − f)), s = ⌊n/2 + 1⌋ − f (Baruch et al. 2019, 1902.06156, §3.2).

    It may be zero or negative, which is no attack.
    """
    supporters = clients // 2 + 1 - malicious
    share = (clients - malicious - supporters) / (clients - malicious)
    return float(ndtri(min(max(share, 1e-12), 1 - 1e-12)))


def alie(known: Known, clients: int, malicious: int, z: float | None = None) -> Tensor:
    """m − z·σ: a little, but the same little everywhere (Baruch et al. 2019)."""
    factor = max(alie_z(clients, malicious), LEAST_Z) if z is None else z
    return known.mean - factor * known.std


def ipm(known: Known, epsilon: float) -> Tensor:
    """−ε·m: a negative inner product with the honest mean (Xie et al. 2020, 1903.03936)."""
    return -epsilon * known.mean


def min_max_factor(known: Known, p: Tensor) -> float:
    """Largest γ with max_i ‖m + γp − u_i‖ ≤ max_ij ‖u_i − u_j‖, in closed form (Shejwalkar and Houmansadr 2021).

    With y_i = u_i − m, b_i = ⟨y_i, p⟩ and c_i = ‖y_i‖² − D²_max every i allows γ ≤ (b_i + √(b_i² − a·c_i))/a, a = ‖p‖².
    """
    a, b, squares = _projections(known, p)
    c = squares - known.geometry.squared_distances.max()
    return float(((b + np.sqrt(np.maximum(0.0, b**2 - a * c))) / a).min()) if a > 0 else 0.0


def min_sum_factor(known: Known, p: Tensor) -> float:
    """Largest γ with Σ_i ‖m + γp − u_i‖² ≤ max_i Σ_j ‖u_i − u_j‖² (Shejwalkar and Houmansadr 2021)."""
    a, b, squares = _projections(known, p)
    h = len(known.updates)
    c = squares.sum() - known.geometry.squared_distances.sum(1).max()
    total = b.sum()
    return float((total + math.sqrt(max(0.0, total**2 - h * a * c))) / (h * a)) if a > 0 else 0.0


def _projections(known: Known, p: Tensor) -> tuple[float, np.ndarray, np.ndarray]:
    """(‖p‖², ⟨u_i − m, p⟩ for each i, ‖u_i − m‖² for each i)."""
    a = float(p.double().square().sum())
    inner = np.array([float(torch.dot(u, p)) for u in known.updates])
    return a, inner - inner.mean(), np.diagonal(known.geometry.centred)


def min_max(known: Known, direction: Direction) -> Tensor:
    """m + γp with the largest γ that is no farther from any honest update than these are from each other."""
    p = known.direction(direction)
    return known.mean + min_max_factor(known, p) * p


def min_sum(known: Known, direction: Direction) -> Tensor:
    """m + γp with the largest γ whose summed squared distances stay within those of the honest updates."""
    p = known.direction(direction)
    return known.mean + min_sum_factor(known, p) * p


def fang(known: Known, generator: torch.Generator, complete: bool) -> Tensor:
    """Against coordinate-wise rules: values beyond the honest extreme, on the side that reverses each coordinate.

    With complete knowledge uniform between the extreme and half or twice of it, else m ∓ [3σ, 4σ] (Fang et al. 2020,
    1911.11815, §4.2; the factor 2 and the span of σ were not verified against the paper).
    """
    up = known.mean < 0  # the honest clients lower this coordinate: send something above all of them
    draw = torch.rand(known.mean.shape, generator=generator).to(known.mean)
    if not complete:
        return known.mean + torch.where(up, 1.0, -1.0) * (3 + draw) * known.std
    low = torch.stack(known.updates).amin(0) if len(known.updates) > 1 else known.updates[0]
    high = torch.stack(known.updates).amax(0) if len(known.updates) > 1 else known.updates[0]
    below = torch.where(low > 0, low / 2, low * 2)
    above = torch.where(high > 0, high * 2, high / 2)
    return torch.where(up, high + draw * (above - high), low + draw * (below - low))


def mimic_target(known: Known) -> int:
    """The known client to copy: the one that lies farthest out along the main direction of disagreement.

    Source: Karimireddy et al. 2022, 2006.09365, appendix B.
    """
    if len(known.updates) < 2:
        return 0
    return int(np.abs(np.linalg.eigh(known.geometry.centred)[1][:, -1]).argmax())


def jittered(row: Tensor, std: Tensor, delta: float, generator: torch.Generator) -> Tensor:
    """The row plus δ·σ⊙N(0, 1): colluders that are not identical."""
    if delta == 0:
        return row
    return row + delta * std * torch.randn(row.shape, generator=generator).to(row)


def with_norm(row: Tensor, norm: float) -> Tensor:
    """The row at this length."""
    length = float(row.norm())
    return row * (norm / length) if length > 0 else row


GARBAGE = ("nan_row", "one_nan", "inf_row", "one_inf", "huge", "shape", "empty", "dtype", "none")


def garbage(row: Tensor, kind: str) -> Tensor | None:
    """What a broken or hostile client may send in the place of an update."""
    made: dict[str, Tensor | None] = {
        "nan_row": torch.full_like(row, math.nan),
        "one_nan": row.index_fill(0, torch.tensor([len(row) // 2], device=row.device), math.nan),
        "inf_row": torch.full_like(row, math.inf),
        "one_inf": row.index_fill(0, torch.tensor([len(row) // 2], device=row.device), math.inf),
        "huge": torch.full_like(row, 3e38),
        "shape": row[:-1],
        "empty": row[:0],
        "dtype": row.to(torch.int64),
        "none": None,
    }
    return made[kind]


def known_from(updates: Sequence[Tensor]) -> Known:
    """Of at least one update."""
    return Known(tuple(u.detach() for u in updates))
