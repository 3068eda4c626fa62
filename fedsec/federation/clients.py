"""One client's training images in a folder of its own: what a machine needs that takes part in a federation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedsec import checkpoint
from fedsec.data.images import to_tensor
from fedsec.errors import DataError
from fedsec.federation.facts import Facts


def write_client(folder: Path, client: int, x: Tensor, y: Tensor) -> Path:
    """Write one client's images (n, C, H, W) in [0, 1] and labels; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"client-{client}.safetensors"
    checkpoint.save(path, {"images": x, "labels": y}, {})
    return path


def read_client(folder: Path, client: int, facts: Facts) -> tuple[Tensor, Tensor]:
    """Read `client-K.safetensors`, or `client-K.npz` with `images` (n, H, W[, C], uint8) and `labels`.

    Raises:
        DataError: there is none, or it is not what the federation agreed on.
    """
    path = folder / f"client-{client}.safetensors"
    if path.is_file():
        tensors, _ = checkpoint.load(path)
    else:
        path = folder / f"client-{client}.npz"
        tensors = _read_npz(path, client)
    if not {"images", "labels"} <= tensors.keys():
        raise DataError("D02", f"{path}: has no `images` and `labels`")
    x, y = tensors["images"], tensors["labels"]
    expected = facts.client_sizes[client]
    if tuple(x.shape) != (expected, *facts.image_shape):
        raise DataError(
            "D09",
            f"{path}: images of shape {tuple(x.shape)}; the federation was planned for "
            f"{(expected, *facts.image_shape)}: export the app again with the sizes that are true",
        )
    if len(y) != expected:
        raise DataError("D10", f"{path}: {len(y)} labels for {expected} images")
    if not x.is_floating_point() or not bool(((x >= 0) & (x <= 1)).all()):
        raise DataError("D09", f"{path}: pixels outside [0, 1]")
    if y.ndim == 1 and not bool(((y >= 0) & (y < max(2, facts.num_classes))).all()):
        raise DataError("D06", f"{path}: a label outside 0 to {max(2, facts.num_classes) - 1}")
    return x.float().to(memory_format=torch.channels_last), y


def _read_npz(path: Path, client: int) -> dict[str, Tensor]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file.files}
    except FileNotFoundError:
        raise DataError("D01", f"{path.parent}: neither client-{client}.safetensors nor client-{client}.npz") from None
    except (OSError, ValueError) as error:
        raise DataError("D02", f"{path}: cannot be read: {error}") from None
    if "images" not in arrays or "labels" not in arrays:
        return {}
    images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.ndim not in (3, 4):
        raise DataError("D09", f"{path}: images must be uint8, (n, height, width) or (n, height, width, channels)")
    y = torch.from_numpy(labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels)
    return {
        "images": to_tensor(images if images.ndim == 4 else images[..., None]),
        "labels": y.float() if y.ndim > 1 else y.long(),
    }
