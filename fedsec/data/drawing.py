"""The shapes and textures that the built-in generators draw with.

Coordinates: x right, y down, both in [-1, 1]. B images of S x S pixels are one (B, S, S) array.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Field3 = npt.NDArray[Any]
"""(B, S, S) values of B images, or what broadcasts to them."""


def grid(size: int) -> tuple[Field3, Field3]:
    """x (1, 1, S) and y (1, S, 1) at the pixel centres."""
    centres = ((np.arange(size) + 0.5) * 2 / size - 1).astype(np.float32)
    return centres[None, None, :], centres[None, :, None]


def pose(size: int, shift_x: Field3, shift_y: Field3, turn: Field3, scale: npt.ArrayLike) -> tuple[Field3, Field3]:
    """x and y (B, S, S) of the scene under each pixel, for scenes moved, turned (radians) and enlarged."""
    x, y = grid(size)
    factor = np.asarray(scale, dtype=np.float32).reshape(-1, 1, 1)
    dx, dy, c, s = x - shift_x, y - shift_y, np.cos(turn), np.sin(turn)
    return (c * dx + s * dy) / factor, (c * dy - s * dx) / factor


def sigmoid(z: Field3) -> Field3:
    """The logistic function, without overflow."""
    return np.asarray(0.5 * (1 + np.tanh(0.5 * z)))


def elliptic_radius(x: Field3, y: Field3, cx: Any, cy: Any, a: Any, b: Any, tilt: Any = 0.0) -> Field3:
    """1 on the ellipse with centre (cx, cy), half axes a and b, turned by `tilt` radians."""
    dx, dy = x - cx, y - cy
    c, s = np.cos(tilt), np.sin(tilt)
    return np.asarray(np.sqrt(((c * dx + s * dy) / a) ** 2 + ((c * dy - s * dx) / b) ** 2))


def pink(white: Field3, beta: float) -> Field3:
    """White noise filtered by |f|^-beta: zero mean and unit variance in each image."""
    size = white.shape[-1]
    fx, fy = np.fft.rfftfreq(size), np.fft.fftfreq(size)[:, None]
    f = np.hypot(fx, fy)
    f[0, 0] = np.inf
    field = np.fft.irfft2(np.fft.rfft2(white) * f**-beta, s=(size, size))
    return np.asarray(field / field.std(axis=(-2, -1), keepdims=True), dtype=np.float32)


def blur_matrix(size: int, sigma: float) -> npt.NDArray[np.float32]:
    """(S, S) whose product with a column blurs it; rows add up to 1, also at the border."""
    if sigma < 0.05:
        return np.eye(size, dtype=np.float32)
    d = np.arange(size)
    kernel = np.exp(-0.5 * ((d[:, None] - d) / sigma) ** 2)
    return np.asarray(kernel / kernel.sum(1, keepdims=True), dtype=np.float32)


def soft_line(distance: Field3, width: Any, pixel: float) -> Field3:
    """A soft line of peak 1; widened and dimmed to what a pixel of that size can show, so that it does not alias."""
    seen = np.sqrt(np.square(width) + (pixel / 2) ** 2)
    return np.asarray(width / seen * np.exp(-((distance / seen) ** 2)))
