"""The one object that every data set becomes: images, labels, groups, sites and parts, and where they come from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from fedsec.data.digest import PARTS, fingerprint
from fedsec.data.images import ImageSource, Rows, SelectedImages, to_tensor
from fedsec.data.report import LoadReport, class_counts, counts_by_part
from fedsec.errors import ConfigError, DataError

if TYPE_CHECKING:
    import torch

    from fedsec.types import Task

Unit = Literal["patient", "lesion", "image"]
Texts = npt.NDArray[np.str_]
FALLBACK: dict[str, tuple[str, ...]] = {
    "patient": ("patient", "lesion", "image"),
    "lesion": ("lesion", "image"),
    "image": ("image",),
}


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Who made a data set, and what may be done with it."""

    licence: str = "unknown"
    """Printed before first use, and in every report that shows the images."""
    redistributable: bool = False
    commercial: bool = False
    citation: str = ""
    homepage: str = ""

    def provenance(self) -> dict[str, Any]:
        """These five fields by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(Provenance)}


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset(Provenance):
    """Labelled images. Frozen; adapters build it, everything else reads it. Row order is that of the label file."""

    name: str
    task: Task
    images: ImageSource
    labels: npt.NDArray[Any]
    """Single label: (N,) int64. Multi-label: (N, L) float32 in [0, 1], NaN where unknown."""
    class_names: tuple[str, ...]
    """The L names; their order is part of the contract."""
    meta: Mapping[str, npt.NDArray[Any]]
    """Columns of length N. `image` (unique text) is always there; `patient`, `lesion`, `site`, `view`, `sex`, `age`,
    `file` and `row` where the source knows them. Use `groups` for what must not be split."""
    split: Texts
    """(N,) `train`, `val`, `test` or empty."""
    fingerprint: str
    """Hash of the content: part of a run's hash, and a cache key."""
    variant: str = ""
    """What distinguishes it from others of this name, such as `size=28`."""
    positive_class: int | None = None
    """The class that means disease in a binary set."""
    split_origin: Literal["official", "derived", "none"] = "none"
    report: LoadReport = field(default_factory=LoadReport)

    def __post_init__(self) -> None:
        n = len(self.images)
        for name, column in {"labels": self.labels, "split": self.split, **self.meta}.items():
            if len(column) != n:
                raise DataError("D10", f"{self.name}: {n} images but {len(column)} values of '{name}'")
        if "image" not in self.meta:
            raise DataError("D02", f"{self.name}: meta has no column 'image'; every image needs an id")
        multilabel = self.task == "multilabel"
        shape, dtype = ((n, self.num_classes), np.float32) if multilabel else ((n,), np.int64)
        if self.labels.shape != shape or self.labels.dtype != dtype:
            found = f"{self.labels.shape} {self.labels.dtype}"
            raise DataError("D06", f"{self.name}: labels must be {shape} {np.dtype(dtype)}, found {found}")
        if not multilabel and n and not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
            row = int(np.flatnonzero((self.labels < 0) | (self.labels >= self.num_classes))[0])
            raise DataError(
                "D06", f"{self.name}: labels[{row}] = {self.labels[row]}, class count is {self.num_classes}"
            )
        unknown = set(np.unique(self.split)) - {*PARTS, ""}
        if unknown:
            raise DataError("D11", f"{self.name}: unknown part '{min(unknown)}'; use train, val or test")

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """L, the number of classes or labels."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of every image, as `batch` returns it by default."""
        height, width, channels = self.images.shape
        return channels, height, width

    @property
    def label_mask(self) -> npt.NDArray[np.bool_]:
        """Which entries of `labels` are known."""
        return ~np.isnan(self.labels) if self.task == "multilabel" else np.ones(len(self), dtype=bool)

    def batch(
        self, indices: npt.ArrayLike, size: int | None = None, channels: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Images and labels at these rows.

        Args:
            indices: (B,) row numbers, or a mask of length N.
            size: side in pixels (bicubic, antialiased); None: as stored.
            channels: 1, 3 or None (as stored).

        Returns:
            x (B, C, S, S) float32 in [0, 1], and y: (B,) int64, or (B, L) float32 with NaN where unknown.
        """
        import torch

        rows = self._positions(indices)
        return to_tensor(self.images.read(rows), size, channels), torch.from_numpy(self.labels[rows])

    def tensors(
        self, split: str, size: int | None = None, channels: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """All images and labels of one part, as `batch` returns them."""
        return self.batch(self.rows(split=split), size, channels)

    def select(self, indices: npt.ArrayLike) -> Dataset:
        """These rows (numbers or a mask), in this order; the pixels are not copied."""
        rows = self._positions(indices)
        return dataclasses.replace(
            self,
            images=SelectedImages(self.images, rows),
            labels=self.labels[rows],
            meta={name: column[rows] for name, column in self.meta.items()},
            split=self.split[rows],
            fingerprint=fingerprint(self.fingerprint, "select", rows),
        )

    def rows(self, split: str | None = None, **columns: str) -> Rows:
        """Row numbers of a part, of a site (`site="a"`), or of any other meta value; all conditions hold."""
        mask = np.ones(len(self), dtype=bool)
        if split is not None:
            if split not in (*PARTS, ""):
                raise ConfigError(f"{self.name}: no part '{split}'; use train, val or test")
            mask &= self.split == split
        for name, value in columns.items():
            if name not in self.meta:
                raise ConfigError(f"{self.name} has no column '{name}'; columns: {', '.join(self.meta)}")
            mask &= self.meta[name].astype(str) == str(value)
        return np.flatnonzero(mask)

    def where(self, split: str | None = None, **columns: str) -> Dataset:
        """The images for which all conditions of `rows` hold."""
        return self.select(self.rows(split, **columns))

    def groups(self, unit: Unit = "patient") -> Texts:
        """(N,) the id of each image's patient or lesion; where the source has none, the next smaller unit."""
        ids = np.full(len(self), "", dtype=np.str_)
        for column in FALLBACK[unit]:
            if column in self.meta:
                values = self.meta[column].astype(str)
                ids = np.where(ids == "", values, ids)
        return ids

    def counts(self) -> dict[str, dict[str, Any]]:
        """Part -> `{"images", "groups", "classes": {name: count}}`."""
        return counts_by_part(self.labels, self.class_names, self.split, self.groups())

    def describe(self) -> str:
        """What `fedsec data check` prints: the facts, the class table by part and by site, and every warning."""
        channels, height, width = self.image_shape
        lines = [
            self.report.line(self.name),
            f"task {self.task}, {len(self):,} images of {channels} x {height} x {width}, "
            f"{len(np.unique(self.groups())):,} {'patients' if self.report.patient_known else 'groups'}, "
            f"parts {self.split_origin}, fingerprint {self.fingerprint[:12]}",
            f"licence {self.licence}; {'' if self.commercial else 'not '}for commercial use",
            "",
            *self._table("part", self.split),
        ]
        if "site" in self.meta and np.any(self.meta["site"] != ""):
            lines += ["", *self._table("site", self.meta["site"])]
        if self.report.warnings:
            lines += ["", *(f"warning: {text}" for text in self.report.warnings)]
        return "\n".join(lines)

    def _table(self, title: str, column: Texts) -> list[str]:
        order = [p for p in PARTS if np.any(column == p)] if title == "part" else []
        values = [*order, *sorted(set(column.tolist()) - set(order))]
        rows = [[title, "images", *self.class_names]]
        for value in values:
            mask = column == value
            counts = class_counts(self.labels[mask], self.num_classes)
            rows.append([value or "(none)", f"{mask.sum():,}", *(f"{n:,}" for n in counts)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]

    def _positions(self, indices: npt.ArrayLike) -> Rows:
        """Row numbers from row numbers or a mask; a mask taken for numbers would select rows 0 and 1 only."""
        given = np.asarray(indices)
        if given.dtype == np.bool_:
            if given.shape != (len(self),):
                raise ValueError(f"a mask of shape {given.shape} does not fit {len(self)} images")
            return np.flatnonzero(given)
        return given.astype(np.int64).reshape(-1)
