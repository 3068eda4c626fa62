"""How one image file becomes pixels: any mode, upright, in the channels and the size that were asked for."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, ImageOps

from fedsec.data.images import MIN_SIZE, Pixels

Fit = Literal["squash", "crop", "pad"]
Floats = npt.NDArray[np.float32]
UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, MemoryError, Image.DecompressionBombError)
SIXTEEN_BITS = ("I;16", "I;16L", "I;16B", "I;16N", "I")
JPEG_START, EXIF, EXIF_WITHIN = b"\xff\xd8", b"Exif\x00\x00", 1 << 16
DICOM_MAGIC = b"DICM"
ORIENTATION = 0x0112
"""The EXIF tag."""
MINKOWSKI = 6
"""The power p of shades of gray: Finlayson, Trezzi, CIC 2004; Fed-ISIC2019 uses 6."""
BORDER = 0.07
"""Brightest value of a row or column that counts as border of a fundus photograph."""


class ImageFault(ValueError):
    """An image that decodes and still cannot be used; the code is one of those in docs/data.md."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code


@dataclass(frozen=True)
class Look:
    """What the stored pixels look like."""

    size: int
    """Side S in pixels."""
    channels: int
    """1 or 3."""
    fit: Fit = "squash"
    """To a square: by squashing; by cropping the centre; or by padding with black."""
    bits: int | None = None
    """Used bits of 16-bit files; None: all."""
    color_constancy: bool = False
    """Shades of gray, before scaling."""
    trim: bool = False
    """Crop the black border."""
    window: str = "file"
    """How DICOM values become grey: see `fedsec.data.dicom`."""

    def key(self) -> str:
        """Part of a cache key: everything that changes pixels, and the decoder, whose versions differ by a level."""
        return f"{self!r} {decoder_version()}"


def decode(content: bytes, look: Look) -> Pixels:
    """An image file's bytes as (S, S, C) uint8.

    Raises:
        ImageFault: too small (D09), NaN or Inf pixels (D21), or a DICOM file that cannot be used.
        Exception: one of `UNREADABLE`, where the file is damaged.
    """
    if content[128:132] == DICOM_MAGIC:
        from fedsec.data.dicom import read_pixels

        return _finished(Image.fromarray(read_pixels(content, look.window)), look)
    if (fast := _jpeg(content, look)) is not None:
        return fast
    with Image.open(io.BytesIO(content)) as image:
        if min(image.size) < MIN_SIZE:
            raise ImageFault(
                "D09", f"{image.width} x {image.height} pixels; {MIN_SIZE} a side are the least that is used"
            )
        if not (look.fit == "squash" and image.mode in ("L", "RGB")) or look.trim or look.color_constancy:
            return _finished(_plain(image, look), look)
        upright = ImageOps.exif_transpose(image) if image.getexif().get(ORIENTATION, 1) != 1 else image
        mode = "L" if look.channels == 1 else "RGB"
        converted = upright if upright.mode == mode else upright.convert(mode)
        return _stored(_squashed(converted, look.size))


def _jpeg(content: bytes, look: Look) -> Pixels | None:
    """A plain JPEG by torchvision's decoder, which is faster than Pillow's; None: Pillow shall read it or say why not.

    Plain: nothing to turn, trim or correct, grey or RGB, whole, and large enough.
    """
    if content[:2] != JPEG_START or EXIF in content[:EXIF_WITHIN] or look.trim or look.color_constancy:
        return None
    try:
        found = jpeg_decoder()(content)
    except RuntimeError:
        return None
    if found.shape[2] not in (1, 3) or min(found.shape[:2]) < MIN_SIZE:
        return None
    if found.shape == (look.size, look.size, look.channels):
        return found
    image = Image.fromarray(found[:, :, 0] if found.shape[2] == 1 else found)
    if look.fit == "squash":
        mode = "L" if look.channels == 1 else "RGB"
        return _stored(_squashed(image if image.mode == mode else image.convert(mode), look.size))
    return _finished(image, look)


@cache
def jpeg_decoder() -> Callable[[bytes], Pixels]:
    """Bytes of a JPEG to (H, W, C) uint8; a RuntimeError where torchvision cannot."""
    import torch
    from torchvision.io import decode_jpeg

    def read(content: bytes) -> Pixels:
        # A bytearray, because torch warns of memory that cannot be written.
        data = torch.from_numpy(np.frombuffer(bytearray(content), dtype=np.uint8))
        found: Pixels = decode_jpeg(data).permute(1, 2, 0).numpy()
        return found

    return read


