"""What an audit compares with the truth: source, attributes, inversion, strata, and budgets of shadows."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedsec import data as data_sets
from fedsec.audit.attributes import compare_traits
from fedsec.audit.cohort import Cohort
from fedsec.audit.inversion import Sides, ratio_p, ratios
from fedsec.audit.membership import by_stratum, measured, most_exposed, sentence, spread
from fedsec.audit.source import compare_sources
from fedsec.config import expand
from fedsec.federation.assemble import Federation, assemble, resolve
from fedsec.federation.shadows import train_shadows
from fedsec.findings import MembershipScores, SourceGuesses, TraitGuess
from fedsec.progress import Progress

N = 1200


def cohort(owners: int = 4) -> Cohort:
    member = np.arange(N) < N // 2
    owner = np.where(member, np.arange(N) % owners, -1)
    return Cohort(np.arange(N), member, owner, np.arange(0))


def exam(owners: int = 4, seed: int = 0) -> Any:
    """As much of an exam as a judge looks at, over images without any pattern."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(N, 1, 12, 12, generator=generator)
    groups = np.arange(N).astype(str)
    sex = np.array(["F", "M"])[np.random.default_rng(seed).integers(0, 2, N)]
    dataset = SimpleNamespace(batch=lambda rows: (images[rows], None), groups=lambda: groups)
    return SimpleNamespace(cohort=cohort(owners), dataset=dataset, seed=seed, traits=lambda: {"sex": sex})


def test_only_the_lift_over_the_best_baseline_is_leakage() -> None:
    subject = exam()
    owner = subject.cohort.owner
    draw = np.random.default_rng(0)
    right = np.where(draw.random(N) < 0.6, owner, (owner + 1) % 4)
    found = compare_sources([SourceGuesses("good", right), SourceGuesses("blind", draw.integers(0, 4, N))], subject)
    best = max(found["baselines"].values())
    assert found["method"] == "good" and found["lift"].value == pytest.approx(found["accuracy"].value - best)
    assert found["lift"].low > 0.2
    blind = compare_sources([SourceGuesses("blind", draw.integers(0, 4, N))], subject)
    assert blind["lift"].low < 0.02
    assert np.array(found["confusion"]).sum() == N // 2


@pytest.mark.parametrize("leak", [True, False])
def test_an_attribute_is_leaked_only_where_members_differ(leak: bool) -> None:
    """A19: a probe that reads sex off everybody is no finding; one that reads it off members alone is."""
    subject = exam()
    truth = subject.traits()["sex"] == "F"
    draw = np.random.default_rng(1)
    strength = np.where(subject.cohort.member | (not leak), 2.0, 0.0)
    scores = truth * strength + draw.normal(size=N)
    found = compare_traits([TraitGuess("sex", "F", scores, draw.normal(size=N))], subject, draw)
    (row,) = found["rows"]
    assert row["features"].low > 0.6 and row["pixels"].low < 0.5 < row["pixels"].high
    assert (row["gap"].low > 0) is leak


def test_ratio_finds_a_copied_image_and_nothing_in_fresh_ones() -> None:
    """With a null of re-splits instead of fresh images the copy has p = 0.5."""
    generator = torch.Generator().manual_seed(0)
    members, others, public = torch.randn(3, 300, 60, generator=generator)
    side = Sides(members, others, members)
    null = ratios(public, side)
    copied = members[:1] + 0.1 * torch.randn(1, 60, generator=generator)
    (ratio,) = ratios(copied, side)
    assert ratio < 0.5 and ratio_p(ratio, null) < 0.01
    fresh = [ratio_p(v, null) for v in ratios(torch.randn(400, 60, generator=generator), side)]
    assert np.mean(np.array(fresh) < 0.05) <= 34 / 400  # 99.9 % point of Bin(400, 0.05)


