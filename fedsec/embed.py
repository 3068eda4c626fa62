"""Pictures as data: addresses, so that a page is one file that asks no server for anything."""

from __future__ import annotations

import base64
import io

import numpy as np
import numpy.typing as npt


def png(image: npt.NDArray[np.floating]) -> str:
    """(H, W), (H, W, 1) or (H, W, 3) in [0, 1] as a PNG inside an address."""
    from PIL import Image

    pixels = (np.clip(image, 0, 1) * 255).round().astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels).save(file, "png")
    return uri(file.getvalue(), "png")


def uri(content: bytes, kind: str) -> str:
    """An image inside an address."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
