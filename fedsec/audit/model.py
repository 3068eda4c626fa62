"""Opens the model under audit without executing anything of the file, and refuses what cannot be judged."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedsec import checkpoint, models
from fedsec.data.base import Dataset
from fedsec.errors import ConfigError, RefusedError, UnsafeFileError

BOMB = 4
"""An archive that unpacks to so many times its size is refused: tensors are stored as they are."""
PICKLES = (".pkl", ".pickle", ".joblib", ".sav")


@dataclass(frozen=True)
class OpenedModel:
    """A model with its weights, and what is known of it."""

    network: nn.Module
    path: Path
    sha256: str
    record: Mapping[str, Any]

    def describe(self) -> dict[str, Any]:
        """For the report."""
        return {
            "path": self.path.name,
            "sha256": self.sha256,
            "architecture": self.record.get("model", "as given"),
            "parameters": sum(p.numel() for p in self.network.parameters()),
            "normalisation": self.record.get("normalisation", {}),
        }


def open_model(path: Path, dataset: Dataset, name: str | None = None, norm: str | None = None) -> OpenedModel:
    """The model in a file.

    Args:
        path: safetensors, or a plain state dict.
        dataset: says how many classes and channels it must have.
        name: architecture, or `package.module:factory`; the file's own record where it has one.

    Raises:
        UnsafeFileError: the file would run code, or unpacks to far more than its size.
        ConfigError: no such file, or another architecture; RefusedError: weights that are not numbers.
    """
    if path.suffix in PICKLES:
        raise UnsafeFileError(
            f"{path}: this file can run code when opened, and was not opened; convert it on the machine that made it: "
            "safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        )
    _check_archive(path)
    tensors, record = checkpoint.load(path)
    network = _network(path, dataset, record, name, norm)
    load_exactly(network, tensors, path)
    return OpenedModel(network.eval(), path, digest_of(path), record)


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _check_archive(path: Path) -> None:
    if not path.is_file() or not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > BOMB * path.stat().st_size:
        raise UnsafeFileError(
            f"{path}: {path.stat().st_size:,} bytes that unpack to {unpacked:,}: no model is stored so; not opened"
        )


def _network(path: Path, dataset: Dataset, record: Mapping[str, Any], name: str | None, norm: str | None) -> nn.Module:
    known = name or record.get("model")
    if known is None:
        raise ConfigError(f"{path}: the file does not say which architecture it holds; give --model NAME")
    check_code(str(known), name, path)
    channels, side, _ = dataset.image_shape
    if record.get("num_classes", dataset.num_classes) != dataset.num_classes:
        raise ConfigError(
            f"{path}: a model of {record['num_classes']} classes, {dataset.name} has {dataset.num_classes}; "
            "give the data it was trained for"
        )
    options: dict[str, Any] = dict(record.get("options", {})) if name is None else {}
    chosen: Any = norm or record.get("norm", "group")
    network = models.build(
        known, num_classes=dataset.num_classes, in_channels=channels, image_size=side, norm=chosen, **options
    )
    fixed = record.get("normalisation", {})
    for key in ("mean", "std"):
        if key in fixed and hasattr(network, key):
            getattr(network, key).copy_(torch.tensor(fixed[key]).view(1, -1, 1, 1))
    return network


def check_code(known: str, named: str | None, path: Path) -> None:
    """A file may not choose which code is imported: only the user's own --model may.

    Raises:
        UnsafeFileError: the file names a factory that the user did not.
    """
    if ":" in known and known != named:
        raise UnsafeFileError(
            f"{path}: its network is the code '{known}', not run; if you trust it add --model {known}"
        )


def load_exactly(network: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """All tensors of the network from the file, or a refusal that names the first that does not fit."""
    own = network.state_dict()
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        place = checkpoint.match(key, own)
        if place is None or own[place].shape != tensor.shape:
            there = "no such tensor" if place is None else f"{tuple(own[place].shape)}"
            raise ConfigError(
                f"{path}: another architecture: '{key}' is {tuple(tensor.shape)}, the model has {there}; "
                "name the right one with --model"
            )
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RefusedError(f"{path}: '{key}' holds NaN or infinite weights; this model answers nothing")
        found[place] = tensor
    needed = {key for key in own if key not in ("mean", "std")}
    if missing := sorted(needed - found.keys()):
        raise ConfigError(f"{path}: another architecture: '{missing[0]}' is not in the file; name it with --model")
    network.load_state_dict(found, strict=False)
