"""What happened while a data set was loaded: every row is used or counted, and what looks odd is said."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsec.data.digest import PARTS, Digests, Duplicates, find_duplicates

SHOWN_BAD = 20


@dataclass(frozen=True)
class BadRow:
    """One row that could not be used."""

    file: str
    row: int
    """1-based data row."""
    code: str
    detail: str

    def __str__(self) -> str:
        return f"{self.file}:{self.row}: {self.detail} [{self.code}]"


@dataclass(frozen=True)
class LoadReport:
    """Counts of one load; stored with every run."""

    rows_read: int = 0
    rows_used: int = 0
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> rows."""
    bad: tuple[BadRow, ...] = ()
    """The first bad rows; `n_bad` counts all."""
    n_bad: int = 0
    duplicates: Duplicates = field(default_factory=Duplicates)
    constant_images: int = 0
    per_split: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Part -> images, groups and the count of each class."""
    unknown_labels: Mapping[str, int] = field(default_factory=dict)
    """Label -> entries that nobody knows (NaN)."""
    unknown_age: int = 0
    patient_known: bool = False
    """False: `patient` holds the lesion, else the image."""
    official_leak: int = 0
    """Validation and test images whose patient or lesion also lies in an earlier published part."""
    policy: Mapping[str, Any] = field(default_factory=dict)
    """The choices that changed labels, rows or pixels."""
    notes: tuple[str, ...] = ()
    """What the reader found odd about the files."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """The reader's notes, and what the contents themselves give away."""
        found = list(self.notes)
        if self.duplicates.across:
            text = ", ".join(f"{pair} {count:,}" for pair, count in self.duplicates.across.items())
            found.append(f"pixel-identical images lie in two parts: {text}; splits=safe leaves them out")
        if self.duplicates.conflicting:
            found.append(f"{self.duplicates.conflicting:,} images occur with two different labels [D19]")
        if self.official_leak:
            found.append(
                f"{self.official_leak:,} val or test images show a patient or lesion of an earlier part; "
                "splits=safe separates them [D11]"
            )
        if self.constant_images:
            found.append(f"{self.constant_images:,} images are one flat colour [D21]")
        return tuple(found)

    def to_json(self) -> dict[str, Any]:
        """Plain nested values."""
        return {**dataclasses.asdict(self), "warnings": list(self.warnings)}

    def line(self, name: str) -> str:
        """The one line that every load prints."""
        left = ", ".join(f"{count:,} {reason}" for reason, count in self.left_out.items())
        return (
            f"{name}: {self.rows_read:,} rows read, {self.rows_used:,} used"
            f"; left out: {left or 'none'}; bad: {self.n_bad:,}"
        )


def with_contents(
    report: LoadReport,
    *,
    digests: Digests,
    labels: npt.NDArray[Any],
    class_names: tuple[str, ...],
    split: npt.NDArray[np.str_],
    groups: npt.NDArray[np.str_],
    official: bool,
) -> LoadReport:
    """The report, with everything that can be read off the finished data set.

    Args:
        report: what the reader counted.
        digests: (N,) of `image_digests`.
        labels: (N,) classes or (N, L) labels.
        class_names: the L names.
        split: (N,) part of each image.
        groups: (N,) patient, else lesion, else image.
        official: whether the parts are the published ones, so that a shared group is a leak of theirs.
    """
    duplicates = find_duplicates(digests, split, labels)
    leak = _shared_group_images(split, groups) if official else 0
    unknown = {}
    if labels.ndim == 2:
        missing = np.isnan(labels).sum(0)
        unknown = {name: int(n) for name, n in zip(class_names, missing, strict=True) if n}
    return dataclasses.replace(
        report,
        rows_used=len(labels),
        duplicates=duplicates,
        official_leak=leak,
        unknown_labels=unknown,
        per_split=counts_by_part(labels, class_names, split, groups),
    )


def class_counts(labels: npt.NDArray[Any], num_classes: int) -> npt.NDArray[np.int64]:
    """(L,) images of each class; multi-label: known positives, a soft label counting from 0.5."""
    if labels.ndim == 2:
        return np.asarray((np.nan_to_num(labels) >= 0.5).sum(0), dtype=np.int64)
    return np.bincount(labels, minlength=num_classes)


def counts_by_part(
    labels: npt.NDArray[Any],
    class_names: tuple[str, ...],
    split: npt.NDArray[np.str_],
    groups: npt.NDArray[np.str_],
) -> dict[str, dict[str, Any]]:
    """Part -> `{"images", "groups", "classes": {name: count}}`, for the parts that have images."""
    result: dict[str, dict[str, Any]] = {}
    for part in (*PARTS, ""):
        rows = split == part
        if rows.any():
            counts = class_counts(labels[rows], len(class_names))
            classes = {name: int(n) for name, n in zip(class_names, counts, strict=True)}
            result[part] = {"images": int(rows.sum()), "groups": len(np.unique(groups[rows])), "classes": classes}
    return result


def _shared_group_images(split: npt.NDArray[np.str_], groups: npt.NDArray[np.str_]) -> int:
    in_train, in_val, in_test = (split == part for part in PARTS)
    leaked = in_val & np.isin(groups, groups[in_train])
    leaked |= in_test & np.isin(groups, groups[in_train | in_val])
    return int(leaked.sum())
