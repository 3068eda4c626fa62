"""How a name or a path becomes a data set: which loader reads it, and where its files are looked for."""

from __future__ import annotations

import difflib
import glob
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fedsec import plugins
from fedsec.data.base import Dataset
from fedsec.data.cache import cache_dir
from fedsec.data.findings import one_finding
from fedsec.data.images import checked_size
from fedsec.data.medmnist_table import MEDMNIST, SETS, VOLUMES
from fedsec.data.splits import resplit
from fedsec.errors import ConfigError, DataError

NPZ = "npz"
"""The loader of every set that has none of its own."""
CSV = "csv"
"""The loader of a table that its owner wrote."""
GENERAL = (CSV, "dicom", "imagefolder")
"""Layouts that many folders have; asked last, in this order."""
TABLE = re.compile(r"\.(csv|tsv)(\.gz)?$", re.IGNORECASE)
OPTIONS = re.compile(r"(?P<path>.+?):(?P<options>[a-z_]+=.*)")
SIZED = re.compile(r"(?P<name>.+?)_(?P<size>\d+)")


@dataclass(frozen=True)
class Listing:
    """One line of `fedsec list datasets`."""

    name: str
    summary: str
    licence: str
    downloadable: bool


def catalogue() -> list[Listing]:
    """All data sets known by name: those with a loader, and those that come as an npz file."""
    own = [Listing(n, plugins.summary("datasets", n), "", False) for n in _own_loaders()]
    table = [
        Listing(n, f"{i.task}, {len(i.class_names)} classes", i.licence, bool(i.md5))
        for n, i in SETS.items()
        if n not in _own_loaders()
    ]
    return sorted([*own, *table], key=lambda listing: listing.name)


def load(
    name_or_path: str | Path,
    *,
    data_dir: Path | str | None = None,
    size: int | None = None,
    splits: Literal["official", "derived", "safe"] = "official",
    **options: Any,
) -> Dataset:
    """A data set by name, or from an npz file or a folder.

    A name is looked up in `data_dir`, then in `$FEDSEC_DATA`, then in the user's cache: `<name>.npz`,
    `<name>_<size>.npz` or a folder. It may carry options: `synthetic-cxr:images=500,shift=0`.

    Args:
        name_or_path: a known name, or the path of an npz file or folder.
        data_dir: looked up first.
        size: side in pixels; None: the set's own.
        splits: `official`: the published parts; `derived`: new parts by patient or lesion; `safe`: those, without
            copies of an image in two parts.
        options: of the loader; with all of them `finding=NAME` or `finding=any`, which makes a binary set of one with
            several labels an image.

    Raises:
        DataError: missing (D01, with where it was looked for and how to get it), or damaged.
        ConfigError: an unknown name or option, with the nearest known one.
    """
    if splits not in ("official", "derived", "safe"):
        raise ConfigError(f"splits={splits}: choose official, derived or safe")
    name, loader, path, options, size = _resolve(name_or_path, data_dir, size, options)
    finding = options.pop("finding", None)
    dataset = _read(loader, path, name, size, splits, options)
    if finding is not None:
        dataset = one_finding(dataset, str(finding))
    return dataset if splits == "official" else resplit(dataset, splits)


def place_of(name_or_path: str | Path, *, data_dir: Path | str | None = None, size: int | None = None) -> Path | None:
    """The file or folder that `load` would read; None for a set that is built in."""
    return _resolve(name_or_path, data_dir, size, {})[2]


def _resolve(
    name_or_path: str | Path, data_dir: Path | str | None, size: int | None, options: dict[str, Any]
) -> tuple[str, str, Path | None, dict[str, Any], int | None]:
    """Data set name, loader, path, options and size of what was asked for."""
    path, given = _as_path(name_or_path)
    spec = plugins.PluginSpec.parse(str(name_or_path)) if path is None else plugins.PluginSpec("", given)
    options = {**spec.params, **options}
    size = checked_size(options.pop("size")) if "size" in options else size
    if path is not None:
        name, loader = _of_path(path, options.pop("layout", None))
    else:
        name, loader, path = _of_name(spec.name, size, data_dir)
    return name, loader, path, options, size


def with_options(given: str, **options: str) -> str:
    """A name or path with further options behind it; those that it has already stay."""
    match = OPTIONS.fullmatch(given)
    name, words = (match["path"], match["options"]) if match and not Path(given).exists() else (given, "")
    params = {**options, **plugins.PluginSpec.parse(f"data:{words}").params}
    return f"{name}:{','.join(f'{key}={value}' for key, value in params.items())}" if params else given


def search_path(data_dir: Path | str | None = None) -> list[Path]:
    """The folders in which names are looked up, in order.

    Raises:
        DataError: `data_dir` was given and is no folder (D01).
    """
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise DataError("D01", f"data folder {data_dir} does not exist; give the folder that holds the npz files")
    named = [data_dir, os.environ.get("FEDSEC_DATA") or None, cache_dir()]
    return [Path(folder).expanduser() for folder in named if folder is not None]


def _own_loaders() -> list[str]:
    return [name for name in plugins.names("datasets") if name != NPZ]


def _read(
    loader: str, path: Path | None, name: str, size: int | None, splits: str, options: Mapping[str, Any]
) -> Dataset:
    """Let a loader read: a function takes everything, an adapter is made from its options first."""
    read = plugins.load("datasets", loader)
    if not isinstance(read, type):
        result: Dataset = read(path, name=name, size=size, **options)
    else:
        result = plugins.construct(read, options, name).load(path, name=name, size=size, splits=splits)
    return result


