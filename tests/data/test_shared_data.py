"""Counts that the specification took from the shared files, and from the sources' own tables."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fedsec import data
from fedsec.data.partition import PartitionSpec, partition


def counts(dataset: data.Dataset, part: str) -> list[int]:
    return list(dataset.counts()[part]["classes"].values())


def test_pneumoniamnist(shared_data: Path) -> None:
    d = data.load("pneumoniamnist", data_dir=shared_data)
    assert [counts(d, p) for p in ("train", "val", "test")] == [[1214, 3494], [135, 389], [234, 390]]
    assert d.report.duplicates.across == {"train/val": 8}
    assert d.report.duplicates.inside == {"train": 18, "test": 3}
    assert any("[D15]" in w for w in d.report.warnings)
    assert d.image_shape == (1, 28, 28) and d.positive_class == 1 and not d.report.patient_known
    safe = data.load("pneumoniamnist", data_dir=shared_data, splits="safe")
    assert not safe.report.duplicates.across


def test_kermany(shared_data: Path) -> None:
    d = data.load("kermany", data_dir=shared_data)
    assert [counts(d, p) for p in ("train", "val", "test")] == [[505, 1351], [63, 142], [94, 245]]
    assert d.report.patient_known and d.report.official_leak == 0 and d.variant == "size=64"
    assert set(d.meta["subtype"]) == {"normal", "bacteria", "virus"}
    assert (d.labels[d.meta["subtype"] == "normal"] == 0).all()


def test_nih14_by_its_file_name(shared_data: Path) -> None:
    d = data.load("nih14_64", data_dir=shared_data)
    assert (d.name, d.variant, d.task, d.num_classes) == ("nih14", "size=64", "multilabel", 14)


def test_nih14(shared_data: Path) -> None:
    d = data.load("nih14", data_dir=shared_data)
    found = d.counts()
    assert [(found[p]["images"], found[p]["groups"]) for p in found] == [(1541, 658), (146, 94), (306, 188)]
    assert counts(d, "train") == [159, 88, 222, 262, 45, 43, 347, 48, 61, 99, 44, 33, 46, 12]
    assert d.task == "multilabel" and d.report.official_leak == 0
    assert set(d.meta["view"]) == {"PA", "AP"} and set(d.meta["sex"]) == {"F", "M"}


def test_ham10000_npz(shared_data: Path) -> None:
    d = data.load("ham10000", data_dir=shared_data)
    assert [len(d.rows(split=p)) for p in ("train", "val", "test")] == [6984, 1019, 2012]
    assert counts(d, "train") == [230, 363, 767, 81, 778, 4667, 98]
    assert d.report.official_leak == 0 and d.report.unknown_age == 57 and not d.commercial
    dealt = partition(d, d.rows(split="train"), PartitionSpec("site"))
    sizes = dict(zip(dealt.names, dealt.report.sizes, strict=True))
    assert sizes == {"rosendahl": 1567, "vidir_modern": 2339, "vidir_molemax": 2770, "vienna_dias": 308}


def test_ham10000_site_table(shared_data: Path) -> None:
    d = data.load("ham10000", data_dir=shared_data)
    dealt = partition(d, np.arange(len(d)), PartitionSpec("site"))
    assert dict(zip(dealt.names, dealt.report.table, strict=True)) == {
        "vidir_molemax": (0, 2, 124, 30, 24, 3720, 54),
        "vidir_modern": (32, 211, 475, 51, 680, 1832, 82),
        "rosendahl": (295, 296, 490, 30, 342, 803, 3),
        "vienna_dias": (0, 5, 10, 4, 67, 350, 3),
    }


@pytest.mark.parametrize("name", ["pneumoniamnist", "kermany", "nih14", "ham10000"])
@pytest.mark.parametrize("kind", ["iid", "dirichlet", "quantity", "patient"])
def test_every_partition_of_every_set(shared_data: Path, name: str, kind: str) -> None:
    d = data.load(name, data_dir=shared_data)
    rows = d.rows(split="train")
    dealt = partition(d, rows, PartitionSpec(kind, alpha=1.0), 5)  # type: ignore[arg-type]
    assert np.array_equal(np.sort(np.concatenate(dealt.clients)), rows)
    groups = [set(d.groups()[c]) for c in dealt.clients]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert np.array_equal(np.sort(np.concatenate(dealt.deal(d, "test"))), d.rows(split="test"))
