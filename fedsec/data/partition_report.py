"""How uneven a partition is: sizes, class tables and divergences of the clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fedsec.data.base import Dataset
from fedsec.data.images import Rows
from fedsec.data.report import class_counts
from fedsec.data.splits import rarest_label

Floats = npt.NDArray[np.float64]
CONFOUNDED_BITS = 0.3
MAX_COMPARED = 1000


@dataclass(frozen=True)
class PartitionReport:
    """The clients at a glance; kept with every run."""

    names: tuple[str, ...]
    class_names: tuple[str, ...]
    table: tuple[tuple[int, ...], ...]
    """(K, L) images of each client and class; multi-label: positives."""
    sizes: tuple[int, ...]
    groups: tuple[int, ...]
    """Distinct patients, lesions or images of each client."""
    total_variation: float
    """Mean over client pairs of the total variation distance between class shares, in [0, 1]."""
    jensen_shannon: float
    """Mean over client pairs of the Jensen-Shannon divergence (base 2) between class shares, in [0, 1]."""
    effective_clients: float
    """(sum of sizes)^2 / sum of squared sizes: K where sizes are equal."""
    site_information: float | None
    """Bits that a site tells about the label (plug-in mutual information); None: no sites known."""
    left_out: int
    """Rows that no client owns."""
    notes: tuple[str, ...]

    @property
    def missing(self) -> Mapping[str, tuple[str, ...]]:
        """Client -> classes it has no image of."""
        empty = {
            name: tuple(c for c, n in zip(self.class_names, row, strict=True) if n == 0)
            for name, row in zip(self.names, self.table, strict=True)
        }
        return {name: classes for name, classes in empty.items() if classes}

    def to_json(self) -> dict[str, Any]:
        """Plain nested values."""
        return {**dataclasses.asdict(self), "missing": {name: list(classes) for name, classes in self.missing.items()}}

    def text(self) -> str:
        """The table and the figures, for people."""
        rows = [["client", "images", "groups", *self.class_names]]
        for name, size, groups, counts in zip(self.names, self.sizes, self.groups, self.table, strict=True):
            rows.append([name, f"{size:,}", f"{groups:,}", *(f"{n:,}" for n in counts)])
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
        lines.append(
            f"class shares differ by TV {self.total_variation:.3f}, JS {self.jensen_shannon:.3f} (mean of pairs); "
            f"{self.effective_clients:.1f} effective clients; left out: {self.left_out:,}"
        )
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def total_variation(p: Floats, q: Floats) -> Floats:
    """Half the L1 distance along the last axis, in [0, 1]."""
    return np.asarray(np.abs(p - q).sum(-1) / 2)


def jensen_shannon(p: Floats, q: Floats) -> Floats:
    """Jensen-Shannon divergence in bits along the last axis, in [0, 1] (Lin, 1991, eq. 4.1 with equal weights)."""
    return np.asarray(np.clip(_entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2, 0, 1))


def mutual_information(joint: Floats) -> float:
    """Mutual information in bits of a table of counts (A, B); the plug-in estimate, biased upwards by ~AB/2n."""
    p = joint / joint.sum()
    return float(_entropy(p.sum(0)) + _entropy(p.sum(1)) - _entropy(p.ravel()))


def examine(
    dataset: Dataset, clients: Sequence[Rows], names: Sequence[str], *, left_out: int, notes: Sequence[str]
) -> PartitionReport:
    """Measure a partition.

    Args:
        dataset: where the rows are. clients: rows of each client. names: of the clients.
        left_out: rows that no client owns. notes: what the partition itself has to say.
    """
    groups = dataset.groups()
    counts = [class_counts(dataset.labels[rows], dataset.num_classes) for rows in clients]
    sizes = np.array([len(rows) for rows in clients])
    owned = np.concatenate(list(clients))
    classes = rarest_label(dataset.labels[owned]) + 1
    client = np.repeat(np.arange(len(clients)), sizes)
    shares = _table(client, classes, len(clients), dataset.num_classes + 1)
    shares = (shares / np.maximum(shares.sum(1, keepdims=True), 1))[:MAX_COMPARED]
    tv, js, compared = 0.0, 0.0, max(1, len(shares) * (len(shares) - 1) // 2)
    for i in range(1, len(shares)):
        tv += float(total_variation(shares[i], shares[:i]).sum())
        js += float(jensen_shannon(shares[i], shares[:i]).sum())
    found = list(notes)
    if len(clients) > MAX_COMPARED:
        found.append(f"divergences compare the first {MAX_COMPARED} clients")
    information = _site_information(dataset, owned, classes)
    if information is not None and information > CONFOUNDED_BITS:
        found.append(
            f"site and label share {information:.2f} bit: a model can learn the site instead of the disease; "
            "read per-site results"
        )
    return PartitionReport(
        names=tuple(names),
        class_names=dataset.class_names,
        table=tuple(tuple(int(n) for n in row) for row in counts),
        sizes=tuple(int(n) for n in sizes),
        groups=tuple(len(np.unique(groups[rows])) for rows in clients),
        total_variation=tv / compared,
        jensen_shannon=js / compared,
        effective_clients=float(sizes.sum() ** 2 / (sizes**2).sum()),
        site_information=information,
        left_out=left_out,
        notes=tuple(found),
    )


def _entropy(p: Floats) -> Floats:
    """Shannon entropy in bits along the last axis."""
    return np.asarray(-(p * np.log2(np.where(p > 0, p, 1))).sum(-1))


def _table(a: npt.NDArray[np.int64], b: npt.NDArray[np.int64], rows: int, columns: int) -> Floats:
    """(rows, columns) counts of the pairs (a, b)."""
    return np.bincount(a * columns + b, minlength=rows * columns).reshape(rows, columns).astype(np.float64)


def _site_information(dataset: Dataset, rows: Rows, classes: npt.NDArray[np.int64]) -> float | None:
    if "site" not in dataset.meta or np.all(dataset.meta["site"] == ""):
        return None
    sites, site = np.unique(dataset.meta["site"][rows], return_inverse=True)
    return mutual_information(_table(site, classes, len(sites), int(classes.max()) + 1))
