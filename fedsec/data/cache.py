"""Where decoded and generated images are kept between runs, and how a killed run leaves no half file there."""

from __future__ import annotations

import os
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Arrays = Mapping[str, npt.NDArray[Any]]


def cache_dir() -> Path:
    """The user's cache folder: `$XDG_CACHE_HOME/fedsec`, else `~/.cache/fedsec`. It need not exist."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base else Path.home() / ".cache") / "fedsec"


def cached(name: str, make: Callable[[], Arrays]) -> Arrays:
    """The arrays stored under this name in the cache, or those that `make` returns, which are then stored.

    A damaged file is made anew. A cache that cannot be written is not an error: the next run makes the arrays again.
    """
    path = cache_dir() / f"{name}.npz"
    try:
        with np.load(path, allow_pickle=False) as file:
            return {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        arrays = make()
    try:
        write_npz(path, arrays)
    except OSError:
        return arrays
    return arrays


def write_npz(path: Path, arrays: Arrays) -> None:
    """Write under a temporary name in the same folder, then rename: readers see the whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
