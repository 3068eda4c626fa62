"""Amplitude spectra of images and of weights: centred bands, swaps, and how they are averaged."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Band = Literal["dc", "ratio", "full"]


def band_mask(height: int, width: int, band: Band, ratio: float = 0.0) -> Tensor:
    """(H, W) bool in FFT order (zero frequency first): the frequencies that are exchanged.

    `dc`: zero frequency alone. `ratio`: a centred square of half width ⌊min(H, W)·ratio⌋. `full`: all. The mask is
    symmetric (with a frequency goes its negative), so that a real image stays real.
    """
    if band == "full":
        return torch.ones(height, width, dtype=torch.bool)
    half = math.floor(min(height, width) * ratio) if band == "ratio" else 0
    return centred(height, width, half, half)


def centred(height: int, width: int, rows: int, columns: int) -> Tensor:
    """(H, W) bool in FFT order: frequencies with |f_row| ≤ rows and |f_column| ≤ columns, clamped to what exists."""
    down = (torch.fft.fftfreq(height) * height).round().abs() <= rows
    across = (torch.fft.fftfreq(width) * width).round().abs() <= columns
    result: Tensor = down[:, None] & across[None, :]
    return result


def amplitude(x: Tensor) -> Tensor:
    """|FFT2| over the last two dimensions."""
    result: Tensor = torch.fft.fft2(x).abs()
    return result


def with_amplitude(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """x with the amplitude `target` inside the mask, its own outside, and its own phase: real, same shape.

    Args:
        x: (..., H, W). target: amplitudes that broadcast to it. mask: (H, W) in FFT order.
    """
    result: Tensor = torch.fft.ifft2(swapped(x, target, mask)).real
    return result


def swapped(x: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """The spectrum of `with_amplitude`."""
    spectrum = torch.fft.fft2(x)
    own = spectrum.abs()
    return torch.polar(torch.where(mask.to(x.device), target.to(own), own), spectrum.angle())


def as_matrix(weight: Tensor) -> Tensor:
    """A conv weight (N, C, D1, D2) as (C·D1, D2·N); a linear weight as it is."""
    if weight.ndim == 2:
        return weight
    n, c, d1, d2 = weight.shape
    return weight.permute(1, 2, 3, 0).reshape(c * d1, d2 * n)


def as_weight(matrix: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The inverse of `as_matrix`."""
    if len(shape) == 2:
        return matrix
    n, c, d1, d2 = shape
    return matrix.reshape(c, d1, d2, n).permute(3, 0, 1, 2)


def blend_low(own: Tensor, mean: Tensor, rate: float, phase: Tensor | None = None) -> Tensor:
    """A weight with the mean amplitude inside the low band of this rate, and its own phase (or `phase`).

    Args:
        own: (N, C, D1, D2) or (N, C). mean: mean amplitude of `as_matrix` over the clients. rate: in [0, 1]; the band
            has half sizes ⌊h·rate/2⌋ and ⌊w·rate/2⌋ and is symmetric; 0 is no band at all.
    """
    if rate == 0:
        return own
    matrix = as_matrix(own)
    h, w = matrix.shape
    mask = centred(h, w, int(h * rate / 2), int(w * rate / 2)).to(own.device)
    spectrum = torch.fft.fft2(matrix)
    angle = spectrum.angle() if phase is None else torch.where(mask, phase, spectrum.angle())
    changed = torch.polar(torch.where(mask, mean, spectrum.abs()), angle)
    return as_weight(torch.fft.ifft2(changed).real, own.shape)
