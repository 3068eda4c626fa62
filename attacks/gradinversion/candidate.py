"""What a method hands back: a candidate reconstruction, or the reason why it does not apply."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


class NotApplicable(Exception):
    """A method cannot work on this observation; the message says why, with the numbers behind it."""


@dataclass(frozen=True)
class Candidate:
    """Images that a method believes were behind the observation. No field is ever computed from the truth."""

    images: Tensor
    """(B, C, H, W) pixels in [0, 1]."""
    labels: Tensor
    """(B,) classes or (B, L) multi-label targets."""
    method: str
    residual: float = float("nan")
    """Relative mismatch ‖φ − g‖/‖g‖, after the scale factor `kappa`."""
    energy: float = float("nan")
    """Prior energy of the images: the tie-breaker of the selection."""
    misfit: float = float("nan")
    """χ² = Σ ((φ − g)/s)² at the declared noise."""
    kappa: float = 1.0
    """Scale at which the simulation fits the observation best; far from 1: one of the two is scaled wrongly."""
    certified: int = 0
    """Images whose exactness is proven without the truth."""
    est_psnr: float | None = None
    """The method's own estimate of its PSNR in dB."""
    image_psnr: tuple[float, ...] | None = None
    """(B,) the same of each image, from a proof of its own; 0: no telling, -inf: not found.

    None: the method proves all or nothing.
    """
    layers_ok: bool = False
    """The method's own test of every intermediate result passed."""
    iterations: int = 0
    notes: tuple[str, ...] = ()
