"""What `fedsec data check` finds out about a data set: what a run would stumble over, and what it would not notice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsec.data import registry
from fedsec.data.base import Dataset
from fedsec.data.digest import image_digests
from fedsec.data.listing import shared_groups
from fedsec.data.near import Pairs, near_pairs, thumbnails
from fedsec.data.registry import with_options
from fedsec.errors import ConfigError, DataError

SHOWN = 5
SITE_MINIMUM = 10
"""Training images of every site from which the sites are proposed as clients (`data.min_images`)."""
PATIENT_COLUMNS = ("patient", "lesion", "site", "view", "sex", "age")
CONFOUNDED = 0.3
"""Bits of mutual information of site and label from which the two count as confounded."""


@dataclass(frozen=True, eq=False)
class Checkup:
    """A data set, and what is remarkable about it."""

    dataset: Dataset
    layouts: tuple[str, ...]
    """Every layout that the folder has; the first was read."""
    missing: Mapping[str, int]
    """Column -> images without a value."""
    exact: Pairs
    """(P, 2) pixel-identical images: each with the first of its kind."""
    near: Pairs
    """(P, 2) images that are nearly the same, and not identical."""
    shared: Mapping[str, Counter[str]]
    """Patient, else lesion -> images in each part, of those in several parts."""
    confounding: float
    """Mutual information of site and label in bits."""

    @property
    def leaks(self) -> bool:
        """A patient, a lesion or the very same pixels lie in two parts."""
        split, pairs = self.dataset.split, self.exact
        return bool(self.shared) or bool(np.any(split[pairs[:, 0]] != split[pairs[:, 1]]))

    @property
    def bad(self) -> int:
        """Rows or files that cannot be used."""
        return self.dataset.report.n_bad

    def allowance(self) -> float:
        """`max_bad` that lets a run leave out what was found, rounded up to a thousandth."""
        rows = max(1, self.dataset.report.rows_read)
        return max(0.01, math.ceil(1000 * self.bad / rows) / 1000)

    def error(self) -> DataError:
        """The first bad row, as a run would report it."""
        row = self.dataset.report.bad[0]
        more = f" ({self.bad:,} bad rows or files in all)" if self.bad > 1 else ""
        hint = "repair it, or leave such rows out with --skip-bad"
        return DataError(row.code, f"{row.file}:{row.row}: {row.detail}{more}; {hint}")

    def lines(self) -> list[str]:
        """The findings, one a line, for people."""
        d, found = self.dataset, []
        if len(self.layouts) > 1:
            found.append(f"also looks like: {', '.join(self.layouts[1:])} (choose with --as)")
        if self.missing:
            known = ", ".join(f"{name} {count:,}" for name, count in self.missing.items())
            found.append(f"missing values: {known}")
        if d.report.unknown_labels:
            known = ", ".join(f"{name} {count:,}" for name, count in d.report.unknown_labels.items())
            found.append(f"unknown labels: {known}")
        found += [f"bad: {row}" for row in d.report.bad]
        if self.bad > len(d.report.bad):
            found.append(f"bad: {self.bad - len(d.report.bad):,} more")
        for name, pairs in (("exact duplicates", self.exact), ("near duplicates", self.near)):
            found.append(f"{name}: {self._pairs(pairs)}")
        if self.shared:
            group, counts = next(iter(self.shared.items()))
            parts = " and ".join(f"{part} ({n})" for part, n in counts.items())
            found.append(f"in several parts: {len(self.shared):,} patients or lesions, such as {group}: {parts}")
        else:
            found.append("in several parts: no patient or lesion")
        if self.confounding > CONFOUNDED:
            found.append(
                f"warning: site tells the label: {self.confounding:.2f} bits of mutual information; a network can "
                "learn the site instead of the disease"
            )
        return found

    def _pairs(self, pairs: Pairs) -> str:
        if not len(pairs):
            return "none"
        d = self.dataset
        across = int((d.split[pairs[:, 0]] != d.split[pairs[:, 1]]).sum())
        groups = d.groups()
        apart = int((groups[pairs[:, 0]] != groups[pairs[:, 1]]).sum())
        files = d.meta.get("file", d.meta["image"])
        shown = "; ".join(f"{_name(d, files, i)} = {_name(d, files, j)}" for i, j in pairs[:SHOWN].tolist())
        more = "; …" if len(pairs) > SHOWN else ""
        return f"{len(pairs):,} ({across:,} across parts, {apart:,} across groups): {shown}{more}"

    def to_json(self) -> dict[str, Any]:
        """Counts and file names."""
        d = self.dataset
        return {
            "name": d.name,
            "layouts": list(self.layouts),
            "task": d.task,
            "images": len(d),
            "groups": len(np.unique(d.groups())),
            "counts": d.counts(),
            "missing": dict(self.missing),
            "exact_duplicates": d.meta["image"][self.exact].tolist(),
            "near_duplicates": d.meta["image"][self.near].tolist(),
            "in_several_parts": len(self.shared),
            "site_label_bits": round(self.confounding, 3),
            "report": d.report.to_json(),
            "licence": d.licence,
        }

    def advice(self, given: str, **options: str | int | Path | None) -> str:
        """The `fedsec run` line that fits what was found.

        Args:
            given: name or path, with options, as it was checked. options: further ones, such as `size`.
        """
        d = self.dataset
        words = ["fedsec run --attack gradinversion --defense dp", f"--data {_quoted(given)}"]
        words += [f"--{key.replace('_', '-')} {_quoted(str(value))}" for key, value in options.items() if value]
        train = d.meta["site"][d.split == "train"] if "site" in d.meta else np.zeros(0, dtype="<U1")
        sites, counts = np.unique(train, return_counts=True)
        if len(sites) > 1 and "" not in sites and counts.min() >= SITE_MINIMUM:
            words.append("--partition site")
        if self.leaks:
            words.append("--set data.splits=safe")
        return " ".join(words)


def check(given: str, *, layout: str | None = None, data_dir: Path | None = None, size: int | None = None) -> Checkup:
    """Read a data set as a run would, except that bad rows are counted instead of ending it, and look at all of it.

    Args:
        given: name or path, with options. layout: read a folder as this set. data_dir: where names are looked up.
        size: side in pixels.

    Raises:
        FedsecError: nothing of it can be read.
    """
    tolerant = with_options(given, **({"layout": layout} if layout else {}))
    try:
        dataset = registry.load(with_options(tolerant, on_bad="skip", max_bad="1"), data_dir=data_dir, size=size)
    except ConfigError as error:
        if "on_bad" not in str(error):
            raise
        dataset = registry.load(tolerant, data_dir=data_dir, size=size)
    folder = Path(given.partition(":")[0]).expanduser()
    found = registry.layouts(folder) if folder.is_dir() and not layout else []
    return of_dataset(dataset, tuple(found))


def of_dataset(dataset: Dataset, layouts: tuple[str, ...] = ()) -> Checkup:
    """What is remarkable about a data set that was read."""
    digests = image_digests(dataset.images)
    first: dict[bytes, int] = {}
    exact = [(first[d], i) for i, d in enumerate(digests.tolist()) if first.setdefault(d, i) != i]
    near = near_pairs(thumbnails(dataset.images))
    near = near[digests[near[:, 0]] != digests[near[:, 1]]]
    return Checkup(
        dataset=dataset,
        layouts=layouts,
        missing={c: n for c in PATIENT_COLUMNS if c in dataset.meta and (n := _missing(dataset, c))},
        exact=np.array(exact, dtype=np.int64).reshape(-1, 2),
        near=near,
        shared=shared_groups(dataset.split.tolist(), dataset.groups().tolist()),
        confounding=_mutual_information(dataset),
    )


def _missing(dataset: Dataset, column: str) -> int:
    values = dataset.meta[column]
    if values.dtype.kind == "f":
        return int(np.isnan(values).sum())
    own = values if column not in ("patient", "lesion") else np.where(values == dataset.meta["image"], "", values)
    return int((own == "").sum())


def _mutual_information(dataset: Dataset) -> float:
    """Of site and label in bits, over the images whose site is known; single-label sets only."""
    if "site" not in dataset.meta or dataset.task == "multilabel":
        return 0.0
    known = dataset.meta["site"] != ""
    if not known.any():
        return 0.0
    _, sites = np.unique(dataset.meta["site"][known], return_inverse=True)
    table: npt.NDArray[np.float64] = np.zeros((sites.max() + 1, dataset.num_classes))
    np.add.at(table, (sites, dataset.labels[known]), 1.0)
    joint = table / table.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    return float((joint[joint > 0] * np.log2(joint[joint > 0] / apart[joint > 0])).sum())


def _name(dataset: Dataset, files: npt.NDArray[Any], i: int) -> str:
    """An npz file's images have no file of their own."""
    own = str(files[i])
    return str(dataset.meta["image"][i]) if own.endswith("_images") else own


def _quoted(text: str) -> str:
    return f"'{text}'" if set(text) & set(" ()&;|*?$") else text
