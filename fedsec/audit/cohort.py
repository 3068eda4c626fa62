"""Who was trained on, who was not, and whether the two sets can be compared: the checks that come before any attack."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import chi2_contingency
from torch.nn import functional as F

from fedsec.audit.blind import blind_auc
from fedsec.audit.blind import verdict as blind_verdict
from fedsec.data.base import Dataset
from fedsec.data.digest import image_digests
from fedsec.errors import RefusedError
from fedsec.federation.assemble import Federation
from fedsec.metrics.membership import Interval
from fedsec.types import RoundContext

Rows = NDArray[np.int64]
SMALLEST, COARSE = 200, 1000
"""Images a side below which membership is not measured, and below which only coarse statements are made."""
SHARED_WARN, SHARED_REFUSE = 0.01, 0.10
NEAR, THUMB = 0.995, 12
"""Correlation of standardised thumbnails from which two images count as nearly the same."""
HELD_OUT = 200
"""Unused training images from which they serve as non-members."""


@dataclass(frozen=True)
class Check:
    """One validity check and what it found."""

    id: str
    name: str
    status: Literal["ok", "warning", "invalid"]
    message: str
    value: Any = None

    def to_json(self) -> dict[str, Any]:
        """JSON form."""
        return {k: v for k, v in vars(self).items() if v is not None}


@dataclass(frozen=True)
class Cohort:
    """Members and non-members as data set rows, in an order that tells nothing, and the checks they passed."""

    rows: Rows
    """(N,)."""
    member: NDArray[np.bool_]
    """(N,)."""
    owner: NDArray[np.int64]
    """(N,) client of each member; -1 for non-members."""
    population: Rows
    """(Z,) known non-members that are no candidates."""
    checks: tuple[Check, ...] = ()
    origin: str = ""
    """Where the non-members are from."""
    blind: Interval | None = None
    blind_scores: NDArray[np.float64] | None = None
    """(N,) of the program without the model."""

    @property
    def valid(self) -> bool:
        """No check forbids a comparison."""
        return all(check.status != "invalid" for check in self.checks)

    def keep(self, mask: NDArray[np.bool_]) -> Cohort:
        """The candidates of a mask (N,)."""
        return replace(self, rows=self.rows[mask], member=self.member[mask], owner=self.owner[mask])


def of_federation(federation: Federation) -> Cohort:
    """The members of a federation, and non-members of the same origin.

    Non-members are training images that no client got (`data.max_train` leaves some); else the validation part; where
    the parts were cut by fedsec itself, and so have one origin, the test part, and the population is the validation
    part. An official test part is often of another acquisition, and is never used.
    """
    dataset = federation.dataset
    members = np.concatenate(federation.rows)
    owner = np.concatenate([np.full(len(r), k) for k, r in enumerate(federation.rows)])
    canaries = np.zeros(0, dtype=np.int64) if federation.canaries is None else federation.canaries.rows
    real = ~np.isin(members, canaries)  # canaries carry wrong labels: they are no patients' images
    members, owner = members[real], owner[real]
    unused = np.setdiff1d(dataset.rows(split="train"), np.concatenate([*federation.rows, canaries]))
    val, test = dataset.rows(split="val"), dataset.rows(split="test")
    draw = RoundContext(federation.cell.seed, 0, 0).numpy("cohort")
    if len(unused) >= HELD_OUT:
        others, population, origin = unused, val, "training images that no client was given"
        if len(population) < HELD_OUT:
            others, population = halved(others, draw)
    elif dataset.split_origin == "derived":
        others, population, origin = test, val, "test part, cut from the same images"
    else:
        (others, population), origin = halved(val, draw), "half of the validation part"
    return assembled(members, others, population, owner, origin, draw)


def halved(rows: Rows, draw: np.random.Generator) -> tuple[Rows, Rows]:
    """Two random halves."""
    first, second = np.array_split(draw.permutation(rows), 2)
    return first, second


def assembled(
    members: Rows, others: Rows, population: Rows, owner: Rows, origin: str, draw: np.random.Generator
) -> Cohort:
    """A cohort in random order, without checks yet."""
    rows = np.concatenate([members, others]).astype(np.int64)
    member = np.arange(len(rows)) < len(members)
    owners = np.concatenate([owner, np.full(len(others), -1)]).astype(np.int64)
    order = draw.permutation(len(rows))
    return Cohort(rows[order], member[order], owners[order], np.sort(population).astype(np.int64), (), origin)


def checked(dataset: Dataset, cohort: Cohort, seed: int, extra: Sequence[Check] = ()) -> Cohort:
    """Remove what spoils the comparison, and say whether it is valid (spec §1.4, V1 to V6 and V9).

    Raises:
        RefusedError: more than 10 % of the non-members are members, pixel for pixel.
    """
    checks = list(extra)
    cohort = _without_copies(dataset, cohort, checks)
    cohort = _without_member_patients(dataset, cohort, checks)
    cohort = _with_equal_labels(dataset, cohort, checks, seed)
    cohort = _as_many_others(cohort, seed)
    n1, n0 = int(cohort.member.sum()), int((~cohort.member).sum())
    status: Literal["ok", "warning", "invalid"] = "ok"
    text = f"{n1:,} members, {n0:,} non-members"
    if min(n1, n0) < SMALLEST:
        status, text = "invalid", f"{text}: fewer than {SMALLEST} a side say nothing about membership"
    elif min(n1, n0) < COARSE:
        status, text = "warning", f"{text}: below {COARSE:,} a side only coarse statements"
    checks.insert(0, Check("V1", "sizes", status, text, {"members": n1, "nonmembers": n0}))
    few = len(cohort.population) < 500
    text = f"{len(cohort.population):,} images serve as population" + (": fewer than 500" if few else "")
    checks.append(Check("V9", "population", "warning" if few else "ok", text, len(cohort.population)))
    if status == "invalid":
        return replace(cohort, checks=tuple(checks))
    x, _ = dataset.batch(cohort.rows)
    blind, scores = blind_auc(x, cohort.member, dataset.groups()[cohort.rows], seed)
    checks.append(Check("V6", "blind classifier", *blind_verdict(blind), blind.to_json()))
    return replace(cohort, checks=tuple(checks), blind=blind, blind_scores=scores)


def _without_copies(dataset: Dataset, cohort: Cohort, checks: list[Check]) -> Cohort:
    """V2 and V3: non-members, and images of the population, that are (nearly) members."""
    digests = image_digests(dataset.images)
    members = digests[cohort.rows[cohort.member]]
    copies = ~cohort.member & np.isin(digests[cohort.rows], members)
    count, others = int(copies.sum()), int((~cohort.member).sum())
    inside = len(members) - len(np.unique(members))
    share = count / max(1, others)
    if share > SHARED_REFUSE:
        raise RefusedError(
            f"{count:,} of {others:,} non-members are members, pixel for pixel: these sets were mixed up; "
            "give non-members that the model was not trained on"
        )
    text = f"{count} non-members are copies of members, removed; {inside} members repeat another member, kept"
    checks.append(Check("V2", "exact copies", "warning" if share > SHARED_WARN else "ok", text, count))
    cohort = cohort.keep(~copies)
    population = cohort.population[~np.isin(digests[cohort.population], digests[cohort.rows])]
    cohort = replace(cohort, population=population)
    near, chance = near_copies(dataset, cohort.rows[~cohort.member], cohort.rows[cohort.member])
    mask = np.ones(len(cohort.rows), dtype=bool)
    mask[np.flatnonzero(~cohort.member)[near]] = False
    text = f"{int(near.sum())} non-members nearly equal a member, removed; {chance:.2e} of random pairs do"
    checks.append(Check("V3", "near copies", "ok", text, int(near.sum())))
    return cohort.keep(mask)


def near_copies(dataset: Dataset, rows: Rows, among: Rows) -> tuple[NDArray[np.bool_], float]:
    """Which rows have a thumbnail that correlates above `NEAR` with one `among` the others, and how often pairs do."""
    a, b = (_thumbnails(dataset, r) for r in (rows, among))
    found, pairs = np.zeros(len(rows), dtype=bool), 0
    for start in range(0, len(rows), 1024):
        close = (a[start : start + 1024] @ b.T) >= NEAR
        found[start : start + 1024] = close.any(1).numpy()
        pairs += int(close.sum())
    return found, pairs / max(1, len(rows) * len(among))


def _thumbnails(dataset: Dataset, rows: Rows) -> torch.Tensor:
    parts = []
    for block in np.array_split(rows, max(1, len(rows) // 4096)):
        x, _ = dataset.batch(block)
        flat = F.adaptive_avg_pool2d(x, 2 * THUMB).flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        parts.append(centred / centred.norm(dim=1, keepdim=True).clamp(min=1e-9))
    return torch.cat(parts)


def _without_member_patients(dataset: Dataset, cohort: Cohort, checks: list[Check]) -> Cohort:
    """V4: non-members whose patient is a member leave; another image of a member tells on that member."""
    if not dataset.report.patient_known:
        text = "the data set has no patient ids: two images of one patient cannot be told apart from two patients"
        checks.append(Check("V4", "shared patients", "warning", text))
        return cohort
    groups = dataset.groups()
    shared = ~cohort.member & np.isin(groups[cohort.rows], groups[cohort.rows[cohort.member]])
    text = f"{int(shared.sum())} non-members are of a member's patient, removed"
    checks.append(Check("V4", "shared patients", "ok", text, int(shared.sum())))
    cohort = cohort.keep(~shared)
    kept = ~np.isin(groups[cohort.population], groups[cohort.rows])
    return replace(cohort, population=cohort.population[kept])


def _as_many_others(cohort: Cohort, seed: int) -> Cohort:
    """Surplus non-members join the population, so that shadows train on as many images as the target."""
    others = np.flatnonzero(~cohort.member)
    surplus = len(others) - int(cohort.member.sum())
    if surplus <= 0 or not cohort.member.any():
        return cohort
    keep = np.ones(len(cohort.rows), dtype=bool)
    keep[RoundContext(seed, 0, 0).numpy("surplus").choice(others, surplus, replace=False)] = False
    population = np.sort(np.concatenate([cohort.population, cohort.rows[~keep]]))
    return replace(cohort.keep(keep), population=population)


def _with_equal_labels(dataset: Dataset, cohort: Cohort, checks: list[Check], seed: int) -> Cohort:
    """V5: where label shares differ (χ² at 1 %), the larger side is thinned out until they are equal."""
    labels = np.asarray(dataset.labels)[cohort.rows]
    if labels.ndim > 1:
        checks.append(Check("V5", "label shares", "ok", "several labels an image: shares are not balanced"))
        return cohort
    classes = np.unique(labels)
    table = np.array([[np.sum(labels[cohort.member == side] == c) for c in classes] for side in (True, False)])
    p = float(chi2_contingency(table).pvalue) if len(classes) > 1 and table.sum(1).min() > 0 else 1.0
    if p >= 0.01:
        checks.append(Check("V5", "label shares", "ok", f"label shares agree (χ² p = {p:.2f})", p))
        return cohort
    draw = RoundContext(seed, 0, 0).numpy("label-shares")
    keep = np.zeros(len(labels), dtype=bool)
    for side in (True, False):
        # The shares of non-members stand; each side keeps as many as its scarcest class allows.
        shares = table[1] / table[1].sum()
        own = table[0 if side else 1]
        total = min(int(own[i] / shares[i]) for i in range(len(classes)) if shares[i] > 0)
        for i, c in enumerate(classes):
            rows = np.flatnonzero((labels == c) & (cohort.member == side))
            keep[draw.permutation(rows)[: round(total * shares[i])]] = True
    text = f"label shares differed (χ² p = {p:.1e}): {int((~keep).sum()):,} images left out until they agreed"
    checks.append(Check("V5", "label shares", "warning", text, p))
    return cohort.keep(keep)
