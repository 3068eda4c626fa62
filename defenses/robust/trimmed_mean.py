"""The coordinate-wise trimmed mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsec.robust.rule import CoordinateRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedsec.robust.order import Blocks


@dataclass(frozen=True)
class TrimmedMean(CoordinateRule):
    """Of each coordinate the f smallest and f largest values are dropped (Yin et al. 2018, 1803.01498)."""

    name: ClassVar[str] = "trimmed_mean"
    protects: ClassVar[str] = "mean of each coordinate without its f smallest and largest values"
    requirement: ClassVar[str] = "n ≥ 2f + 1"
    uses_f: ClassVar[bool] = True

    def feasible(self, n: int, f: int) -> bool:
        """Something has to be left."""
        return n >= 2 * f + 1

    def reduce(self, fill: Blocks, count: int, length: int, f: int, device: torch.device) -> Tensor:
        """Ranks f … n − f − 1."""
        from fedsec.robust.order import order_mean

        return order_mean(fill, count, length, tuple(range(f, count - f)), device)
