from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon
from sklearn.metrics import mutual_info_score

from fedsec.data.base import Dataset
from fedsec.data.partition import PartitionSpec, partition
from fedsec.data.partition_report import jensen_shannon, mutual_information, total_variation
from fedsec.errors import ConfigError
from tests.data.conftest import make_dataset


def hospital(n: int = 400, classes: int = 4, seed: int = 0) -> Dataset:
    """Patients with one to four images each, at three sites, a third of them in the test part."""
    rng = np.random.default_rng(seed)
    patient = np.sort(rng.integers(0, n // 2, n))
    return make_dataset(
        np.concatenate([np.arange(classes), rng.integers(0, classes, n - classes)]),
        patient=[f"p{p}" for p in patient],
        site=[f"site {p % 3}" for p in patient],
        split=np.where(patient % 4 == 0, "test", "train"),
    )


kinds = st.sampled_from(["iid", "dirichlet", "quantity", "patient", "site"])


@settings(deadline=None, max_examples=60)
@given(kinds, st.sampled_from(["patient", "image"]), st.integers(2, 8), st.integers(0, 9), st.floats(0.3, 50))
def test_properties(kind: Any, unit: Any, k: int, seed: int, alpha: float) -> None:
    d = hospital(seed=seed)
    rows = np.arange(len(d))
    spec = PartitionSpec(kind, alpha=alpha, unit=unit, min_images=1)
    clients = None if kind == "site" else k
    result = partition(d, rows, spec, clients, seed)
    assert len(result.clients) == len(result.names) == (3 if kind == "site" else k)
    assert np.array_equal(np.sort(np.concatenate(result.clients)), rows)  # disjoint, and all
    assert all((np.diff(c) > 0).all() for c in result.clients)  # sorted
    if unit == "patient":
        patients = [set(d.groups()[c]) for c in result.clients]
        assert sum(map(len, patients)) == len(set.union(*patients))
    again = partition(d, rows, spec, clients, seed)
    assert all(np.array_equal(a, b) for a, b in zip(result.clients, again.clients, strict=True))
    order = np.random.default_rng(seed).permutation(len(d))
    moved = partition(d.select(order), rows, spec, clients, seed)
    assert all(np.array_equal(a, np.sort(order[b])) for a, b in zip(result.clients, moved.clients, strict=True))
    assert result.report.sizes == tuple(map(len, result.clients)) and result.report.left_out == 0


@settings(deadline=None, max_examples=40)
@given(kinds, st.integers(2, 6), st.integers(0, 9), st.floats(0.3, 10))
def test_the_test_part_is_dealt_to_the_same_clients(kind: Any, k: int, seed: int, alpha: float) -> None:
    d = hospital(seed=seed)
    result = partition(
        d, d.rows(split="train"), PartitionSpec(kind, alpha=alpha, min_images=1), None if kind == "site" else k, seed
    )
    local = result.deal(d, "test")
    assert np.array_equal(np.sort(np.concatenate(local)), d.rows(split="test"))
    assert len(local) == len(result.clients) and min(map(len, local)) > 0
    groups = [set(d.groups()[rows]) for rows in local]
    assert sum(map(len, groups)) == len(set.union(*groups))
    if kind == "site":
        for rows, name in zip(local, result.names, strict=True):
            assert set(d.meta["site"][rows]) == {name}
    assert len(result.deal(d, "val")) == k or kind == "site"


def test_the_test_part_follows_the_training_proportions() -> None:
    n = 20_000
    d = make_dataset(np.arange(n) % 3, split=np.where(np.arange(n) // 3 % 2, "train", "test"))
    result = partition(d, d.rows(split="train"), PartitionSpec("dirichlet", alpha=0.5), 5, seed=1)
    local = result.deal(d, "test")
    for c in range(3):
        train = np.array([(d.labels[rows] == c).mean() * len(rows) for rows in result.clients])
        test = np.array([(d.labels[rows] == c).mean() * len(rows) for rows in local])
        np.testing.assert_allclose(train / train.sum(), test / test.sum(), atol=1e-3)


def test_iid_sizes_differ_by_at_most_one_image() -> None:
    d = make_dataset(np.zeros(103, dtype=int))
    sizes = partition(d, np.arange(103), PartitionSpec("iid", unit="image"), 5).report.sizes
    assert max(sizes) - min(sizes) <= 1


def test_large_alpha_is_even() -> None:
    d = make_dataset(np.arange(3000) % 3)
    result = partition(d, np.arange(3000), PartitionSpec("dirichlet", alpha=1e6, unit="image"), 10)
    for row in result.report.table:
        assert all(abs(count - 100) <= 2 for count in row)
    assert result.report.jensen_shannon < 1e-3


def test_small_alpha_gives_each_class_to_one_client() -> None:
    d = make_dataset(np.arange(900) % 3)
    spec = PartitionSpec("dirichlet", alpha=1e-3, unit="image", min_images=0)
    shares = []
    for seed in range(20):
        table = np.array(partition(d, np.arange(900), spec, 4, seed).report.table)
        shares.append((table.max(0) / table.sum(0)).mean())
    assert np.mean(shares) >= 0.95
    with pytest.raises(ConfigError, match=r"client \d would hold \d+ of 900 images.*larger alpha"):
        partition(d, np.arange(900), dataclasses.replace(spec, min_images=10), 10)


def test_power_law_sizes() -> None:
    d = make_dataset(np.zeros(1100, dtype=int))
    spec = PartitionSpec("quantity", alpha=1.0, law="power", unit="image")
    sizes = partition(d, np.arange(1100), spec, 3).report.sizes
    assert sizes == (600, 300, 200)  # 1 : 1/2 : 1/3


def test_patients_are_dealt_in_equal_numbers_or_one_each() -> None:
    d = hospital()
    groups = partition(d, np.arange(len(d)), PartitionSpec("patient"), 7).report.groups
    assert max(groups) - min(groups) <= 1
    alone = partition(d, np.arange(len(d)), PartitionSpec("patient", min_images=1))
    assert set(alone.report.groups) == {1} and len(alone.clients) == len(set(d.meta["patient"]))


def test_sites_are_the_clients() -> None:
    d = hospital()
    result = partition(d, np.arange(len(d)), PartitionSpec("site"))
    assert result.names == ("site 0", "site 1", "site 2")
    for name, rows in zip(result.names, result.clients, strict=True):
        assert np.array_equal(rows, d.rows(site=name))
    assert partition(d, np.arange(len(d)), PartitionSpec("site"), 3).names == result.names


def small_sites() -> Dataset:
    return make_dataset(np.zeros(60, dtype=int), site=["a"] * 30 + ["b"] * 20 + ["c"] * 7 + [""] * 3)


def test_small_sites_need_a_choice() -> None:
    d, rows = small_sites(), np.arange(60)
    with pytest.raises(ConfigError, match="3 images have no site: set small=merge, small=drop"):
        partition(d, rows, PartitionSpec("site"))
    merged = partition(d, rows, PartitionSpec("site", small="merge"))
    assert dict(zip(merged.names, merged.report.sizes, strict=True)) == {"a": 30, "b": 20, "other": 10}
    dropped = partition(d, rows, PartitionSpec("site", small="drop"))
    assert dropped.names == ("a", "b") and dropped.report.left_out == 10
    assert dropped.report.notes == ("sites left out: (none) 3, c 7",)
    with pytest.raises(ConfigError, match="'other' is below min_images=11"):
        partition(d, rows, PartitionSpec("site", small="merge", min_images=11))
    with pytest.raises(ConfigError, match="not one site is left"):
        partition(d, rows, PartitionSpec("site", small="drop", min_images=100))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda d: partition(d, range(400), PartitionSpec("site"), 5),
            "5 clients asked for, but partition=site gives 3",
        ),
        (lambda d: partition(d, range(400), PartitionSpec("site", column="view")), "knows no 'view'.*columns: image"),
        (lambda d: partition(d, range(400), PartitionSpec("iid"), 300), r"300 clients but \d+ patients.*unit=image"),
        (lambda d: partition(d, range(9), PartitionSpec("iid", unit="image"), 10), "10 clients but 9 images"),
        (lambda d: partition(d, range(50), PartitionSpec("iid"), 9), "would hold .* min_images=10: use fewer than 9"),
        (lambda d: PartitionSpec("shards"), "partition=shards: choose iid, dirichlet"),
        (lambda d: PartitionSpec(alpha=0), "alpha > 0"),
    ],
)
def test_requests_that_cannot_be_met(call: Callable[[Dataset], Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        call(hospital())
    assert "\n" not in str(caught.value)


def test_any_configuration_object_with_the_fields_will_do() -> None:
    from fedsec.config import DataConfig

    d = hospital()
    result = partition(d, np.arange(400), DataConfig(partition="dirichlet", alpha=5.0, min_images=3), 4, seed=2)
    assert result.spec == PartitionSpec("dirichlet", alpha=5.0, min_images=3)


def test_multilabel_groups_go_by_their_rarest_label() -> None:
    labels = np.zeros((300, 3), dtype=np.float32)
    labels[:, 0], labels[:60, 1], labels[:30, 2] = 1, 1, 1
    result = partition(make_dataset(labels), np.arange(300), PartitionSpec("dirichlet", alpha=1e6), 3)
    assert [row[2] for row in result.report.table] == [10, 10, 10]


def test_a_patient_at_two_sites_is_said() -> None:
    d = make_dataset(np.zeros(40, dtype=int), patient=["p"] * 2 + [f"q{i}" for i in range(38)], site=["a", "b"] * 20)
    assert (
        "1 patients or lesions have images at two sites"
        in partition(d, range(40), PartitionSpec("site")).report.notes[0]
    )


def test_divergences_against_scipy() -> None:
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), 8), rng.dirichlet(np.ones(5), 8)
    np.testing.assert_allclose(jensen_shannon(p, q), jensenshannon(p, q, base=2, axis=1) ** 2, atol=1e-12)
    np.testing.assert_allclose(total_variation(p, q), [max((a - b)[a > b].sum(), 0) for a, b in zip(p, q, strict=True)])
    assert jensen_shannon(np.array([1.0, 0]), np.array([0, 1.0])) == 1
    a, b = rng.integers(0, 3, 500), rng.integers(0, 4, 500)
    table = np.histogram2d(a, b, bins=(3, 4))[0]
    assert mutual_information(table) == pytest.approx(mutual_info_score(a, b) / np.log(2))


def test_report_of_confounded_sites() -> None:
    labels = np.repeat([0, 1], 50)
    d = make_dataset(labels, site=np.where(labels == 0, "a", "b"))
    report = partition(d, np.arange(100), PartitionSpec("site")).report
    assert report.jensen_shannon == report.total_variation == 1
    assert report.site_information == pytest.approx(1)
    assert "share 1.00 bit" in report.notes[0]
    assert report.missing == {"a": ("c1",), "b": ("c0",)}
    assert report.effective_clients == 2
    assert "effective clients" in report.text() and report.to_json()["missing"] == {"a": ["c1"], "b": ["c0"]}


def test_effective_clients_of_unequal_sizes() -> None:
    d = make_dataset(np.zeros(100, dtype=int), site=["a"] * 90 + ["b"] * 10)
    assert partition(d, np.arange(100), PartitionSpec("site")).report.effective_clients == pytest.approx(1 / 0.82)
