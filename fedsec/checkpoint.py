"""Saving and loading models without ever executing what a file contains.

safetensors holds the tensors and, in its header, a JSON record of how to build the model: architecture, classes,
input shape and the one normalisation (mean, standard deviation). PyTorch files are read with weights-only loading.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fedsec.errors import ConfigError, RefusedError, UnsafeFileError
from fedsec.files import replacing

PREFIXES = ("module.", "model.", "backbone.", "_module.", "encoder_q.")
"""What other frameworks put before a state dict's keys."""
NORMALISATION = ("mean", "std")
"""Belong to the architecture, and come from the file's record."""
OLD_DENSENET = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
"""Weights of 2017 name `norm.1` what is `norm1` today."""


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


def load_into(model: nn.Module, path: Path, keep: Collection[str] = ()) -> tuple[str, ...]:
    """Load the weights of a file into a model; a classifier of another shape is left as initialised.

    A first convolution for colour takes grey images by the sum over its channels. The normalisation that the file
    names is the model's from then on.

    Args:
        keep: `mean`, `std` or both, where the user chose them.

    Returns:
        what was not as expected, in words: re-initialised, summed and unused keys.

    Raises:
        ConfigError: fewer than half of the model's tensors are in the file.
        RefusedError: weights that are NaN or infinite.
    """
    tensors, record = load(path)
    own = model.state_dict()
    found: dict[str, Tensor] = {}
    unused: list[str] = []
    notes: list[str] = []
    for key, tensor in tensors.items():
        name = match(key, own)
        if name in NORMALISATION:
            continue
        if name is not None and own[name].shape != tensor.shape and _is_grey_stem(own[name], tensor):
            notes.append(f"summed over its {tensor.shape[1]} channels for grey images: {name}")
            tensor = tensor.sum(1, keepdim=True)
        if name is None or own[name].shape != tensor.shape:
            unused.append(key)
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise RefusedError(f"{path}: '{key}' holds NaN or infinite weights; not a model to start from")
        found[name] = tensor
    if len(found) < len(own.keys() - set(NORMALISATION)) / 2:
        raise ConfigError(
            f"{path}: only {len(found)} of the model's {len(own)} tensors are in this file, such as "
            f"{next(iter(tensors), 'none')}; is it a checkpoint of another architecture?"
        )
    model.load_state_dict(found, strict=False)
    notes += _take_normalisation(model, tensors, record, keep)
    missing = sorted(own.keys() - found.keys() - set(NORMALISATION))
    if missing:
        notes.append(f"not in the checkpoint, left as initialised: {', '.join(missing)}")
    if unused:
        notes.append(f"in the checkpoint, not used: {', '.join(sorted(unused))}")
    return tuple(notes)


def _is_grey_stem(own: Tensor, given: Tensor) -> bool:
    """A convolution of one channel, where the file has the same one of several."""
    return own.dim() == given.dim() == 4 and own.shape[1] == 1 and own.shape == given[:, :1].shape


def _take_normalisation(
    model: nn.Module, tensors: Mapping[str, Tensor], record: Mapping[str, Any], keep: Collection[str]
) -> list[str]:
    """The file's mean and standard deviation, averaged over channels for grey images; a remark where it names none."""
    wanted = [key for key in NORMALISATION if isinstance(getattr(model, key, None), Tensor) and key not in keep]
    told = {**{k: tensors[k].tolist() for k in wanted if k in tensors}, **record.get("normalisation", {})}
    for key in wanted:
        if key in told:
            buffer, given = getattr(model, key), torch.tensor(told[key], dtype=torch.float32).flatten()
            given = given.mean(0, keepdim=True) if given.numel() != buffer.numel() else given
            buffer.copy_(given.expand(buffer.numel()).view_as(buffer))
    if all(key in told for key in wanted):
        return []
    return [
        "the checkpoint does not say what its images were normalised with; model.options.mean and .std name other "
        "values than 0.5 and 0.25"
    ]


def match(key: str, own: Mapping[str, Tensor]) -> str | None:
    """The model's name for a checkpoint's key: as is, without known prefixes, or inside the normalising wrapper."""
    bare = OLD_DENSENET.sub(r"\1\2.", key)
    names = [key, bare]
    while (prefix := next((p for p in PREFIXES if bare.startswith(p)), None)) is not None:
        bare = bare.removeprefix(prefix)
        names.append(bare)
    return next((c for n in names for c in (n, f"net.{n}", f"net.net.{n}") if c in own), None)
