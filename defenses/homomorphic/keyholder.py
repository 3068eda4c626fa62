"""Who opens sums: the one party that holds the secret key. The aggregating server is not it."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fedsec.errors import RunError

from .packing import AggregateOverflow, unpack
from .scheme import Scheme

Vector = npt.NDArray[np.float64]
TOPOLOGIES = {
    "keyholder": "a key holder who is not the aggregating server has the secret key: it opens sums alone, but together "
    "with the server it could read any hospital's update",
    "shared": "all hospitals share one secret key: any hospital together with the server, or whoever taps another "
    "hospital's upload, can read that hospital's update",
}


class KeyHolder:
    """Decrypts sums of `min_clients` clients or more, and nothing else.

    The sentinel tells how many clients are in a sum. It finds mistakes and damage; a server that adds one ciphertext
    to itself until the count fits is malicious, and outside what this protects against.

    Args:
        flood_std: standard deviation of the noise that hides the decryption error from whoever gets the sum.
    """

    def __init__(self, scheme: Scheme, key: bytes, min_clients: int, flood_std: float = 0.0) -> None:
        self._opener = scheme.opener(key)
        self._min_clients = min_clients
        self._flood_std = flood_std

    def open(self, sums: Sequence[bytes], values: int, clients: int) -> tuple[Vector, float]:
        """The summed vector (values,) and Σ w_k.

        Raises:
            RunError: a sum of too few clients.
            AggregateOverflow: what was decrypted fails its check.
        """
        if clients < self._min_clients:
            raise RunError(f"he: the key holder opens sums of {self._min_clients} clients or more, not of {clients}")
        try:
            blocks = np.stack([self._opener.decrypt(data) for data in sums])
        except (RuntimeError, ValueError) as error:
            raise AggregateOverflow(f"he: a summed ciphertext cannot be decrypted: {error}; nothing was used") from None
        total, weight = unpack(blocks, values, clients)
        if self._flood_std > 0:
            total = total + self._flood_std * normal(total.size)
        return total, weight


def normal(size: int) -> Vector:
    """Standard normal numbers (size,) from the operating system's generator."""
    from scipy.special import ndtri

    uniform = np.frombuffer(os.urandom(8 * size), dtype=np.uint64) >> np.uint64(11)
    return np.asarray(ndtri((uniform.astype(np.float64) + 0.5) / 2.0**53))


def flood_std(security: float, openings: int, error: float) -> float:
    """σ_f = √(12 R)·2^{λ/2}·e: noise that hides the decryption error e in R openings with λ bits of security.

    Source: Li, Micciancio 2021 (the attack: "On the security of homomorphic encryption on approximate numbers");
    Li, Micciancio, Schultz, Sorrell 2022 for the amount, which is quoted from the project's specification and was not
    checked against the paper.
    """
    return float(math.sqrt(12 * openings) * 2.0 ** (security / 2) * error)
