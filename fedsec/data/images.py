"""Where the pixels of a data set come from, and how they become a batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from fedsec.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]

MIN_SIZE = 16
LUMA = (0.299, 0.587, 0.114)
"""ITU-R BT.601 weights of red, green and blue in grey."""
BLOCK = 1024


class ImageSource(Protocol):
    """N images of one size, in memory or on disk."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        ...

    def __len__(self) -> int: ...

    def read(self, indices: Rows) -> Pixels:
        """The images at these positions: (B, H, W, C) uint8."""
        ...


@dataclass(frozen=True, eq=False)
class ArrayImages:
    """Images in one (N, H, W, C) uint8 array, which may be a memory map."""

    array: Pixels

    def __post_init__(self) -> None:
        a = self.array
        if a.ndim != 4 or a.dtype != np.uint8 or a.shape[3] not in (1, 3):
            raise DataError("D09", f"images: expected (N, H, W, 1 or 3) uint8, found {a.shape} {a.dtype}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        height, width, channels = self.array.shape[1:]
        return height, width, channels

    def __len__(self) -> int:
        return len(self.array)

    def read(self, indices: Rows) -> Pixels:
        """The images at these positions: (B, H, W, C) uint8."""
        return np.asarray(self.array[indices])


@dataclass(frozen=True, eq=False)
class SelectedImages:
    """Some images of another source, in a given order; nothing is copied until it is read."""

    source: ImageSource
    indices: Rows

    @property
    def digests(self) -> npt.NDArray[np.bytes_] | None:
        """(N,) hashes of the images, where the source knows them."""
        known = getattr(self.source, "digests", None)
        return known[self.indices] if isinstance(known, np.ndarray) else None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels of every image."""
        return self.source.shape

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, indices: Rows) -> Pixels:
        """The images at these positions: (B, H, W, C) uint8."""
        return self.source.read(self.indices[indices])


def checked_size(size: Any) -> int:
    """A side in pixels as an int.

    Raises:
        ConfigError: not a whole number of at least 16.
    """
    try:
        side = int(size)
    except (TypeError, ValueError):
        side = 0
    if side < MIN_SIZE or side != float(size):
        raise ConfigError(f"size={size}: give a whole number of pixels, {MIN_SIZE} or more")
    return side


def to_tensor(pixels: Pixels, size: int | None = None, channels: int | None = None) -> torch.Tensor:
    """Float images from stored ones.

    Args:
        pixels: (B, H, W, C) uint8, C in {1, 3}.
        size: side S of the result; the image is squashed to S x S (bicubic, antialiased, clipped). None: as stored.
        channels: 1 (BT.601 grey), 3 (grey is copied) or None (as stored).

    Returns:
        (B, channels, S, S) float32, every value in [0, 1].
    """
    import torch
    from torch.nn import functional as F

    x = torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))).to(torch.float32).div_(255)
    if channels not in (None, 1, 3):
        raise ConfigError(f"channels={channels}: choose 1 or 3")
    if channels == 3 and x.shape[1] == 1:
        x = x.expand(-1, 3, -1, -1).contiguous()
    elif channels == 1 and x.shape[1] == 3:
        x = (x * x.new_tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).clamp_(0, 1)
    if size is not None and tuple(x.shape[2:]) != (checked_size(size),) * 2 and len(x):
        x = F.interpolate(x, size=(size, size), mode="bicubic", antialias=True, align_corners=False).clamp_(0, 1)
    elif size is not None:
        x = x.reshape(len(x), x.shape[1], size, size)
    return x


def resized(pixels: Pixels, size: int) -> Pixels:
    """The stored images at another size: (N, H, W, C) to (N, size, size, C), both uint8."""
    if pixels.shape[1:3] == (size, size):
        return pixels
    out = np.empty((len(pixels), size, size, pixels.shape[3]), dtype=np.uint8)
    for start in range(0, len(pixels), BLOCK):
        x = to_tensor(pixels[start : start + BLOCK], size)
        out[start : start + BLOCK] = (x * 255).round_().byte().permute(0, 2, 3, 1).numpy()
    return out
