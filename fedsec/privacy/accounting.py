"""How much privacy a list of noisy steps spends together, and how much noise a budget needs.

Adjacency is add or remove one unit. Opacus is imported inside functions: it takes seconds to load.
"""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fedsec.errors import RefusedError
from fedsec.privacy import gdp

PRV_ERROR = 0.01
"""Error allowed in the numerical ε, and added to it: the result stays an upper bound. A thousandth of a large ε."""
PRV_LIMIT = 300.0
"""Largest RDP ε at which the numerical accountant is tried: above, its exponentials overflow."""
PRV_POINTS = 2**22
"""Largest grid: some four seconds and half a gigabyte."""
LAPLACE_ORDERS = np.arange(1.05, 200.0, 0.05)


class Gaussian(NamedTuple):
    """Steps that add Gaussian noise to a sum over a Poisson sample of the units."""

    noise_multiplier: float
    """Standard deviation of the noise divided by the L2 sensitivity of the sum."""
    q: float = 1.0
    """Probability that one unit enters a step."""
    steps: int = 1


class Laplace(NamedTuple):
    """Steps that add Laplace noise."""

    scale: float
    """Scale of the noise divided by the L1 sensitivity."""
    steps: int = 1


Mechanism = Gaussian | Laplace


class Composition(NamedTuple):
    """What a list of mechanisms spends together."""

    epsilon: float
    delta: float
    accountant: str
    """`gdp` (exact), `prv` (numerical, tight), `rdp` (upper bound), `pure` (δ = 0) or `none` (nothing was released)."""
    note: str = ""
    """Why the tight accountant was not used, where it was not."""


def compose(mechanisms: Iterable[Mechanism], delta: float) -> Composition:
    """The (ε, δ) that all mechanisms spend together; their order does not matter.

    Gaussian steps without sampling are exact. With sampling the headline is the PRV accountant (Gopi et al. 2021) and
    falls back to RDP (Mironov et al. 2019), which is never smaller but for numerical error. Laplace steps take the
    smaller of plain composition and RDP; mixtures take RDP. With δ = 0 only Laplace steps have an ε.

    Raises:
        RefusedError: a mechanism without noise, which is no differential privacy.
        ConfigError: δ outside (0, 1) where one is needed.
    """
    steps: Counter[Mechanism] = Counter()
    for m in mechanisms:
        noise = m.noise_multiplier if isinstance(m, Gaussian) else m.scale
        if not noise > 0:
            raise RefusedError("a step without noise has no epsilon, whatever it clips; choose noise above 0")
        steps[m._replace(steps=1)] += m.steps
    merged = sorted((m._replace(steps=n) for m, n in steps.items() if n > 0), key=lambda m: (len(m), m))
    return _compose(tuple(merged), delta)


def compose_group(mechanisms: Sequence[Mechanism], delta: float, size: int) -> Composition:
    """The (ε, δ) of a group of `size` units, such as all images of one patient, where single units are protected.

    Gaussian steps without sampling: the group's μ is size·μ, exactly. Otherwise (ε', δ') for one unit is
    (k ε', k e^{(k-1) ε'} δ') for k of them, at the δ' for which the latter is `delta`.
    Source: Dong, Roth & Su 2019, theorem 2.14; Vadhan 2017, "The complexity of differential privacy", lemma 2.2.
    """
    if size == 1:
        return compose(mechanisms, delta)
    gaussians = [m for m in mechanisms if isinstance(m, Gaussian)]
    if len(gaussians) == len(mechanisms) and all(m.q >= 1 for m in gaussians):
        return compose([m._replace(noise_multiplier=m.noise_multiplier / size) for m in gaussians], delta)
    if delta == 0:
        one = compose(mechanisms, 0.0)
        return one._replace(epsilon=size * one.epsilon)

    def needed(log_delta: float) -> float:
        return math.log(size) + (size - 1) * compose(mechanisms, math.exp(log_delta)).epsilon + log_delta

    # ε' grows as δ' shrinks, so that a few fixed-point steps from the largest δ' go down to one that is small enough.
    target, guess = math.log(delta), math.log(delta / size)
    for _ in range(60):
        excess = needed(guess) - target
        if excess <= 0:
            result = compose(mechanisms, math.exp(guess))
            note = "; ".join(filter(None, (result.note, f"group privacy of {size} images")))
            return Composition(size * result.epsilon, delta, result.accountant, note)
        guess -= excess * 1.05 + 1e-3
        if guess < -650:
            break
    return Composition(math.inf, delta, "rdp", f"no finite epsilon for groups of {size} images at this noise")