def decoder_version() -> str:
    """Of both decoders, whose versions can differ by a grey level."""
    from importlib.metadata import version

    return f"pillow {PIL.__version__} torchvision {version('torchvision')}"


def native_channels(content: bytes) -> int:
    """Channels of an image file, from its header: 1 for grey of any depth, else 3."""
    if content[128:132] == DICOM_MAGIC:
        return 1
    with Image.open(io.BytesIO(content)) as image:
        return 1 if image.mode in ("1", "L", "LA", "F", *SIXTEEN_BITS) else 3


def shades_of_gray(image: npt.NDArray[np.floating]) -> Floats:
    """The image without the colour of its light: each channel divided by its p-norm mean, p = 6.

    Args:
        image: (H, W, 3) in [0, 1].

    Source: Finlayson, Trezzi, Shades of gray and colour constancy, CIC 2004; scaled as in Fed-ISIC2019 (Ogier du
    Terrail et al., 2022), so that a grey image is unchanged.
    """
    light = np.power(np.power(image.astype(np.float64), MINKOWSKI).mean((0, 1)), 1 / MINKOWSKI)
    norm = np.linalg.norm(light)
    if not norm or not light.all():
        return image.astype(np.float32)
    return np.asarray(np.clip(image / (np.sqrt(3) * light / norm), 0, 1), dtype=np.float32)


def _plain(image: Image.Image, look: Look) -> Image.Image:
    """Upright, in mode L, RGB or F (0 to 255)."""
    if image.mode in SIXTEEN_BITS or image.mode == "F":
        return _deep(ImageOps.exif_transpose(image), look)
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in upright.info:
        whole = upright.convert("RGBA")
        upright = Image.alpha_composite(Image.new("RGBA", whole.size, (0, 0, 0, 255)), whole).convert("RGB")
    elif upright.mode not in ("L", "RGB"):
        upright = upright.convert("L" if upright.mode == "1" else "RGB")
    return upright


def _deep(image: Image.Image, look: Look) -> Image.Image:
    """16-bit integers divided by the largest value of their bits; floats must lie in [0, 1] already."""
    values = np.asarray(image, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ImageFault("D21", "has NaN or Inf pixels; remove or repair the image")
    if image.mode != "F":
        values = values / (2 ** (look.bits or 16) - 1)
    if values.min() < 0 or values.max() > 1:
        hint = f"bits={look.bits} is too small" if look.bits else "floating-point images must lie in [0, 1]"
        raise ImageFault("D09", f"has values from {values.min():g} to {values.max():g} of 1; {hint}")
    return Image.fromarray(values * np.float32(255))


def _finished(image: Image.Image, look: Look) -> Pixels:
    """Trimmed, colour-corrected, in the right channels, fitted and stored as 8 bits."""
    if look.trim:
        image = _trimmed(image)
    if image.mode != "F":
        image = image.convert("L" if look.channels == 1 else "RGB")
    if look.color_constancy and image.mode == "RGB":
        corrected = shades_of_gray(np.asarray(image, dtype=np.float32) / 255)
        image = Image.fromarray(np.asarray((corrected * 255).round(), dtype=np.uint8))
    pixels = _stored(_fitted(image, look))
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] < look.channels else pixels


def _trimmed(image: Image.Image) -> Image.Image:
    grey = np.asarray(image.convert("F"), dtype=np.float32) / 255
    rows, columns = (np.flatnonzero(grey.max(axis) >= BORDER) for axis in (1, 0))
    if not len(rows):
        return image
    return image.crop((int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1))


def _fitted(image: Image.Image, look: Look) -> Image.Image:
    width, height = image.size
    if look.fit == "squash" or width == height:
        return _squashed(image, look.size)
    if look.fit == "crop":
        side = min(width, height)
        left, top = (width - side) // 2, (height - side) // 2
        return _squashed(image.crop((left, top, left + side, top + side)), look.size)
    scale = look.size / max(width, height)
    inner = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new(image.mode, (look.size, look.size))
    place = (look.size - inner[0]) // 2, (look.size - inner[1]) // 2
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC), place)
    return canvas


def _squashed(image: Image.Image, size: int) -> Image.Image:
    """Bicubic and antialiased."""
    return image if image.size == (size, size) else image.resize((size, size), Image.Resampling.BICUBIC)


def _stored(image: Image.Image) -> Pixels:
    array = np.asarray(image)
    if array.dtype != np.uint8:
        array = np.clip(np.rint(array), 0, 255).astype(np.uint8)
    return array if array.ndim == 3 else array[:, :, None]
