"""The coordinate-wise median."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from fedsec.robust.rule import CoordinateRule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedsec.robust.order import Blocks


@dataclass(frozen=True)
class Median(CoordinateRule):
    """The median of each coordinate, the mean of the two middle values for even n (Yin et al. 2018, 1803.01498)."""

    name: ClassVar[str] = "median"
    protects: ClassVar[str] = "median of each coordinate: holds against fewer than half of the clients"
    requirement: ClassVar[str] = "n ≥ 1"

    def reduce(self, fill: Blocks, count: int, length: int, f: int, device: torch.device) -> Tensor:
        """One or two middle ranks."""
        from fedsec.robust.order import middle, order_mean

        return order_mean(fill, count, length, middle(count), device)
