"""Saving and loading models without ever executing what a file contains.

safetensors holds the tensors and, in its header, a JSON record of how to build the model: architecture, classes,
input shape and the one normalisation (mean, standard deviation). PyTorch files are read with weights-only loading.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedsec.errors import ConfigError, UnsafeFileError
from fedsec.files import replacing

PREFIXES = ("module.", "model.", "backbone.", "_module.")
"""What other frameworks put before a state dict's keys."""


def save(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Write tensors and their record to a safetensors file, atomically."""
    contiguous = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    with replacing(path) as temporary:
        safetensors.torch.save_file(contiguous, temporary, metadata={"fedsec": json.dumps(record)})


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and the record (empty where the file has none).

    Raises:
        ConfigError: no such file, or not a model file.
        UnsafeFileError: the file is a pickle that wants to execute code, or a format that may (`.pt2`, TorchScript).
    """
    if not path.is_file():
        raise ConfigError(f"{path}: no such model file")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    if path.suffix == ".pt2" or _is_torchscript(path):
        raise UnsafeFileError(
            f"{path}: this archive of a program can run code when it is read; save its state dict instead"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        what = next((line.strip() for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), "")
        raise UnsafeFileError(
            f"{path}: this pickle wants more than tensors and was not executed{f' ({what[:120]})' if what else ''}; "
            "convert it where you trust it: safetensors.torch.save_file(model.state_dict(), 'model.safetensors')"
        ) from None
    except Exception as error:
        raise ConfigError(f"{path}: not a readable model file: {str(error).splitlines()[0]}") from None
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise ConfigError(f"{path}: holds a {type(loaded).__name__}, not a state dict of tensors")
    return dict(loaded), {}


def _is_torchscript(path: Path) -> bool:
    """Programs saved by torch.jit or torch.export hold code beside the tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [name.partition("/")[2] for name in archive.namelist()]
    except (zipfile.BadZipFile, OSError):
        return False
    return "constants.pkl" in names or any(name.startswith("code/") for name in names)


def _load_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get("fedsec", "{}"))
            return {name: file.get_tensor(name) for name in file.keys()}, record  # noqa: SIM118
    except (safetensors.SafetensorError, json.JSONDecodeError, OSError) as error:
        raise ConfigError(f"{path}: not a readable safetensors file: {error}") from None


def load_into(model: nn.Module, path: Path) -> tuple[str, ...]:
    """Load the weights of a file into a model; a classifier of another shape is left as initialised.

    Returns:
        what was not as expected, in words: re-initialised and unused keys.

    Raises:
        ConfigError: fewer than half of the model's tensors are in the file.
    """
    tensors, _ = load(path)
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    unused: list[str] = []
    for key, tensor in tensors.items():
        name = match(key, own)
        if name is None or own[name].shape != tensor.shape:
            unused.append(key)
        else:
            found[name] = tensor
    if len(found) < len(own) / 2:
        raise ConfigError(
            f"{path}: only {len(found)} of the model's {len(own)} tensors are in this file, such as "
            f"{next(iter(tensors), 'none')}; is it a checkpoint of another architecture?"
        )
    model.load_state_dict(found, strict=False)
    missing = sorted(own.keys() - found.keys())
    notes = []
    if missing:
        notes.append(f"not in the checkpoint, left as initialised: {', '.join(missing)}")
    if unused:
        notes.append(f"in the checkpoint, not used: {', '.join(sorted(unused))}")
    return tuple(notes)


def match(key: str, own: Mapping[str, Tensor]) -> str | None:
    """The model's name for a checkpoint's key: as is, without a known prefix, or inside the normalising wrapper."""
    candidates = [key, *(key.removeprefix(p) for p in PREFIXES)]
    return next((c for k in candidates for c in (k, f"net.{k}") if c in own), None)
