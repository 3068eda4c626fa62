"""Which client owns which image: the ways to cut one data set into hospitals.

Patients (or lesions) are never split between clients unless `unit="image"` is asked for. The same law deals the
validation and test parts, so that every client has local images to be judged on.
"""

from __future__ import annotations

import dataclasses
import heapq
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from fedsec.data.base import Dataset
from fedsec.data.digest import PARTS
from fedsec.data.images import Rows
from fedsec.data.partition_report import PartitionReport, examine
from fedsec.data.splits import group_classes, rarest_label
from fedsec.errors import ConfigError

Kind = Literal["iid", "dirichlet", "quantity", "site", "patient"]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
DEFAULT_CLIENTS = 10
MAX_REDRAWS = 1000
OTHER = "other"
LEFT_OUT = -1


class SpecLike(Protocol):
    """What `partition` reads of a configuration; other fields of `PartitionSpec` are used where present."""

    @property
    def partition(self) -> str:
        """One of `Kind`."""
        ...

    @property
    def alpha(self) -> float:
        """Dirichlet concentration."""
        ...

    @property
    def unit(self) -> str:
        """What is never split."""
        ...

    @property
    def min_images(self) -> int:
        """Smallest client."""
        ...


@dataclass(frozen=True)
class PartitionSpec:
    """How the images are dealt."""

    partition: Kind = "iid"
    alpha: float = 0.5
    """Dirichlet concentration: of the classes (`dirichlet`) or of the sizes (`quantity`); small is uneven."""
    unit: Literal["patient", "image"] = "patient"
    min_images: int = 10
    law: Literal["dirichlet", "power"] = "dirichlet"
    """Sizes of `quantity`: drawn from Dirichlet(alpha), or proportional to rank^-alpha."""
    column: str = "site"
    """The metadata column whose values are the clients of `site`."""
    small: Literal["error", "merge", "drop"] = "error"
    """What `site` does with values of fewer than `min_images` images, and with blank ones."""

    def __post_init__(self) -> None:
        choices: dict[str, Any] = {
            "partition": Kind,
            "unit": Literal["patient", "image"],
            "law": Literal["dirichlet", "power"],
            "small": Literal["error", "merge", "drop"],
        }
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                raise ConfigError(f"{name}={getattr(self, name)}: choose {', '.join(get_args(literal))}")
        if not self.alpha > 0 or self.min_images < 0:
            raise ConfigError(f"alpha={self.alpha}, min_images={self.min_images}: alpha > 0 and min_images >= 0 needed")

    @classmethod
    def of(cls, spec: SpecLike) -> PartitionSpec:
        """The fields of this class that another configuration object has."""
        return cls(**{f.name: getattr(spec, f.name) for f in dataclasses.fields(cls) if hasattr(spec, f.name)})


@dataclass(frozen=True, eq=False)
class Partition:
    """Who owns which image."""

    clients: tuple[Rows, ...]
    """Sorted data set rows of each client; disjoint."""
    names: tuple[str, ...]
    report: PartitionReport
    spec: PartitionSpec
    seed: int
    shares: Floats | None = None
    """(C, K) for each class (`dirichlet`) or for all images (C = 1, `quantity`), the share of each client."""

    def deal(self, dataset: Dataset, part: str) -> tuple[Rows, ...]:
        """The rows of another part (`val`, `test`) for the same clients, by the same law.

        Sites own their own images; Dirichlet and quantity partitions use the proportions drawn for training. A client
        that would go without gets one group from the client with most, as far as there are as many groups as clients.
        """
        rows = dataset.rows(split=part)
        if self.spec.partition == "site":
            names = _site_names(dataset, rows, self.spec.column)
            merged = np.where(np.isin(names, self.names), names, OTHER)
            return tuple(rows[merged == name] for name in self.names)
        units = _Units.of(dataset, rows, self.spec.unit)
        rng = np.random.default_rng([self.seed, PARTS.index(part) + 1])
        owner = _deal_units(units, self.spec, len(self.clients), self.shares, rng)
        _fill_empty(owner, units, self.shares, len(self.clients))
        return _split_rows(rows, owner[units.index], len(self.clients))


