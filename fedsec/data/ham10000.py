"""How HAM10000, 10,015 dermatoscopic images from four sources, is read: from an npz file or from the usual folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedsec.data.base import Dataset
from fedsec.data.columns import normalised, texts
from fedsec.data.decode import decode_all, index_images, judge
from fedsec.data.digest import fingerprint, image_digests
from fedsec.data.images import ArrayImages, checked_size
from fedsec.data.medmnist import read_set
from fedsec.data.medmnist_table import SetInfo
from fedsec.data.report import SHOWN_BAD, BadRow, LoadReport, with_contents
from fedsec.data.splits import derived_split
from fedsec.data.table import Table, read_table
from fedsec.errors import ConfigError, DataError, RefusedError
from fedsec.plugins import construct

READER = "ham10000-1"
INFO = SetInfo(
    task="multiclass",
    channels=3,
    class_names=("akiec", "bcc", "bkl", "df", "mel", "nv", "vasc"),
    licence="CC BY-NC 4.0",
    redistributable=True,
    citation="Tschandl, Rosendahl, Kittler, Scientific Data 5:180161, 2018",
    homepage="https://doi.org/10.7910/DVN/DBW86T",
)
METADATA = ("HAM10000_metadata", "HAM10000_metadata.csv", "HAM10000_metadata.tab", "HAM10000_metadata.csv.gz")
REQUIRED = ("lesion_id", "image_id", "dx")
EXTRA = ("dx_type", "localization", "age", "sex")


@dataclass(frozen=True)
class HamOptions:
    """What may be chosen when the folder is read."""

    metadata: Annotated[
        str | None, Field(description="the Dataverse table, for the sites that Kaggle's copy lacks")
    ] = None
    on_bad: Annotated[Literal["error", "skip"], Field(description="stop at a bad row, or leave it out")] = "error"
    max_bad: Annotated[float, Field(ge=0, le=1, description="largest share of rows that may be left out")] = 0.01


def recognises(folder: Path) -> bool:
    """Whether the folder, or its one subfolder, holds HAM10000."""
    return _metadata_file(folder) is not None


def load(path: Path, *, name: str = "ham10000", size: int | None = None, **options: Any) -> Dataset:
    """HAM10000 skin lesions (CC BY-NC 4.0), seven classes, four sites: an npz file or the folder of JPEGs.

    Args:
        path: the npz file or the folder.
        name: of the data set.
        size: side in pixels; None: 28 for a folder, as stored for an npz file.
        options: those of `HamOptions`, for a folder.
    """
    chosen = construct(HamOptions, options, name)
    if path.suffix == ".npz":
        if options:
            raise ConfigError(f"{name}: {', '.join(options)} only applies to the folder of images, not to {path.name}")
        return read_set(path, name=name, info=INFO, size=size)
    found = _metadata_file(path)
    if found is None:
        raise DataError(
            "D01", f"HAM10000_metadata.csv not found under {path}; expected it beside HAM10000_images_part_1/"
        )
    return _read_folder(read_table(found, REQUIRED), name, checked_size(size if size is not None else 28), chosen)


def _metadata_file(folder: Path) -> Path | None:
    if not folder.is_dir():
        return None
    wanted = {text.lower() for text in METADATA}
    for place in (folder, *sorted(entry for entry in folder.iterdir() if entry.is_dir())):
        for entry in sorted(place.iterdir()):
            if entry.name.lower() in wanted and entry.is_file():
                return entry
    return None


def _read_folder(table: Table, name: str, size: int, options: HamOptions) -> Dataset:
    root = table.path.parent
    ids, rows = table.columns["image_id"], len(table)
    _check_ids(table, ids)
    files = index_images(root)
    bad = _bad_rows(table, files, rows)
    judge(bad, rows, options.on_bad, options.max_bad)
    skipped = {row.row for row in bad}
    kept = np.array([i for i in range(rows) if i + 1 not in skipped], dtype=np.int64)
    paths = [files[ids[i]] for i in kept.tolist()]
    listing = [(p.relative_to(root).as_posix(), p.stat().st_size) for p in paths]
    sites, notes = _sites(table, options)
    content = fingerprint(READER, table.content, listing)
    pixels, problems = decode_all(paths, size, content)
    unreadable = [
        BadRow(table.path.name, int(i) + 1, "D08", f"{file} ({length:,} bytes) {problem}")
        for i, (file, length), problem in zip(kept, listing, problems, strict=True)
        if problem
    ]
    bad = sorted([*bad, *unreadable], key=lambda row: row.row)
    judge(bad, rows, options.on_bad, options.max_bad)
    readable = np.array([not problem for problem in problems], dtype=bool)
    kept, pixels = kept[readable], pixels[readable]
    if not len(kept):
        raise DataError("D13", f"{table.path}: no image is left of {rows} rows")

    labels = np.array([INFO.class_names.index(table.columns["dx"][i].lower()) for i in kept], dtype=np.int64)
    meta = _meta(table, kept, sites, notes)
    meta["file"] = np.array([file for (file, _), good in zip(listing, readable, strict=True) if good], dtype=np.str_)
    split = derived_split(meta["lesion"], labels, meta["site"])
    images = ArrayImages(pixels)
    digests = image_digests(images)
    unlisted = len(set(files) - set(ids))
    if unlisted:
        notes.append(f"{unlisted:,} images in the folder are not in {table.path.name}")
    report = LoadReport(
        rows_read=rows,
        left_out={"bad (on_bad=skip)": len(bad)} if bad else {},
        bad=tuple(bad[:SHOWN_BAD]),
        n_bad=len(bad),
        unknown_age=int(np.isnan(meta["age"]).sum()) if "age" in meta else 0,
        policy={"fit": "squash", "on_bad": options.on_bad},
        notes=tuple(notes),
    )
    return Dataset(
        name=name,
        variant=f"size={size}",
        task="multiclass",
        images=images,
        labels=labels,
        class_names=INFO.class_names,
        meta=meta,
        split=split,
        split_origin="derived",
        report=with_contents(
            report,
            digests=digests,
            labels=labels,
            class_names=INFO.class_names,
            split=split,
            groups=meta["lesion"],
            official=False,
        ),
        fingerprint=fingerprint(content, size, kept, meta["site"], split),
        **INFO.provenance(),
    )


def _check_ids(table: Table, ids: list[str]) -> None:
    first: dict[str, int] = {}
    for row, text in enumerate(ids, start=1):
        if "/" in text or "\\" in text or ".." in text:
            raise RefusedError(f"{table.path}:{row}: image_id '{text}' leaves the folder; give plain file names [D16]")
        if text in first:
            problem = f"image_id '{text}' stands in rows {first[text]} and {row}; remove one"
            raise DataError("D12", f"{table.path}:{row}: {problem}")
        first[text] = row


def _bad_rows(table: Table, files: dict[str, Path], rows: int) -> list[BadRow]:
    """Rows of an unknown class (D05), and rows whose image is missing (D07)."""
    bad = []
    missing = sum(text not in files for text in table.columns["image_id"])
    for row, (image, dx) in enumerate(zip(table.columns["image_id"], table.columns["dx"], strict=True), start=1):
        if dx.lower() not in INFO.class_names:
            detail = f"'{dx}' is not a class of ham10000 ({', '.join(INFO.class_names)})"
            bad.append(BadRow(table.path.name, row, "D05", detail))
        elif image not in files:
            detail = f"{image}.jpg not found; {missing:,} of {rows:,} listed files are missing"
            bad.append(BadRow(table.path.name, row, "D07", detail))
    return bad


def _sites(table: Table, options: HamOptions) -> tuple[npt.NDArray[np.str_], list[str]]:
    """(rows,) the source of each image, and what is missing."""
    ids = table.columns["image_id"]
    if options.metadata is not None:
        other = read_table(Path(options.metadata), ("image_id", "dataset"))
        source = dict(zip(other.columns["image_id"], other.columns["dataset"], strict=True))
        sites = texts([source.get(text, "") for text in ids])
    elif "dataset" in table.columns:
        sites = texts(table.columns["dataset"])
    else:
        note = f"{table.path.name} has no column 'dataset', so the four natural sites are unknown"
        return np.full(len(ids), "", dtype="<U1"), [f"{note}; metadata=FILE takes the Dataverse table"]
    blank = int((sites == "").sum())
    return sites, [f"{blank:,} images are of unknown site"] if blank else []


def _meta(table: Table, kept: npt.NDArray[np.int64], sites: npt.NDArray[Any], notes: list[str]) -> dict[str, Any]:
    images = texts(table.columns["image_id"])[kept]
    lesions = texts(table.columns["lesion_id"])[kept]
    meta: dict[str, Any] = {
        "image": images,
        "lesion": np.where(lesions == "", images, lesions),
        "site": sites[kept],
        "row": kept + 1,
    }
    for column in EXTRA:
        if column in table.columns:
            values, odd = normalised(column, np.array(table.columns[column])[kept])
            meta[column] = values
            notes += [f"{reason} {count:,}" for reason, count in odd.items()]
    return meta