def test_groups_are_measured_on_their_own_and_small_ones_are_left_out() -> None:
    """The leak of one group is found there, and the intervals hold for all groups together."""
    subject = cohort()
    draw = np.random.default_rng(0)
    sex = np.array(["F", "M"])[np.arange(N) % 2]
    site = np.where(np.arange(N) % 10 == 0, "small", "large")
    scores = draw.normal(size=N) + 1.0 * (subject.member & (sex == "F"))
    found = by_stratum(MembershipScores("loss", scores), subject, {"sex": sex, "site": site}, draw)
    rows = {(row["column"], row["value"]): row for row in found}
    assert set(rows) == {("sex", "F"), ("sex", "M"), ("site", "large")}
    assert rows["sex", "F"]["auc"].low > 0.6 and rows["sex", "M"]["auc"].low < 0.5
    assert all(row["auc"].level == pytest.approx(1 - 0.05 / 3) for row in found)


def test_spread_is_flat_without_a_leak_and_sums_to_one() -> None:
    draw = np.random.default_rng(0)
    found = spread(draw.normal(size=4000), draw.normal(size=4000))
    assert sum(found["members"]) == pytest.approx(1, abs=1e-3) and max(found["members"]) < 0.07
    assert np.allclose(found["others"], 0.05, atol=1e-3)


def test_the_most_exposed_are_members_with_an_answer() -> None:
    subject = cohort()
    scores = np.arange(N, dtype=float)
    scores[100] = np.nan
    places = most_exposed(MembershipScores("loss", scores), subject, 3)
    assert places.tolist() == [599, 598, 597]


def test_no_power_is_promised_for_what_is_not_printed() -> None:
    """A23: 200 non-members resolve no TPR at 1 % FPR, so that the report may not say which it would have noticed."""
    member = np.arange(800) < 600
    few = Cohort(np.arange(800), member, np.where(member, 0, -1), np.arange(0))
    draw = np.random.default_rng(0)
    found = measured([MembershipScores("loss", draw.normal(size=800))], few, np.arange(800).astype(str), draw)
    assert "not_resolvable" in found["headline"]["tpr_at_1pct_fpr"] and found["power"].keys() == {"auc"}
    assert "TPR" not in sentence(found, True)


def test_permuted_membership_is_at_chance() -> None:
    """A6: the judge brings no leak of its own."""
    subject = cohort()
    draw = np.random.default_rng(3)
    found = measured([MembershipScores("loss", draw.normal(size=N))], subject, np.arange(N).astype(str), draw)
    assert {"auc", "tpr"} == found["power"].keys()
    assert 0.46 < found["attacks"]["loss"]["auc"].value < 0.54


@pytest.fixture(scope="module")
def federation() -> Federation:
    tables = {
        "data": {"name": "synthetic-cxr:images=300"},
        "model": {"name": "tests.audit.networks:small"},
        "federation": {"clients": 1, "rounds": 1, "local_steps": 2, "engine": "serial", "device": "cpu"},
        "baseline": False,
    }
    return assemble(resolve(expand(tables)[0]))


def test_shadows_are_kept_and_a_spent_budget_leaves_one_pair(federation: Federation, tmp_path: Path) -> None:
    rows = federation.dataset.rows(split="train")
    first = train_shadows(federation, rows, 6, tmp_path, deadline=time.monotonic())
    assert len(first.models) == 2 and first.contains.shape == (2, len(rows))

    class Counting(Progress):
        trained = 0

        def advance(self, done: int, message: str = "") -> None:
            self.trained += 1

    progress = Counting()
    full = train_shadows(federation, rows, 6, tmp_path, progress)
    assert len(full.models) == 6 and progress.trained == 4  # the first pair was there
    np.testing.assert_array_equal(full.contains[:2], first.contains)
    assert (full.contains.sum(0) == 3).all()  # every image is in half of them
    for early, again in zip(first.models, full.models[:2], strict=True):
        for a, b in zip(early().state_dict().values(), again().state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)
    generous = train_shadows(federation, rows, 8, tmp_path, deadline=time.monotonic() + 60)
    assert len(generous.models) == 8


def test_patients_are_never_split_between_shadows(federation: Federation, tmp_path: Path) -> None:
    rows = data_sets.load("synthetic-cxr:images=300").rows(split="train")
    contains = train_shadows(federation, rows, 2, tmp_path).contains
    groups = federation.dataset.groups()[rows]
    for patient in np.unique(groups):
        assert len(np.unique(contains[0, groups == patient])) == 1