def partition(
    dataset: Dataset, rows: npt.ArrayLike, spec: SpecLike, num_clients: int | None = None, seed: int = 0
) -> Partition:
    """Deal rows of a data set to clients, reproducibly from (content, spec, seed); row order is irrelevant.

    Args:
        dataset: where the rows are.
        rows: row numbers to deal, usually those of the training part.
        spec: the kind of partition and its parameters.
        num_clients: K. None: the number of sites (`site`), of patients (`patient`), else 10.
        seed: of every draw.

    Raises:
        ConfigError: more clients than groups, a client below `min_images`, or a number of clients that contradicts
            the number of sites; one line with what to change.
    """
    given = np.sort(np.asarray(rows, dtype=np.int64))
    settings = PartitionSpec.of(spec)
    if settings.partition == "site":
        clients, names, notes = _by_site(dataset, given, settings, num_clients)
        shares = None
    else:
        units = _Units.of(dataset, given, settings.unit)
        k = num_clients or (len(units.sizes) if settings.partition == "patient" else DEFAULT_CLIENTS)
        owner, shares = _by_law(dataset, units, settings, k, seed)
        clients = _split_rows(given, owner[units.index], k)
        names, notes = tuple(f"client {i}" for i in range(k)), []
    report = examine(dataset, clients, names, left_out=len(given) - sum(map(len, clients)), notes=notes)
    return Partition(clients, names, report, settings, seed, shares)


@dataclass(frozen=True, eq=False)
class _Units:
    """The things that are dealt: patients, lesions or images, in the order of their ids."""

    index: Ints
    """(n,) unit of each row."""
    sizes: Ints
    """(U,) images of each unit."""
    classes: Ints
    """(U,) rarest class of each unit, -1 for none."""
    num_classes: int

    @classmethod
    def of(cls, dataset: Dataset, rows: Rows, unit: Literal["patient", "image"]) -> _Units:
        ids, index = np.unique(dataset.groups(unit)[rows], return_inverse=True)
        classes = group_classes(rarest_label(dataset.labels[rows]), index, len(ids)) if len(ids) else index
        return cls(index, np.bincount(index, minlength=len(ids)), classes, dataset.num_classes)


def _by_law(dataset: Dataset, units: _Units, spec: PartitionSpec, k: int, seed: int) -> tuple[Ints, Floats | None]:
    """(U,) the client of each unit, and the proportions that were drawn."""
    if k > len(units.sizes):
        what = "images" if spec.unit == "image" else "patients or lesions"
        hint = "" if spec.unit == "image" or len(units.sizes) == len(units.index) else ", or set unit=image"
        raise ConfigError(f"{dataset.name}: {k} clients but {len(units.sizes)} {what}: ask for fewer clients{hint}")
    proportions = np.random.default_rng([seed, 0])
    smallest, least = 0, -1
    for _ in range(MAX_REDRAWS):
        shares = _draw_shares(spec, units.num_classes, k, proportions)
        owner = _deal_units(units, spec, k, shares, np.random.default_rng([seed, 1]))
        counts = np.bincount(owner, weights=units.sizes, minlength=k).astype(np.int64)
        if counts.min() >= spec.min_images:
            return owner, shares
        if counts.min() > least:
            smallest, least = int(counts.argmin()), int(counts.min())
        if shares is None or spec.law == "power":
            break
    larger = ", a larger alpha" if shares is not None else ""
    raise ConfigError(
        f"{dataset.name}: client {smallest} would hold {least} of {len(units.index)} images, fewer than "
        f"min_images={spec.min_images}: use fewer than {k} clients{larger} or min_images={least}"
    )


def _draw_shares(spec: PartitionSpec, num_classes: int, k: int, rng: np.random.Generator) -> Floats | None:
    """(C, K) rows of proportions that add up to 1; the last row is for units without a class."""
    if spec.partition == "dirichlet":
        return rng.dirichlet(np.full(k, spec.alpha), size=num_classes + 1)
    if spec.partition == "quantity" and spec.law == "dirichlet":
        return rng.dirichlet(np.full(k, spec.alpha), size=1)
    if spec.partition == "quantity":
        powers = np.arange(1, k + 1, dtype=np.float64)[None] ** -spec.alpha
        return np.asarray(powers / powers.sum())
    return None


