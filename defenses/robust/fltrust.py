"""FLTrust: the server's own few images say which direction is right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from fedsec.robust.rule import Infeasible, Seen, Weighing, WeightRule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class FLTrust(WeightRule):
    """Weights are the positive cosines with the server's own update, lengths are its length.

    Source: Cao et al. 2021, 2012.13995. The server holds a hundred labelled images, which no other rule here has.
    """

    name: ClassVar[str] = "fltrust"
    protects: ClassVar[str] = "trusts updates that point where the server's own images point; needs such images"
    requirement: ClassVar[str] = "n ≥ 1, and the server's own images"
    needs_root: ClassVar[bool] = True

    def extra_rows(self, clients: tuple[int, ...], memory: Mapping[str, Any], like: Tensor) -> list[Tensor]:
        """The server's own update."""
        return [memory["root"]] if "root" in memory else []

    def weigh(self, seen: Seen) -> Weighing:
        """c_i = T_i·‖g₀‖/(‖u_i‖·ΣT) with T_i = max(0, cos(u_i, g₀)); g₀ itself where nobody is trusted."""
        n = seen.n
        if len(seen.geometry) == n:
            raise Infeasible("fltrust needs the update of the server's own images")
        cosines = np.where(seen.geometry.norms[:n] > 0, 1 - seen.geometry.cosine_distances[:n, n], 0.0)
        trust = np.maximum(0.0, cosines)
        coefficients = np.zeros(n + 1)
        if trust.sum() == 0:
            coefficients[n] = 1.0
            return Weighing(coefficients, -cosines, ("no_trusted_client: the server's own update was applied",))
        norms = np.maximum(seen.geometry.norms, 1e-300)
        coefficients[:n] = trust * norms[n] / (norms[:n] * trust.sum())
        return Weighing(coefficients, -cosines)
