"""Numbers as integers modulo 2^k, with headroom for the sum of all clients: overflow is impossible by construction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint32]
Wide = npt.NDArray[np.uint64]
WIDE_BOUND = 1e6
"""Largest normalisation statistic. These are few, of any scale, and travel in 64 bits each."""


@dataclass(frozen=True)
class FixedPoint:
    """Values in k bits, statistics and the weight in 64.

    Sums are taken modulo 2^32 and 2^64: as k ≤ 32, the low k bits of the first are the sum modulo 2^k.
    """

    bits: int
    """k: 16, 24 or 32."""
    bound: float
    """Largest magnitude of a value."""
    clients: int
    """How many may be added up."""

    @property
    def scale(self) -> float:
        """s = ⌊(2^(k−1) − 1)/K⌋/c: rounded *integers* of K clients have to fit, not only what they are rounded from."""
        return float(((2 ** (self.bits - 1) - 1) // self.clients) / self.bound)

    @property
    def wide_scale(self) -> float:
        """A power of two, so that what float32 can hold is encoded without an error of its own."""
        return float(2.0 ** (62 - math.ceil(math.log2(self.clients * WIDE_BOUND))))

    def encode(self, values: Vector, wide: Vector) -> tuple[Words, Wide]:
        """round(x·s), modulo 2^32 and 2^64; every |value| ≤ `bound`, every |wide| ≤ `WIDE_BOUND`."""
        narrow = np.rint(values * self.scale).astype(np.int64).astype(np.uint32)
        return narrow, np.rint(wide * self.wide_scale).astype(np.int64).view(np.uint64)

    def decode(self, narrow: Words, wide: Wide) -> tuple[Vector, Vector]:
        """Sums back to numbers, lifted to the interval around zero."""
        shift = 32 - self.bits
        lifted = (narrow << np.uint32(shift)).view(np.int32) >> shift
        return lifted / self.scale, wide.view(np.int64) / self.wide_scale

    def to_bytes(self, narrow: Words, wide: Wide) -> bytes:
        """k bits a value on the wire."""
        low = narrow.astype("<u4").view(np.uint8).reshape(-1, 4)[:, : self.bits // 8]
        return low.tobytes() + wide.astype("<u8").tobytes()

    def from_bytes(self, data: bytes, values: int, wides: int) -> tuple[Words, Wide]:
        """What `to_bytes` wrote.

        Raises:
            ValueError: another length.
        """
        width = self.bits // 8
        if len(data) != width * values + 8 * wides:
            raise ValueError(f"{len(data)} bytes, {width * values + 8 * wides} are due")
        padded = np.zeros((values, 4), dtype=np.uint8)
        padded[:, :width] = np.frombuffer(data, np.uint8, width * values).reshape(values, width)
        return padded.view("<u4").reshape(-1).astype(np.uint32), np.frombuffer(
            data, "<u8", wides, width * values
        ).copy()
