"""One flat vector to blocks of one ciphertext each, and back: ⌈values/room⌉ of them, never one for each tensor."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedsec.errors import RunError

Vector = npt.NDArray[np.float64]
MARKS = 3
"""Every block holds the client's weight and two sentinels of 1.0: their sums are Σ w_k and the number of clients.

Two, since a coefficient that wraps around adds q·ζ/scale to every slot: the same complex slot holds a sentinel in its
real and one in its imaginary part, so that it shows whatever the phase of ζ (one alone was seen to miss a wrap).
"""
TOLERANCE = 1e-3


class AggregateOverflow(RunError):
    """A decrypted sum fails its own check; nothing of it was used."""


def pack(vector: Vector, weight: float, slots: int) -> Vector:
    """(blocks, slots): the vector in order, zeros where the last block is not full, and the marks.

    Args:
        vector: (m,). weight: w_k. slots: numbers in one ciphertext.
    """
    blocks = np.zeros((count_blocks(vector.size, slots), slots))
    padded = np.zeros(len(blocks) * (slots - MARKS))
    padded[: vector.size] = vector
    blocks[:, _room(slots)] = padded.reshape(len(blocks), -1)
    blocks[:, -2], blocks[:, slots // 2 - 1], blocks[:, -1] = weight, 1.0, 1.0
    return blocks


def _room(slots: int) -> npt.NDArray[np.bool_]:
    """(slots,) where values lie."""
    room = np.ones(slots, dtype=bool)
    room[[slots // 2 - 1, slots - 2, slots - 1]] = False
    return room


def count_blocks(values: int, slots: int) -> int:
    """Ciphertexts that this many values need."""
    return max(1, -(-values // (slots - MARKS)))


def unpack(blocks: Vector, values: int, clients: int) -> tuple[Vector, float]:
    """The summed vector (values,) and Σ w_k.

    Raises:
        AggregateOverflow: a sentinel is not the number of clients, or the blocks disagree about Σ w_k.
    """
    slots = blocks.shape[1]
    marks = blocks[:, [slots // 2 - 1, slots - 1]]
    wrong = ~(np.abs(marks - clients) <= TOLERANCE)  # NaN is wrong too
    weights = blocks[:, -2]
    if wrong.any() or not np.ptp(weights) <= TOLERANCE or not np.isfinite(blocks).all():
        shown = float(marks[wrong][0]) if wrong.any() else float(np.ptp(weights))
        raise AggregateOverflow(
            f"he: {int(wrong.any(1).sum()) or 1} of {len(blocks)} decrypted blocks fail their check ({shown:.6g} where "
            f"{clients if wrong.any() else 0} is due): overflow, a tampered ciphertext or a wrong key; nothing was used"
        )
    return blocks[:, _room(slots)].reshape(-1)[:values], float(weights.mean())
