"""Secret sharing: any t of n shares give the secret, t − 1 tell nothing (Shamir 1979, "How to share a secret")."""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping

PRIME = 2**256 + 297
"""The smallest prime above 2^256: the field holds every 32-byte secret."""
SHARE_BYTES = 33


def split(secret: bytes, points: Iterable[int], threshold: int) -> dict[int, bytes]:
    """Point -> share: the values of a random polynomial of degree t − 1 whose constant term is the secret.

    Args:
        secret: 32 bytes. points: distinct, in [1, PRIME). threshold: t ≥ 1.
    """
    if len(secret) != 32 or threshold < 1:
        raise ValueError("a secret has 32 bytes and a threshold of 1 or more")
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for x in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * x + coefficient) % PRIME
        shares[x] = value.to_bytes(SHARE_BYTES, "big")
    return shares


def combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret: Lagrange interpolation at zero.

    Raises:
        ValueError: the shares belong to no 32-byte secret, so that one of them is wrong or too few are given.
    """
    total = 0
    for x, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != x:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - x) % PRIME
        total += int.from_bytes(share, "big") * numerator * pow(denominator, -1, PRIME)
    total %= PRIME
    if total >= 2**256:
        raise ValueError("the shares belong to no secret")
    return total.to_bytes(32, "big")
