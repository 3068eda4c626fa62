"""What an adapter reads off a data set's own files: one entry an image, in the order of the label file."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsec.data.report import BadRow
from fedsec.errors import DataError

NOT_FOUND = "{} not found"


@dataclass
class Listing:
    """The rows of a label file, or the files of a folder: every one is used, left out for a reason, or bad."""

    source: str
    """The label file or folder that rows are counted in, for messages."""
    root: Path
    """`file` in the data set's meta is relative to it."""
    class_names: tuple[str, ...] = ()
    """Empty: the adapter's own."""
    task: str | None = None
    """None: the adapter's own."""
    digests: list[str] = field(default_factory=list)
    """Of the label files."""
    rows_read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    bad: list[BadRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=dict)
    id_name: str = "image"
    """What the source calls an image's id."""
    paths: list[Path] = field(default_factory=list)
    labels: list[Any] = field(default_factory=list)
    split: list[str] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)
    """Label file of each entry, where there are several."""
    _rows: dict[str, int] = field(default_factory=dict)
    _missing: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.paths)

    def add(
        self,
        row: int,
        image: str,
        path: Path | None,
        label: Any,
        split: str = "",
        *,
        listed: str = "",
        source: str = "",
        **meta: Any,
    ) -> None:
        """One image.

        Args:
            row: 1-based row of the label file. image: its id.
            path: its file; None: not found, which makes the row bad (D07).
            label: class number, or one value a label with NaN where unknown.
            split: `train`, `val`, `test` or empty.
            listed: what the label file calls it. source: another label file than the listing's.
            meta: columns such as `patient`; the same ones for each image.
        """
        source = source or self.source
        if path is None:
            self.reject(row, "D07", NOT_FOUND.format(listed or image), source)
            self._missing[source] += 1
        elif image in self._rows:
            first = self._rows[image]
            detail = f"{self.id_name} '{image}' stands in rows {first} and {row}; remove one"
            self.reject(row, "D12", detail, source)
        else:
            self._rows[image] = row
            self.paths.append(path)
            self.labels.append(label)
            self.split.append(split)
            self.places.append(source)
            for name, value in {"image": image, "row": row, **meta}.items():
                self.columns.setdefault(name, []).append(value)

    def reject(self, row: int, code: str, detail: str, source: str = "") -> None:
        """One row that cannot be used."""
        self.bad.append(BadRow(source or self.source, row, code, detail))

    def finish(self) -> None:
        """Say of every missing file how many are missing, which is known only now."""
        for i, row in enumerate(self.bad):
            if row.code == "D07" and row.detail.endswith("not found"):
                total = f"{self._missing[row.file]:,} of {self.rows_read:,} listed files are missing"
                self.bad[i] = BadRow(row.file, row.row, row.code, f"{row.detail}; {total}")

    def label_array(self, multilabel: bool) -> npt.NDArray[Any]:
        """(N,) int64, or (N, L) float32."""
        if multilabel:
            width = len(self.class_names)
            return np.asarray(self.labels, dtype=np.float32).reshape(len(self.labels), width)
        return np.asarray(self.labels, dtype=np.int64).reshape(-1)

    def keep(self, wanted: npt.NDArray[np.bool_]) -> None:
        """Only these entries stay."""
        for rows in (self.paths, self.labels, self.split, self.places, *self.columns.values()):
            rows[:] = [value for value, good in zip(rows, wanted.tolist(), strict=True) if good]


def judge(bad: Sequence[BadRow], rows: int, on_bad: str, max_bad: float) -> None:
    """Stop at bad rows: at the first where `on_bad` is `error`, at too many where it is `skip`.

    Raises:
        DataError: the row's own code, or D20.
    """
    if not bad:
        return
    if on_bad == "error":
        same = sum(row.code == bad[0].code for row in bad)
        more = f" ({same:,} of {rows:,} rows are like this; on_bad=skip leaves them out)" if same > 1 else ""
        place = f"{bad[0].file}:{bad[0].row}" if bad[0].row else bad[0].file
        raise DataError(bad[0].code, f"{place}: {bad[0].detail}{more}")
    if len(bad) > max_bad * rows:
        codes = ", ".join(f"{code} {count:,}" for code, count in Counter(row.code for row in bad).items())
        first = "; ".join(map(str, bad[:3]))
        raise DataError(
            "D20", f"{len(bad):,} of {rows:,} rows are bad, more than max_bad={max_bad:g} ({codes}): {first}"
        )


def shared_groups(split: Sequence[str], groups: Sequence[str]) -> dict[str, Counter[str]]:
    """The groups of more than one part, each with its number of images in each part."""
    parts: dict[str, Counter[str]] = {}
    for part, group in zip(split, groups, strict=True):
        if part:
            parts.setdefault(group, Counter())[part] += 1
    return {group: counts for group, counts in parts.items() if len(counts) > 1}


def natural(text: str) -> list[tuple[int, int | str]]:
    """Sorts `image10` behind `image9`."""
    return [(0, int(t)) if t.isdecimal() else (1, t) for t in re.split(r"(\d+)", text) if t]
