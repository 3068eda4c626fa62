"""From a folder of image files to a data set: what all adapters share. An adapter itself only reads labels.

An adapter is a frozen dataclass: its fields are the options of `--data NAME:key=value`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedsec.data.base import Dataset
from fedsec.data.columns import normalised
from fedsec.data.decode import Fit, Look, native_channels
from fedsec.data.digest import fingerprint
from fedsec.data.images import SelectedImages, checked_size
from fedsec.data.listing import Listing, judge, shared_groups
from fedsec.data.medmnist import read_set
from fedsec.data.medmnist_table import SetInfo
from fedsec.data.pixels import Decoded, decode_all
from fedsec.data.report import SHOWN_BAD, BadRow, LoadReport, with_contents
from fedsec.data.splits import complete_parts
from fedsec.errors import ConfigError, DataError

READER = "folder-2"
NORMALISED = ("patient", "lesion", "site", "sex", "age", "view")
SAMPLED = 64
"""Files whose headers say whether a set of unknown kind is grey."""


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Base of all adapters: options, and the way from a listing to a data set."""

    on_bad: Annotated[Literal["error", "skip"], Field(description="stop at a bad row, or leave it out")] = "error"
    max_bad: Annotated[float, Field(ge=0, le=1, description="largest share of rows that may be left out")] = 0.01
    fit: Annotated[Fit, Field(description="to a square by squashing, cropping the centre, or padding")] = "squash"
    channels: Annotated[
        Literal["native", "1", "3"],
        Field(description="grey or colour; native: the set's own", coerce_numbers_to_str=True),
    ] = "native"

    info: ClassVar[SetInfo] = SetInfo()
    side: ClassVar[int] = 64
    """In pixels, where no size is asked for."""
    layout: ClassVar[str] = ""
    """What the adapter looks for, for messages."""
    published: ClassVar[tuple[int, int] | None] = None
    """Width and height of every image of the published set."""
    leaks: ClassVar[bool] = False
    """The published parts share groups, which is reported and no fault of the copy at hand."""

    @classmethod
    def find(cls, folder: Path) -> Path | None:
        """The file or folder by which the set is recognised, in a folder or one level below; None: another set."""
        raise NotImplementedError

    def read(self, found: Path) -> Listing:
        """The set's label files, given what `find` found."""
        raise NotImplementedError

    def look(self, size: int, channels: int) -> Look:
        """How pixels are made."""
        return Look(size, channels, self.fit)

    @classmethod
    def recognises(cls, folder: Path) -> bool:
        """Whether the folder is of this set."""
        return cls.find(folder) is not None

    def load(self, path: Path, *, name: str, size: int | None = None, splits: str = "official") -> Dataset:
        """The data set in a folder, or in an npz file with MedMNIST's keys.

        Args:
            path: the folder or the npz file. name: of the data set.
            size: side in pixels; None: the set's own. splits: with another than `official`, shared patients may be.

        Raises:
            DataError: one line that names the file, the row and the fix.
        """
        if path.suffix == ".npz":
            return read_set(path, name=name, info=self._of_npz(path, name), size=size)
        found = self.find(path)
        if found is None:
            near = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) if path.is_dir() else ""
            there = f"; found {near}" if near else "; the folder is empty" if path.is_dir() else ""
            raise DataError("D01", f"{path}: {name} not found; expected {self.layout}{there}")
        return build(self, self.read(found), name, checked_size(size if size is not None else self.side), splits)

    def _of_npz(self, path: Path, name: str) -> SetInfo:
        changed = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        if changed:
            raise ConfigError(f"{name}: {', '.join(changed)} only applies to the folder of images, not to {path.name}")
        return self.info


def build(adapter: Adapter, listing: Listing, name: str, size: int, splits: str) -> Dataset:
    """Decode what was listed, leave out or refuse what is bad, and put the rest together."""
    listing.finish()
    listing.bad.sort(key=lambda row: row.row)
    judge(listing.bad, listing.rows_read, adapter.on_bad, adapter.max_bad)
    info = adapter.info
    listing.class_names = listing.class_names or info.class_names
    task = listing.task or info.task or "multiclass"
    if splits == "official" and not adapter.leaks:
        _separate_groups(adapter, listing)
    _check_left(listing)
    look = adapter.look(size, _channels(adapter, listing))
    decoded = decode_all(listing.paths, look, listing.root)
    good = _without_undecodable(adapter, listing, decoded)
    labels = listing.label_array(task == "multilabel")
    meta = _meta(listing)
    groups = next(meta[c] for c in ("patient", "lesion", "image") if c in meta)
    split, origin, note = complete_parts(np.array(listing.split, dtype=np.str_), groups, labels, meta.get("site"))
    images = decoded.images if good is None else _some(decoded, good)
    contents = decoded.contents if good is None else decoded.contents[good]
    flat = decoded.images.flat if good is None else decoded.images.flat[good]
    report = LoadReport(
        rows_read=listing.rows_read,
        left_out={**listing.left_out, **({"bad (on_bad=skip)": len(listing.bad)} if listing.bad else {})},
        bad=tuple(listing.bad[:SHOWN_BAD]),
        n_bad=len(listing.bad),
        constant_images=int(flat.sum()),
        unknown_age=int(np.isnan(meta["age"]).sum()) if "age" in meta else 0,
        patient_known="patient" in meta,
        policy={"fit": adapter.fit, "on_bad": adapter.on_bad, **listing.policy},
        notes=(*listing.notes, *([note] if note else [])),
    )
    report = with_contents(
        report,
        digests=decoded.images.digests if good is None else decoded.images.digests[good],
        labels=labels,
        class_names=listing.class_names,
        split=split,
        groups=groups,
        official=origin == "official",
    )
    return Dataset(
        name=name,
        variant=f"size={size}",
        task=task,  # type: ignore[arg-type]
        images=images,
        labels=labels,
        class_names=listing.class_names,
        positive_class=info.positive_class if info.task else (1 if task == "binary" else None),
        meta=meta,
        split=split,
        split_origin=origin,
        report=report,
        fingerprint=fingerprint(
            READER, name, _pixel_facts(look), listing.digests, contents, labels, split, groups, meta.get("site", "")
        ),
        **info.provenance(),
    )