def affordable_steps(mechanism: Gaussian, delta: float, budget: float, most: int, size: int = 1) -> int:
    """The largest number of steps, at most `most`, that spend no more than `budget`; exact for the accountants used.

    The RDP bound is asked first: it is quick, and never smaller but for numerical error.
    """

    def fits(steps: int) -> bool:
        some = mechanism._replace(steps=steps)
        if size == 1 and rdp_epsilon([some], delta) + PRV_ERROR <= budget:
            return True
        return compose_group([some], delta, size).epsilon <= budget

    if most <= 0 or fits(most):
        return max(0, most)
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@lru_cache(maxsize=4096)
def _compose(mechanisms: tuple[Mechanism, ...], delta: float) -> Composition:
    gaussians = [m for m in mechanisms if isinstance(m, Gaussian)]
    laplaces = [m for m in mechanisms if isinstance(m, Laplace)]
    if not mechanisms:
        return Composition(0.0, 0.0, "none")
    if not gaussians:
        pure = sum(m.steps / m.scale for m in laplaces)
        if delta == 0:
            return Composition(pure, 0.0, "pure")
        renyi = rdp_epsilon(laplaces, delta)
        return Composition(pure, 0.0, "pure") if pure <= renyi else Composition(renyi, delta, "rdp")
    gdp.check_budget(1.0, delta)
    if not laplaces and all(m.q >= 1 for m in gaussians):
        mu = math.sqrt(sum(m.steps / m.noise_multiplier**2 for m in gaussians))
        return Composition(gdp.epsilon_of(mu, delta), delta, "gdp")
    renyi = rdp_epsilon(mechanisms, delta)
    if laplaces:
        return Composition(renyi, delta, "rdp", "Gaussian and Laplace steps together")
    tight, problem = _try_prv(gaussians, delta, renyi)
    return Composition(renyi, delta, "rdp", problem) if tight is None else Composition(tight, delta, "prv")


def rdp_epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """Upper bound on ε from Rényi divergences (Mironov 2017; conversion: Balle et al. 2020, theorem 21).

    Orders are Opacus' grid (1.1 to 10.9 and 12 to 63), or 1.05 to 200 where all mechanisms are Laplace.
    """
    from opacus.accountants import RDPAccountant
    from opacus.accountants.analysis.rdp import compute_rdp

    pure_laplace = all(isinstance(m, Laplace) for m in mechanisms)
    orders = LAPLACE_ORDERS if pure_laplace else np.array(RDPAccountant.DEFAULT_ALPHAS)
    total = np.zeros(len(orders))
    for m in mechanisms:
        if isinstance(m, Laplace):
            total += m.steps * laplace_divergence(m.scale, orders)
        else:
            sigma = m.noise_multiplier
            total += compute_rdp(q=min(m.q, 1.0), noise_multiplier=sigma, steps=m.steps, orders=orders.tolist())
    epsilons = total + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    return max(0.0, float(np.nanmin(epsilons)))


