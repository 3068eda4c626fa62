"""Images that train from the disk: a tensor whose pixels are read when a batch of them is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils._pytree import tree_map

from fedsec.data.images import ImageSource, Rows, SelectedImages
from fedsec.data.pixels import MappedImages

if TYPE_CHECKING:
    from fedsec.data.base import Dataset

STREAM_ABOVE = 1 << 30
"""Bytes of a set's images as float32 from which they are read batch by batch, where they lie on the disk anyway."""


class StreamedImages(torch.Tensor):
    """(n, C, H, W) float32 images of a source, channels last. Rows, slices, splits and joins of it stay on the disk or
    read just their images; any other operation reads all of it first, and is a plain tensor's from there on.

    Args:
        source: where the pixels are. rows: (n,) which of its images. device: of the tensors that are read.
    """

    source: ImageSource
    rows: Rows

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, source: ImageSource, rows: Rows, device: torch.device) -> StreamedImages:
        """A tensor with a shape and a device, and no storage."""
        height, width, channels = source.shape
        shape = (len(rows), channels, height, width)
        made = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.float32, device=device)
        made.source, made.rows = source, rows
        return made

    def read(self, positions: Rows | None = None) -> torch.Tensor:
        """The images at these positions, or all, as a plain tensor."""
        chosen = self.rows if positions is None else self.rows[positions]
        # Stored as (H, W, C), pixels are channels last already: seen so, nothing is transposed, and a GPU gets bytes.
        pixels = torch.from_numpy(self.source.read(chosen)).to(self.device).permute(0, 3, 1, 2)
        return pixels.to(torch.float32).div_(255)  # twice as fast as dividing bytes (measured)

    def only(self, positions: Rows | slice) -> StreamedImages:
        """Some of the images, unread."""
        return StreamedImages(self.source, self.rows[positions], self.device)

    def share_memory_(self) -> StreamedImages:
        """Every process maps the file itself."""
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StreamedImages(shape={tuple(self.shape)}, device={self.device})"

    def __reduce_ex__(self, protocol: Any) -> tuple[Callable[..., StreamedImages], tuple[Any, ...]]:
        """Another process gets the file's place, not its pixels."""
        return StreamedImages, (self.source, self.rows, self.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Handle what concerns whole images; read everything for the rest."""
        handler = HANDLERS.get(func)
        if handler is not None:
            found = handler(*args, **(kwargs or {}))
            if found is not None:
                return found

        def plain(value: Any) -> Any:
            return value.read().contiguous() if isinstance(value, StreamedImages) else value

        return func(*tree_map(plain, args), **tree_map(plain, dict(kwargs or {})))


def client_images(dataset: Dataset, rows: Rows, device: torch.device) -> torch.Tensor:
    """The images of these rows: in memory where the whole set is small or has no file, else streamed."""
    height, width, channels = dataset.images.shape
    if len(dataset) * height * width * channels * 4 > STREAM_ABOVE and _on_disk(dataset.images):
        return StreamedImages(dataset.images, np.asarray(rows, dtype=np.int64), device)
    x, _ = dataset.batch(rows)
    return x.to(device=device, memory_format=torch.channels_last)


def _on_disk(images: ImageSource) -> bool:
    while isinstance(images, SelectedImages):
        images = images.source
    return isinstance(images, MappedImages)


def _index(images: StreamedImages, indices: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    if len(indices) != 1 or indices[0] is None:
        return None
    found = indices[0].detach().cpu().numpy()
    if found.ndim != 1:
        return None
    return images.read(np.flatnonzero(found) if found.dtype == np.bool_ else found.astype(np.int64))


def _slice(
    images: StreamedImages, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> StreamedImages | None:
    return images.only(slice(start, end, step)) if dim == 0 else None


def _select(images: StreamedImages, dim: int, index: int) -> torch.Tensor | None:
    return images.read(np.array([index]))[0] if dim == 0 else None


def _split(images: StreamedImages, size: int, dim: int = 0) -> list[StreamedImages] | None:
    if dim != 0:
        return None
    return [images.only(slice(start, start + size)) for start in range(0, max(1, len(images.rows)), size)]


def _split_sizes(images: StreamedImages, sizes: Sequence[int], dim: int = 0) -> list[StreamedImages] | None:
    ends = np.cumsum(sizes).tolist()
    return [images.only(slice(e - n, e)) for n, e in zip(sizes, ends, strict=True)] if dim == 0 else None


def _cat(parts: Sequence[torch.Tensor], dim: int = 0) -> StreamedImages | None:
    first = parts[0]
    if dim != 0 or not isinstance(first, StreamedImages):
        return None
    if not all(isinstance(p, StreamedImages) and p.source is first.source for p in parts):
        return None
    rows = np.concatenate([p.rows for p in parts if isinstance(p, StreamedImages)])
    return StreamedImages(first.source, rows, first.device)


def _same(images: StreamedImages) -> StreamedImages:
    return images.only(slice(None))


_ATEN = torch.ops.aten
HANDLERS: dict[Any, Callable[..., Any]] = {
    _ATEN.index.Tensor: _index,
    _ATEN.slice.Tensor: _slice,
    _ATEN.select.int: _select,
    _ATEN.split.Tensor: _split,
    _ATEN.split_with_sizes.default: _split_sizes,
    _ATEN.cat.default: _cat,
    _ATEN.detach.default: _same,
    _ATEN.alias.default: _same,
}