def _pixel_facts(look: Look) -> str:
    """What changes pixels, without the decoder's version: a fingerprint must not change with it."""
    return repr(look)


def _channels(adapter: Adapter, listing: Listing) -> int:
    if adapter.channels != "native":
        return int(adapter.channels)
    if adapter.info.channels is not None:
        return adapter.info.channels
    found = []
    for path in listing.paths[:: max(1, len(listing.paths) // SAMPLED)]:
        try:
            with path.open("rb") as file:
                found.append(native_channels(file.read()))
        except (OSError, ValueError, SyntaxError):
            continue
    return max(found, default=3)


def _separate_groups(adapter: Adapter, listing: Listing) -> None:
    """A patient in two parts is a fault of a set whose parts are by patient: an error, or left out of the later part.

    Raises:
        DataError: D11, with the first row of the first such patient's second part.
    """
    unit = next((c for c in ("patient", "lesion") if any(listing.columns.get(c, ()))), None)
    if unit is None:
        return
    ids = [str(value) for value in listing.columns[unit]]
    shared = shared_groups(listing.split, [g or f"?{i}" for i, g in enumerate(ids)])
    if not shared:
        return
    first: dict[str, str] = {}
    wanted = np.ones(len(listing), dtype=bool)
    for i, (group, part) in enumerate(zip(ids, listing.split, strict=True)):
        if group in shared and part and first.setdefault(group, part) != part:
            counts = " and ".join(f"{part} ({n})" for part, n in shared[group].items())
            row = listing.columns["row"][i]
            problem = f"{unit} {group} is in {counts}; use splits=safe, or repair the parts"
            if adapter.on_bad == "error":
                judge([BadRow(listing.places[i], row, "D11", problem)], listing.rows_read, "error", 0)
            wanted[i] = False
    listing.keep(wanted)
    listing.left_out[f"of a {unit} of another part (on_bad=skip) [D11]"] += int((~wanted).sum())


def _check_left(listing: Listing) -> None:
    if not listing.paths:
        removed = ", ".join(f"{count:,} {reason}" for reason, count in listing.left_out.items())
        removed = f"; left out: {removed}" if removed else ""
        bad = f"; bad: {len(listing.bad):,}" if listing.bad else ""
        raise DataError("D13", f"{listing.source}: no image is left of {listing.rows_read:,} rows{removed}{bad}")


def _without_undecodable(adapter: Adapter, listing: Listing, decoded: Decoded) -> npt.NDArray[np.bool_] | None:
    """Count the files that cannot be decoded as bad rows and drop them; which stay, or None for all."""
    good = np.array([not code for code, _ in decoded.problems], dtype=bool)
    if good.all():
        return None
    for i in np.flatnonzero(~good).tolist():
        code, problem = decoded.problems[i]
        file = listing.paths[i].relative_to(listing.root).as_posix()
        detail = f"{file} ({listing.paths[i].stat().st_size:,} bytes) {problem}"
        listing.reject(listing.columns["row"][i], code, detail, listing.places[i])
    listing.bad.sort(key=lambda row: row.row)
    judge(listing.bad, listing.rows_read, adapter.on_bad, adapter.max_bad)
    listing.keep(good)
    _check_left(listing)
    return good


def _some(decoded: Decoded, good: npt.NDArray[np.bool_]) -> SelectedImages:
    return SelectedImages(decoded.images, np.flatnonzero(good))


def _meta(listing: Listing) -> dict[str, npt.NDArray[Any]]:
    """The listing's columns in their normal form; those without any value are left out."""
    meta: dict[str, npt.NDArray[Any]] = {}
    for column, values in listing.columns.items():
        if column in NORMALISED:
            array, odd = normalised(column, np.array(values))
            listing.notes += [f"{column}: {reason} {count:,}" for reason, count in odd.items()]
        else:
            array = np.array(values)
        if array.dtype.kind != "U" or column == "image" or np.any(array != "") or column == "site":
            meta[column] = array
    for column in ("lesion", "patient"):
        if column in meta:
            fallback = meta["lesion"] if column == "patient" and "lesion" in meta else meta["image"]
            meta[column] = np.where(meta[column] == "", fallback, meta[column])
    meta["file"] = np.array([path.relative_to(listing.root).as_posix() for path in listing.paths], dtype=np.str_)
    return meta
