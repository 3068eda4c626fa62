"""How a MedMNIST-style npz file becomes a data set: the twelve 2-D MedMNIST sets, and any file with the same keys.

Keys: `{train,val,test}_{images,labels}`; optional, for each part, `_patient`, `_site` or `_source`, `_lesion_id`,
`_image_id`, `_file`, `_sex`, `_age`, `_view`, `_subtype`; and `class_names` or `label_names`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedsec.data.base import Dataset
from fedsec.data.columns import names, normalised
from fedsec.data.digest import PARTS, fingerprint, image_digests
from fedsec.data.images import ArrayImages, Pixels, checked_size, resized
from fedsec.data.medmnist_table import SETS, VOLUMES, SetInfo
from fedsec.data.npz import Header, read_array, read_headers
from fedsec.data.npz_labels import labels_of
from fedsec.data.report import LoadReport, with_contents
from fedsec.errors import DataError
from fedsec.plugins import construct

READER = "npz-1"
COLUMNS = {
    "patient": "patient",
    "source": "site",
    "site": "site",
    "lesion_id": "lesion",
    "image_id": "image",
    "file": "file",
    "sex": "sex",
    "age": "age",
    "view": "view",
    "subtype": "subtype",
}
"""Key suffix -> column; `site` wins over `source`."""
NAMES = ("class_names", "label_names")


@dataclass
class _Reading:
    """What has been read of one file so far."""

    path: Path
    headers: dict[str, Header]
    parts: tuple[str, ...]
    used: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def lengths(self) -> dict[str, int]:
        return {part: self.headers[f"{part}_images"].shape[0] for part in self.parts}

    def array(self, key: str) -> npt.NDArray[Any]:
        self.used.add(key)
        return read_array(self.path, key)


@dataclass(frozen=True)
class NpzOptions:
    """What may be chosen when an npz file is read."""

    strict: Annotated[bool, Field(description="refuse a file whose MD5 is not the published one")] = False


def load(path: Path, *, name: str, size: int | None = None, **options: Any) -> Dataset:
    """A MedMNIST set, or your own npz file with MedMNIST's keys.

    Args:
        path: the npz file.
        name: of the set; the facts of `medmnist_table` apply where it lists the name.
        size: side in pixels; None: as stored.
        options: those of `NpzOptions`.

    Raises:
        DataError: one line that names the array, the row and the fix.
        UnsafeFileError: the file holds Python objects.
    """
    strict = construct(NpzOptions, options, name).strict
    return read_set(path, name=name, info=SETS.get(name, SetInfo()), size=size, strict=strict)


def read_set(path: Path, *, name: str, info: SetInfo, size: int | None, strict: bool = False) -> Dataset:
    """The data set in one npz file, given what is known of it."""
    if name in VOLUMES:
        raise DataError("D09", f"{name}: three-dimensional sets are not supported; choose a 2-D MedMNIST set")
    reading = _open(path)
    pixels = _images(reading, info)
    _check_md5(reading, info, pixels.shape[1], strict)
    raw = {part: reading.array(f"{part}_labels") for part in reading.parts}
    table = labels_of(path, raw, info.task, _class_names(reading, info))
    known = table.known
    unknown = int((~known).sum())
    if not known.any():
        raise DataError("D13", f"{path}: no image is left: {len(known)} rows, {unknown} of them of unknown label")
    meta = {key: column[known] for key, column in _meta(reading).items()}
    split = np.repeat(reading.parts, list(reading.lengths().values()))[known]
    pixels, policy = _sized(reading, pixels if unknown == 0 else pixels[known], size)
    images = ArrayImages(pixels)
    digests = image_digests(images)
    groups = _groups(meta)
    if "patient" in meta:
        meta["patient"] = groups
    if unread := sorted(set(reading.headers) - reading.used):
        reading.notes.append(f"arrays not used: {', '.join(unread)}")
    report = LoadReport(
        rows_read=len(known),
        left_out={"of unknown label": unknown} if unknown else {},
        constant_images=_constant(pixels),
        unknown_age=int(np.isnan(meta["age"]).sum()) if "age" in meta else 0,
        patient_known="patient" in meta,
        policy=policy,
        notes=tuple(reading.notes),
    )
    report = with_contents(
        report,
        digests=digests,
        labels=table.labels,
        class_names=table.class_names,
        split=split,
        groups=groups,
        official=True,
    )
    return Dataset(
        name=name,
        variant=f"size={pixels.shape[1]}",
        task=table.task,
        images=images,
        labels=table.labels,
        class_names=table.class_names,
        positive_class=info.positive_class if info.task else (1 if table.task == "binary" else None),
        meta=meta,
        split=split,
        split_origin="official",
        report=report,
        fingerprint=fingerprint(READER, name, table.class_names, digests, table.labels, split, *meta.values()),
        **info.provenance(),
    )


def _sized(reading: _Reading, pixels: Pixels, size: int | None) -> tuple[Pixels, dict[str, Any]]:
    """The images at the size that was asked for, and what that changed."""
    side = checked_size(size) if size is not None else None
    stored = pixels.shape[1:3]
    if side is None or stored == (side, side):
        return pixels, {}
    if side > max(stored):
        reading.notes.append(f"images were enlarged from {stored[0]} x {stored[1]} to {side} x {side} pixels")
    return resized(pixels, side), {"resized_from": list(stored)}


def _open(path: Path) -> _Reading:
    headers = read_headers(path)
    for part in PARTS:
        for a, b in (("images", "labels"), ("labels", "images")):
            if f"{part}_{a}" in headers and f"{part}_{b}" not in headers:
                raise DataError("D02", f"{path}: {part}_{a} has no {part}_{b} beside it")
    parts = tuple(part for part in PARTS if f"{part}_images" in headers)
    if not parts:
        found = ", ".join(headers) or "none"
        raise DataError("D02", f"{path}: no train_images, val_images or test_images; arrays are: {found}")
    for key, header in headers.items():
        part, _, suffix = key.partition("_")
        if part in parts and suffix in ("images", "labels", *COLUMNS):
            length = header.shape[0] if header.shape else 0
            n = headers[f"{part}_images"].shape[:1]
            if n and length != n[0]:
                raise DataError("D10", f"{path}: {part}_images has {n[0]} rows, {key} has {length}")
    return _Reading(path, headers, parts)


def _images(reading: _Reading, info: SetInfo) -> Pixels:
    """(N, H, W, C) of all parts, in the order train, val, test."""
    first = _image_shape(reading, reading.parts[0])
    for part in reading.parts[1:]:
        if (shape := _image_shape(reading, part)) != first:
            problem = f"{part}_images are {shape}, {reading.parts[0]}_images {first}; all parts need one size"
            raise DataError("D09", f"{reading.path}: {problem}")
    if info.channels not in (None, first[2]):
        raise DataError("D09", f"{reading.path}: images have {first[2]} channels, this set has {info.channels}")
    pixels = np.empty((sum(reading.lengths().values()), *first), dtype=np.uint8)
    start = 0
    for part, n in reading.lengths().items():
        pixels[start : start + n] = reading.array(f"{part}_images").reshape(n, *first)
        start += n
    return pixels


def _image_shape(reading: _Reading, part: str) -> tuple[int, int, int]:
    key = f"{part}_images"
    header = reading.headers[key]
    shape = header.shape
    if len(shape) in (4, 5) and shape[-1] not in (1, 3):
        raise DataError("D09", f"{reading.path}: {key} {header}: 3-D volumes are not supported; (N, H, W, 3) is colour")
    if len(shape) not in (3, 4) or min(shape[1:3]) < 1:
        raise DataError("D09", f"{reading.path}: {key}: expected (N, H, W) or (N, H, W, 3) uint8, found {header}")
    if header.dtype != np.uint8:
        if header.dtype.kind == "f":
            finite = np.isfinite(reading.array(key)).reshape(shape[0], -1).all(1)
            if not finite.all():
                row = int(np.flatnonzero(~finite)[0])
                raise DataError(
                    "D21", f"{reading.path}: {key}[{row}] has NaN or Inf pixels; remove or repair the image"
                )
        raise DataError("D09", f"{reading.path}: {key}: expected uint8 (0 to 255), found {header}")
    return shape[1], shape[2], shape[3] if len(shape) == 4 else 1


def _class_names(reading: _Reading, info: SetInfo) -> tuple[str, ...]:
    """The table's names; else the file's; else none. A file that contradicts the table is refused."""
    for key in NAMES:
        if key in reading.headers:
            given = tuple(names(reading.array(key)).tolist())
            if info.class_names and [n.lower() for n in given] != [n.lower() for n in info.class_names]:
                order = ", ".join(info.class_names)
                raise DataError("D05", f"{reading.path}: {key} are {', '.join(given)}; this set's order is {order}")
            return info.class_names or given
    return info.class_names


def _meta(reading: _Reading) -> dict[str, npt.NDArray[Any]]:
    """The optional columns in their normal form; blank in parts that lack them."""
    n = sum(reading.lengths().values())
    row = np.concatenate([np.arange(1, k + 1) for k in reading.lengths().values()])
    part_of = np.repeat(reading.parts, list(reading.lengths().values()))
    meta: dict[str, npt.NDArray[Any]] = {}
    for suffix, column in COLUMNS.items():
        keys = {part: f"{part}_{suffix}" for part in reading.parts if f"{part}_{suffix}" in reading.headers}
        if not keys:
            continue
        values = np.full(n, np.nan, dtype=np.float32) if column == "age" else np.full(n, "", dtype="<U1")
        for part, key in keys.items():
            new, odd = normalised(column, reading.array(key))
            reading.notes += [f"{key}: {reason} {count:,}" for reason, count in odd.items()]
            values = values.astype(np.promote_types(values.dtype, new.dtype))
            values[part_of == part] = new
        meta[column] = _named(reading, suffix, values)
    place = np.char.add(np.char.add(part_of, "/"), (row - 1).astype(str))
    ids = meta.get("image", place)
    ids = np.where(ids == "", place, ids)
    _check_unique(reading.path, ids)
    meta = {key: column for key, column in meta.items() if column.dtype.kind != "U" or np.any(column != "")}
    return {**meta, "image": ids, "file": meta.get("file", np.char.add(part_of, "_images")), "row": row}


def _named(reading: _Reading, suffix: str, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Codes as names, where the file has `<suffix>_names`."""
    key = f"{suffix}_names"
    if key not in reading.headers:
        return values
    known = dict(enumerate(names(reading.array(key)).tolist()))
    return np.array([known.get(int(v), v) if v.isdecimal() else v for v in values.tolist()], dtype=np.str_)


def _check_unique(path: Path, ids: npt.NDArray[np.str_]) -> None:
    found, counts = np.unique(ids, return_counts=True)
    if len(found) < len(ids):
        i = int(np.flatnonzero(counts > 1)[0])
        rows = np.flatnonzero(ids == found[i])
        raise DataError(
            "D12", f"{path}: image id '{found[i]}' stands in rows {rows[0]} and {rows[1]} (train, val, test)"
        )


def _groups(meta: dict[str, npt.NDArray[Any]]) -> npt.NDArray[np.str_]:
    ids = meta["image"]
    for column in ("lesion", "patient"):
        if column in meta:
            ids = np.where(meta[column] == "", ids, meta[column])
    return ids


def _constant(pixels: Pixels) -> int:
    flat = pixels.reshape(len(pixels), -1)
    return int((flat == flat[:, :1]).all(1).sum())


def _check_md5(reading: _Reading, info: SetInfo, side: int, strict: bool) -> None:
    published = info.md5.get(side)
    if published is None:
        return
    with reading.path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != published:
        text = f"MD5 is {found}, the published file has {published}"
        if strict:
            raise DataError("D15", f"{reading.path}: {text}; get the file again, or leave out strict")
        reading.notes.append(f"{text} [D15]")
