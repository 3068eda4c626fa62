"""What can be repaired without touching the source: a new list of the images that are good, in a folder of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from fedsec.data.base import Dataset
from fedsec.data.cache import write_npz
from fedsec.data.check import Checkup
from fedsec.data.digest import PARTS
from fedsec.data.splits import derived_split
from fedsec.errors import ConfigError
from fedsec.files import replacing, write_json

TABLE = "labels.csv"
COLUMNS = ("patient", "lesion", "site", "view", "sex", "age")


def fix(checkup: Checkup, folder: Path, source: Path) -> str:
    """Write what is good about a data set into a new folder; the source is only read.

    Left out: what cannot be decoded, and copies of an earlier image. Where a patient or copies lay in several parts,
    all parts are made anew by patient. A folder of images becomes `labels.csv`, whose rows name files of the source;
    an npz file becomes another one.

    Args:
        checkup: of the data set. folder: new or empty. source: the folder or file that was checked.

    Returns:
        What `--data` takes to use it.

    Raises:
        ConfigError: the folder is not empty, or lies in the source.
    """
    folder, source = folder.resolve(), source.resolve()
    home = source if source.is_dir() else source.parent
    if folder == home or (source.is_dir() and folder.is_relative_to(source)):
        raise ConfigError(f"--fix {folder}: lies in the data it repairs; choose a folder elsewhere")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"--fix {folder}: is not empty; choose a new folder")
    dataset = checkup.dataset
    good = np.ones(len(dataset), dtype=bool)
    good[checkup.exact[:, 1]] = False
    split = dataset.split
    if checkup.leaks:
        split = np.full(len(dataset), "", dtype="<U5")
        split[good] = derived_split(
            dataset.groups()[good], dataset.labels[good], dataset.meta["site"][good] if "site" in dataset.meta else None
        )
    folder.mkdir(parents=True, exist_ok=True)
    _write_left_out(checkup, folder / "left_out.csv")
    about = {**dataset.provenance(), "name": dataset.name, "source": str(source), "images": int(good.sum())}
    write_json(folder / "about.json", about)
    if source.suffix == ".npz":
        return _write_npz(dataset, good, split, folder / f"{dataset.name}_fixed.npz")
    _write_table(dataset, good, split, folder / TABLE)
    labels = f",label_column={'+'.join(_columns(dataset))}" if dataset.task == "multilabel" else ""
    classes = "" if labels else f",classes={'+'.join(dataset.class_names)}"
    return f"{folder / TABLE}:root={home_of(dataset, source)}{labels}{classes}"


def home_of(dataset: Dataset, source: Path) -> Path:
    """The folder that `file` is relative to: the source, or the first folder below it in which the files are."""
    first = str(dataset.meta["file"][0])
    places = [source, *sorted(p for p in source.iterdir() if p.is_dir())] if source.is_dir() else [source.parent]
    return next((place for place in places if (place / first).is_file()), source)


def _columns(dataset: Dataset) -> list[str]:
    """Names of the label columns; a comma or plus sign would end an option."""
    return [name.lower().replace(",", ";").replace("+", "/") for name in dataset.class_names]


def _write_table(dataset: Dataset, good: np.ndarray, split: np.ndarray, path: Path) -> None:
    kept = [column for column in COLUMNS if column in dataset.meta]
    multilabel = dataset.task == "multilabel"
    header = ["file", *(_columns(dataset) if multilabel else ["label"]), "split", *kept]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        for i in np.flatnonzero(good).tolist():
            if multilabel:
                labels = ["" if np.isnan(v) else f"{v:g}" for v in dataset.labels[i]]
            else:
                labels = [dataset.class_names[dataset.labels[i]]]
            meta = [_text(dataset.meta[column][i]) for column in kept]
            writer.writerow([dataset.meta["file"][i], *labels, split[i], *meta])


def _write_npz(dataset: Dataset, good: np.ndarray, split: np.ndarray, path: Path) -> str:
    arrays: dict[str, np.ndarray] = {"class_names": np.array(dataset.class_names)}
    for part in PARTS:
        rows = np.flatnonzero(good & (split == part))
        if not len(rows):
            continue
        pixels = dataset.images.read(rows)
        arrays[f"{part}_images"] = pixels[..., 0] if pixels.shape[3] == 1 else pixels
        arrays[f"{part}_labels"] = dataset.labels[rows]
        for key, column in {"patient": "patient", "lesion_id": "lesion", "site": "site", "image_id": "image"}.items():
            if column in dataset.meta:
                arrays[f"{part}_{key}"] = dataset.meta[column][rows]
    write_npz(path, arrays)
    return str(path)


def _write_left_out(checkup: Checkup, path: Path) -> None:
    """What is not in the new list, and why."""
    images = checkup.dataset.meta["image"]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "reason"])
        writer.writerows([str(images[j]), f"the same pixels as {images[i]}"] for i, j in checkup.exact.tolist())
        writer.writerows([f"{row.file}:{row.row}", json.dumps(row.detail)] for row in checkup.dataset.report.bad)
        if checkup.bad > len(checkup.dataset.report.bad):
            writer.writerow(["", f"{checkup.bad - len(checkup.dataset.report.bad)} more bad rows"])


def _text(value: object) -> str:
    return "" if isinstance(value, (float, np.floating)) and np.isnan(value) else str(value)
