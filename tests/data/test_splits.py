from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsec.data.splits import derived_split, group_classes, rarest_label, resplit
from fedsec.errors import ConfigError
from tests.data.conftest import make_dataset

labelled_groups = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 2), st.integers(1, 4)), min_size=3, max_size=80
)  # (class, site, images) of each group


def build(groups: list[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    ids = np.repeat([f"g{i}" for i in range(len(groups))], [n for _, _, n in groups])
    labels = np.repeat([c for c, _, _ in groups], [n for _, _, n in groups])
    sites = np.repeat([f"s{s}" for _, s, _ in groups], [n for _, _, n in groups])
    return ids, labels, sites


@settings(deadline=None, max_examples=60)
@given(labelled_groups, st.integers(0, 5))
def test_derived_split_properties(groups: list[tuple[int, int, int]], seed: int) -> None:
    ids, labels, sites = build(groups)
    split = derived_split(ids, labels, sites, seed=seed)
    owner = dict(zip(ids, split, strict=True))
    assert all(owner[g] == s for g, s in zip(ids, split, strict=True))  # no group in two parts
    counts = Counter(owner.values())
    for part, share in zip(("train", "val", "test"), (0.7, 0.1, 0.2), strict=True):
        # One group by rounding; covering a rare class may move one more for each class.
        assert abs(counts[part] - share * len(groups)) <= 1 + 4
    for c in range(4):
        of_class = [owner[f"g{i}"] for i, (label, _, _) in enumerate(groups) if label == c]
        if len(of_class) >= 3:
            assert {"train", "test"} <= set(of_class)
    order = np.random.default_rng(seed).permutation(len(ids))
    assert (derived_split(ids[order], labels[order], sites[order], seed=seed) == split[order]).all()


def test_shares_are_exact_to_one_group_when_no_class_is_rare() -> None:
    rng = np.random.default_rng(0)
    ids = np.array([f"p{i}" for i in range(997)])
    split = derived_split(ids, rng.integers(0, 3, 997), rng.choice(["a", "b", "c", "d"], 997))
    counts = Counter(split.tolist())
    assert abs(counts["train"] - 697.9) < 1 and abs(counts["val"] - 99.7) < 1 and abs(counts["test"] - 199.4) < 1


def test_strata_keep_the_shares_inside_each_site_and_class() -> None:
    ids = np.array([f"p{i}" for i in range(1000)])
    labels, sites = np.arange(1000) % 2, np.array([f"s{i // 2 % 5}" for i in range(1000)])
    split = derived_split(ids, labels, sites)
    for site in np.unique(sites):
        for label in (0, 1):
            here = split[(sites == site) & (labels == label)]
            assert [(here == p).sum() for p in ("train", "val", "test")] == [70, 10, 20]


def test_another_seed_is_another_split() -> None:
    ids = np.array([f"p{i}" for i in range(100)])
    labels = np.zeros(100, dtype=int)
    assert (derived_split(ids, labels, seed=0) != derived_split(ids, labels, seed=1)).any()


def test_shares_must_add_up() -> None:
    with pytest.raises(ConfigError, match="add up to 1"):
        derived_split(np.array(["a"]), np.array([0]), shares=(0.7, 0.2, 0.2))


def test_rarest_positive_label_of_images_and_groups() -> None:
    labels = np.array([[1, 1, 0], [1, 0, 0], [1, 0, 1], [0, 0, 0], [1, 1, np.nan]], dtype=np.float32)
    assert rarest_label(labels).tolist() == [1, 0, 2, -1, 1]
    # Images with classes 1, 0, 2, -1, 1 in groups a, a, b, c, c: of a and c the class with fewer images.
    assert group_classes(rarest_label(labels), np.array([0, 0, 1, 2, 2]), 3).tolist() == [0, 2, 1]


def test_multilabel_classes_reach_train_and_test() -> None:
    rng = np.random.default_rng(3)
    labels = (rng.random((90, 6)) < 0.05).astype(np.float32)
    split = derived_split(np.array([f"p{i}" for i in range(90)]), labels)
    for c in range(6):
        if labels[:, c].sum() >= 3:
            assert labels[split == "train", c].any() and labels[split == "test", c].any()


def test_safe_split_separates_groups_and_pixels() -> None:
    # 60 images of 30 patients; make_dataset gives row i the colour i % 256, so rows 256 apart are copies.
    n = 600
    d = make_dataset(np.arange(n) % 2, patient=[f"p{i // 2}" for i in range(n)], split=["train", "test"] * (n // 2))
    safe, derived = resplit(d, "safe"), resplit(d, "derived")
    for result in (safe, derived):
        parts = {p: set(result.groups()[result.split == p]) for p in ("train", "val", "test")}
        assert not parts["train"] & parts["test"] and not parts["train"] & parts["val"]
        assert result.split_origin == "derived" and result.report.official_leak == 0
    assert derived.report.duplicates.across and not safe.report.duplicates.across
    pixels = {p: {bytes(i) for i in safe.images.read(safe.rows(split=p))} for p in ("train", "val", "test")}
    assert not pixels["train"] & pixels["test"] and not pixels["train"] & pixels["val"]
    dropped = sum(safe.report.left_out.values())
    assert dropped > 0 and len(safe) == safe.report.rows_used == n - dropped
    assert len({d.fingerprint, safe.fingerprint, derived.fingerprint}) == 3
