"""Which CKKS parameters are safe, what they can hold, and how exact they are.

Source: Cheon, Kim, Kim, Song 2017 ("Homomorphic encryption for arithmetic of approximate numbers"); bounds on the
modulus: Albrecht et al. 2018, "Homomorphic Encryption Security Standard", table 1 (ternary secret, 128 bits,
classical).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from fedsec.errors import ConfigError

SECURITY_BITS = 128
MODULUS_BOUND = {1024: 27, 2048: 54, 4096: 109, 8192: 218, 16384: 438, 32768: 881}
"""Ring degree -> largest sum of all prime bits with at least 128 bits of security."""
NOISE_STD = 3.2
"""Standard deviation of the error polynomial's coefficients."""
LARGEST_ERROR = 1e-6
"""Root-mean-square error of one decrypted value above which a set is refused."""
BEST_SCALE_BITS = 44
"""Finer than this gains nothing: errors are then below 1e-10."""
DEFAULTS: dict[str, tuple[int, tuple[int, ...]]] = {"tenseal": (4096, (54, 54)), "seal": (2048, (54,))}


@dataclass(frozen=True)
class Parameters:
    """One agreed set.

    The high-level TenSEAL vectors need a second prime, which carries no data, for keys that are never shipped; the
    low-level interface does without, which halves the ring.
    """

    backend: Literal["tenseal", "seal"]
    degree: int
    """n, the length of the polynomials."""
    primes: tuple[int, ...]
    """Bits of each."""
    scale_bits: int
    """Values are multiplied by 2^scale_bits and rounded."""
    symmetric: bool
    """Clients encrypt with the secret key, which halves a ciphertext where the random half is sent as a seed."""

    @property
    def slots(self) -> int:
        """Real numbers in one ciphertext: n/2 complex slots, of which `seal` fills both parts."""
        return self.degree if self.backend == "seal" else self.degree // 2

    @property
    def modulus_bits(self) -> int:
        """Sum over all primes: what the security estimate goes by."""
        return sum(self.primes)

    @property
    def data_bits(self) -> int:
        """Bits of the primes that carry data."""
        return sum(self.primes[:-1]) if len(self.primes) > 1 else self.primes[0]

    @property
    def limit(self) -> float:
        """Largest magnitude of a decrypted sum; beyond it the sum wraps around without a sign of it."""
        return float(2.0 ** (self.data_bits - 1 - self.scale_bits))

    @property
    def rms_error(self) -> float:
        """Predicted root-mean-square error of one decrypted value of one client.

        The coefficients' noise is σ for symmetric encryption, σ·√(4n/3 + 1) with a public key, and the rounding
        √((2n/3 + 1)/12) where a public-key ciphertext is switched down from a further prime; decoding adds up n of
        them with unit weights, half of the energy in each part of a complex slot.
        """
        n = self.degree
        if self.symmetric:
            coefficient = NOISE_STD
        elif len(self.primes) > 1:
            coefficient = math.sqrt((2 * n / 3 + 1) / 12)
        else:
            coefficient = NOISE_STD * math.sqrt(4 * n / 3 + 1)
        return coefficient * math.sqrt(n / 2) / 2.0**self.scale_bits

    def check(self) -> Parameters:
        """The set itself.

        Raises:
            ConfigError: it is not safe, not exact enough, or does not exist.
        """
        shown = f"he: degree={self.degree} with primes={'-'.join(map(str, self.primes))}"
        bound = MODULUS_BOUND.get(self.degree)
        if bound is None:
            raise ConfigError(f"{shown}: the degree is a power of two, {min(MODULUS_BOUND)} to {max(MODULUS_BOUND)}")
        if self.modulus_bits > bound:
            raise ConfigError(
                f"{shown} is below {SECURITY_BITS} bits of security: {self.modulus_bits} bits of primes, at most "
                f"{bound} at this degree; use a larger degree or fewer bits"
            )
        if self.backend == "tenseal" and len(self.primes) < 2:
            raise ConfigError(f"{shown}: backend=tenseal needs two primes or more; use backend=seal for one")
        if self.backend == "seal" and len(self.primes) > 1:
            raise ConfigError(f"{shown}: backend=seal works with one prime; use backend=tenseal for more")
        if self.rms_error > LARGEST_ERROR:
            raise ConfigError(
                f"{shown} and scale 2^{self.scale_bits} has an rms error of {self.rms_error:.1e}, above "
                f"{LARGEST_ERROR:.0e}; use larger primes, a smaller max_abs, or leave them to their defaults"
            )
        return self


def choose(
    backend: Literal["tenseal", "seal"],
    symmetric: bool,
    clients: int,
    max_abs: float,
    degree: int | None = None,
    primes: tuple[int, ...] | None = None,
) -> Parameters:
    """The set for a federation, with the finest scale at which no sum can overflow.

    Coefficients overflow, not values: each is a mean over the slots of |a + ib| ≤ √2·max_abs. The factor 2 in
    limit ≥ 2·clients·max_abs covers that and the noise.

    Args:
        clients: how many may be added up. max_abs: of any value that a client sends.

    Raises:
        ConfigError: see `Parameters.check`.
    """
    usual_degree, usual_primes = DEFAULTS[backend]
    chosen = primes or (usual_primes if degree in (None, usual_degree) else None)
    if chosen is None:
        raise ConfigError(f"he: degree={degree} needs primes=, such as 60-60 for 8192")
    headroom = 1 + math.ceil(math.log2(2 * clients * max_abs))
    probe = Parameters(backend, degree or usual_degree, chosen, 0, symmetric)
    # In a chain, decoding works at the level of its smallest data prime: a scale above it would not fit.
    scale_bits = min(BEST_SCALE_BITS, probe.data_bits - headroom, min(chosen) if len(chosen) > 2 else 60)
    return Parameters(backend, probe.degree, chosen, max(1, scale_bits), symmetric).check()