def _as_path(name_or_path: str | Path) -> tuple[Path | None, dict[str, Any]]:
    """The path that was meant, and the options behind it (`PATH:key=value`); no path: a name."""
    if isinstance(name_or_path, Path):
        return name_or_path.expanduser(), {}
    if name_or_path.partition(":")[0] in {*_own_loaders(), *SETS}:
        return None, {}
    path, options = Path(name_or_path).expanduser(), {}
    if not path.exists() and (match := OPTIONS.fullmatch(name_or_path)):
        path = Path(match["path"]).expanduser()
        options = dict(plugins.PluginSpec.parse(f"data:{match['options']}").params)
    known = path.suffix in (".npz", ".csv") or len(path.parts) > 1 or path.exists()
    return (path, options) if known else (None, {})


def _of_path(path: Path, layout: str | None = None) -> tuple[str, str]:
    """Data set name and loader of a file or folder.

    Args:
        path: of the file or folder. layout: read a folder as this set, whatever it looks like.
    """
    if not path.exists():
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")], n=1)
        hint = f"did you mean '{near[0]}'?" if near else "give the path of an npz file or of a folder"
        raise DataError("D01", f"{path}: no such file or folder; {hint}")
    if layout is not None:
        plugins.load("datasets", layout)  # an unknown name is refused here, with the nearest one
        return layout, layout
    if path.is_dir():
        found = layouts(path)
        if found:
            return found[0], found[0]
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8])
        raise DataError(
            "D01",
            f"{path}: no known layout{f' in {there}' if there else ', the folder is empty'}; docs/datasets.md shows "
            "those that are known, and how to bring your own table or folders of classes",
        )
    if TABLE.search(path.name):
        return path.name.partition(".")[0], CSV
    if path.suffix != ".npz":
        raise DataError("D01", f"{path}: neither an npz file nor a folder nor a table (CSV)")
    sized = SIZED.fullmatch(path.stem)
    for name in (path.stem, *([sized["name"]] if sized else [])):
        if name in _own_loaders() and _needs_files(name):
            return name, name
        if name in {*SETS, *VOLUMES}:
            return name, NPZ
    return path.stem, NPZ


def layouts(folder: Path) -> list[str]:
    """The sets whose layout a folder has: those with label files of their own first, then the general ones."""
    return [name for name in (*(n for n in _own_loaders() if n not in GENERAL), *GENERAL) if _recognises(name, folder)]


def _of_name(name: str, size: int | None, data_dir: Path | str | None) -> tuple[str, str, Path | None]:
    """Data set name, loader and path of a name; no path where the loader needs none."""
    loaders = _own_loaders()
    if name in loaders and not _needs_files(name):
        return name, name, None
    folders = search_path(data_dir)
    for folder in folders:
        path = _find(folder, name, size)
        if path is not None:
            return (name, name, path) if name in loaders else (*_of_path(path), path)
    sized = SIZED.fullmatch(name)
    known = sized["name"] if sized and sized["name"] in {*SETS, *loaders} else name
    if known not in {*SETS, *loaders, *VOLUMES}:
        raise ConfigError(f"unknown data set '{name}': {plugins.nearest(name, [*SETS, *loaders])}")
    if known in VOLUMES:
        raise DataError("D09", f"{known}: three-dimensional sets are not supported; choose a 2-D MedMNIST set")
    looked = ", ".join(map(str, folders))
    raise DataError(
        "D01", f"{known} not found: no {known}.npz, {known}_SIZE.npz or folder {known} in {looked}; {_hint(known)}"
    )


def _hint(name: str) -> str:
    if name in MEDMNIST:
        return f"run `fedsec data get {name}`"
    home = f" ({SETS[name].homepage})" if name in SETS else ""
    return f"get it from its publisher{home}, and set FEDSEC_DATA or --data-dir to its folder"


def _find(folder: Path, name: str, size: int | None) -> Path | None:
    """The best source of a set in one folder.

    The npz file of the size asked for; else a folder, which gives any size; else the npz file that is resized with
    the least loss: the smallest that is larger, or the largest.
    """
    if not folder.is_dir():
        return None
    files: dict[int, Path] = {}
    if (plain := folder / f"{name}.npz").is_file():
        files[28] = plain
    for path in folder.glob(f"{glob.escape(name)}_*.npz"):
        match = SIZED.fullmatch(path.stem)
        if match and match["name"] == name:
            files[int(match["size"])] = path
    if size is None and files:
        return files[min(files)]
    if size in files:
        return files[size]
    for place in (folder / name, folder):
        if place.is_dir() and name in _own_loaders() and _recognises(name, place):
            return place
    larger = [side for side in files if size is not None and side >= size]
    return files[min(larger) if larger else max(files)] if files else None


def _needs_files(name: str) -> bool:
    """Whether a loader reads files: those that do not have a default for `path`."""
    loader = plugins.load("datasets", name)
    if isinstance(loader, type):
        return True
    return inspect.signature(loader).parameters["path"].default is inspect.Parameter.empty


def _recognises(name: str, folder: Path) -> bool:
    """Whether an adapter, or a loader's module with its function `recognises`, says that the folder is its own."""
    try:
        loader = plugins.load("datasets", name)
    except ConfigError:
        return False
    if isinstance(loader, type):
        return bool(getattr(loader, "recognises", lambda _: False)(folder))
    test: Callable[[Path], bool] = getattr(sys.modules[loader.__module__], "recognises", lambda _: False)
    return test(folder)