def _deal_units(units: _Units, spec: PartitionSpec, k: int, shares: Floats | None, rng: np.random.Generator) -> Ints:
    """(U,) the client of each unit."""
    order = rng.permutation(len(units.sizes))
    owner = np.empty(len(order), dtype=np.int64)
    if spec.partition == "iid":
        heap = [(0, client) for client in range(k)]
        for unit in order.tolist():
            held, client = heapq.heappop(heap)
            owner[unit] = client
            heapq.heappush(heap, (held + int(units.sizes[unit]), client))
    elif shares is None:
        owner[order] = np.arange(len(order)) % k
    else:
        row = units.classes % len(shares)  # -1, no class, is the last row; a single row serves every class
        for c in np.unique(row):
            members = order[row[order] == c]
            sizes = units.sizes[members]
            centre = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
            owner[members] = np.minimum(np.searchsorted(np.cumsum(shares[c]), centre), k - 1)
    return owner


def _fill_empty(owner: Ints, units: _Units, shares: Floats | None, k: int) -> None:
    """Give each client without a unit one from the client with most, of a class it has much of; in place."""
    if len(owner) < k:
        return
    for client in np.setdiff1d(np.arange(k), owner):
        donor = np.bincount(owner, minlength=k).argmax()
        offered = np.flatnonzero(owner == donor)
        wanted = np.zeros(len(offered)) if shares is None else shares[units.classes[offered] % len(shares), client]
        owner[offered[wanted.argmax()]] = client


def _split_rows(rows: Rows, client: Ints, k: int) -> tuple[Rows, ...]:
    return tuple(rows[client == i] for i in range(k))


def _site_names(dataset: Dataset, rows: Rows, column: str) -> npt.NDArray[np.str_]:
    if column not in dataset.meta or np.all(dataset.meta[column].astype(str) == ""):
        known = ", ".join(sorted(dataset.meta))
        raise ConfigError(
            f"{dataset.name} knows no '{column}' of its images: choose another partition; columns: {known}"
        )
    return dataset.meta[column].astype(str)[rows]


def _by_site(
    dataset: Dataset, rows: Rows, spec: PartitionSpec, num_clients: int | None
) -> tuple[tuple[Rows, ...], tuple[str, ...], list[str]]:
    """Rows and names of one client per value of the column, in the order of the values, and what was merged or left."""
    values = _site_names(dataset, rows, spec.column)
    # Sites of other parts count too: their test images must not vanish in silence.
    everywhere = np.unique(_site_names(dataset, np.arange(len(dataset)), spec.column))
    sizes = {name: int((values == name).sum()) for name in everywhere.tolist()}
    small = [name for name, size in sizes.items() if not name or size < spec.min_images]
    notes = []
    if small and spec.small == "error":
        name = small[0]
        problem = (
            f"{sizes[name]} images have no {spec.column}"
            if not name
            else f"{spec.column} '{name}' has {sizes[name]} images to train on, fewer than min_images={spec.min_images}"
        )
        raise ConfigError(f"{dataset.name}: {problem}: set small=merge, small=drop or a smaller min_images")
    names = [name for name in sizes if name not in small]
    if small:
        listed = ", ".join(f"{name or '(none)'} {sizes[name]}" for name in small)
        notes.append(f"{spec.column}s {'merged into other' if spec.small == 'merge' else 'left out'}: {listed}")
    if small and spec.small == "merge":
        values = np.where(np.isin(values, small), OTHER, values)
        names.append(OTHER)
    clients = tuple(rows[values == name] for name in names)
    if not names or min(map(len, clients)) < spec.min_images:
        problem = f"not one {spec.column} is left" if not names else f"'{OTHER}' is below min_images={spec.min_images}"
        raise ConfigError(f"{dataset.name}: {problem}: set a smaller min_images, or choose another partition")
    if num_clients not in (None, len(names)):
        problem = f"{num_clients} clients asked for, but partition=site gives {len(names)} ({', '.join(names)})"
        raise ConfigError(f"{dataset.name}: {problem}: leave the number of clients out, or choose another partition")
    groups = dataset.groups()
    owners: dict[str, int] = {}
    for i, client in enumerate(clients):
        for group in np.unique(groups[client]).tolist():
            owners[group] = owners.get(group, 0) | 1 << i
    split = sum(bits & (bits - 1) > 0 for bits in owners.values())
    if split:
        notes.append(f"{split} patients or lesions have images at two {spec.column}s and lie at two clients")
    return clients, tuple(names), notes