def laplace_divergence(scale: float, orders: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rényi divergences of Laplace noise (Mironov 2017, table II).

    Args:
        scale: scale of the noise per unit of L1 sensitivity. orders: α > 1.
    """
    up = np.log(orders / (2 * orders - 1)) + (orders - 1) / scale
    down = np.log((orders - 1) / (2 * orders - 1)) - orders / scale
    return np.asarray(np.logaddexp(up, down) / (orders - 1), dtype=np.float64)


def prv_points(mechanisms: Sequence[Gaussian], delta: float, error: float) -> float:
    """Grid points that the PRV accountant would need in all; its time and memory are proportional to them.

    Source: Gopi, Lee & Wutschitz 2021, "Numerical composition of differential privacy", theorem 5.5 and remark 5.6.

    Args:
        mechanisms: merged. delta: target δ. error: allowed in ε; in δ it is a thousandth.
    """
    half_width = max(rdp_epsilon(mechanisms, delta / 4000), error) + 3
    mesh = error / math.sqrt(sum(m.steps for m in mechanisms) * math.log(12_000 / delta) / 2)
    return len(mechanisms) * 2 * half_width / mesh


def _try_prv(mechanisms: Sequence[Gaussian], delta: float, renyi: float) -> tuple[float | None, str]:
    """The tight ε, or None and the reason.

    The accountant is known to hang, to run out of memory and to return infinite or negative values. Its cost is known
    beforehand, so it is not started where it would be large; its result is checked against the RDP bound.
    """
    from opacus.accountants import PRVAccountant

    if not renyi <= PRV_LIMIT:
        return None, f"PRV skipped: epsilon above {PRV_LIMIT:g}"
    error = max(PRV_ERROR, renyi / 1000)
    if prv_points(mechanisms, delta, error) > PRV_POINTS:
        return None, "PRV skipped: its grid would be too large"
    accountant = PRVAccountant()
    accountant.history = [(m.noise_multiplier, min(m.q, 1.0), m.steps) for m in mechanisms]
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            epsilon = float(accountant.get_epsilon(delta, eps_error=error, delta_error=delta / 1000))
    except (RuntimeError, ValueError, ArithmeticError, MemoryError) as problem:
        return None, f"PRV failed: {problem}"
    if not 0 <= epsilon <= renyi + 5 * error:
        return None, f"PRV failed: its result {epsilon:g} contradicts the RDP bound"
    return epsilon, ""


@lru_cache(maxsize=1024)
def calibrate_noise(epsilon: float, delta: float, q: float, steps: int, tolerance: float = 1e-3) -> float:
    """Smallest noise multiplier with which `steps` sampled Gaussian steps spend at most ε.

    Args:
        epsilon: total budget. delta: total δ.
        q: probability that one unit enters a step.
        steps: number of steps of the whole run.
        tolerance: relative; the result errs on the side of more noise.

    Raises:
        ConfigError: ε ≤ 0, or δ outside (0, 1).
    """
    mu = gdp.mu_of(epsilon, delta)
    if q >= 1:
        return math.sqrt(steps) / mu
    # Central limit of subsampled steps (Dong, Roth & Su 2019, corollary 5.4): a few per cent off, so a start only.
    start = math.log1p((mu / (q * math.sqrt(steps))) ** 2) ** -0.5
    return smallest(lambda z: compose([Gaussian(z, q, steps)], delta).epsilon, epsilon, start, tolerance)


def smallest(cost: Callable[[float], float], budget: float, start: float, tolerance: float) -> float:
    """Smallest z with cost(z) ≤ budget for a decreasing cost, within a relative tolerance from above.

    False position on log-log axes, where cost curves are nearly straight: few evaluations, since each may be slow.
    """

    def excess(z: float) -> float:
        return math.log(max(cost(z), 1e-300) / budget)

    low = high = start
    below = above = excess(start)
    stride = 1.05
    while above > 0:
        low, below = high, above
        high, stride = high * stride, stride**2
        above = excess(high)
    while below <= 0:
        high, above = low, below
        low, stride = low / stride, stride**2
        below = excess(low)
    tries = 0
    while high > low * (1 + tolerance):
        tries += 1
        share = below / (below - above) if tries < 6 else 0.5
        middle = low * (high / low) ** share
        # Half a tolerance inside the bracket: an exact guess then closes it in two evaluations.
        middle = min(max(middle, low * (1 + tolerance / 2)), high / (1 + tolerance / 2))
        value = excess(middle)
        if value > 0:
            low, below = middle, value
        else:
            high, above = middle, value
    return high
