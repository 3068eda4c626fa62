"""A multi-label set as a binary one."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from fedsec.data import load
from fedsec.data.base import Dataset
from fedsec.data.findings import one_finding
from fedsec.errors import ConfigError

NAMES = ("No Finding", "Edema", "Pleural Effusion")
UNKNOWN = float("nan")
LABELS = np.array(
    [[1, 0, 0], [0, 1, 0], [0, UNKNOWN, 1], [0, UNKNOWN, 0], [0, 0.6, UNKNOWN], [0, 0.4, 0]], dtype=np.float32
)


def chest() -> Dataset:
    """Six images: none, one, one of two known, unknown, a soft label, and one too weak."""
    whole = load("synthetic-cxr:images=40").select(np.arange(6))
    return dataclasses.replace(
        whole, task="multilabel", labels=LABELS, class_names=NAMES, split=np.array(["train", "test"] * 3)
    )


def test_any_finding_leaves_out_what_nobody_knows_and_counts_it() -> None:
    found = one_finding(chest(), "any")
    assert (found.task, found.class_names, found.positive_class) == ("binary", ("no finding", "any finding"), 1)
    assert found.labels.tolist() == [0, 1, 1, 1, 0]  # the fourth is unknown; 'No Finding' is none
    assert found.report.left_out["any finding unknown"] == 1 and found.report.rows_used == 5
    assert found.counts() == found.report.per_split
    assert [str(i) for i in found.meta["image"]] == [str(chest().meta["image"][i]) for i in (0, 1, 2, 4, 5)]


def test_one_finding_whatever_its_case() -> None:
    found = one_finding(chest(), "pleural effusion")
    assert found.class_names == ("no Pleural Effusion", "Pleural Effusion")
    assert found.labels.tolist() == [0, 0, 1, 0, 0]
    assert found.fingerprint != one_finding(chest(), "any").fingerprint != chest().fingerprint


def test_a_complete_set_keeps_every_image() -> None:
    whole = dataclasses.replace(chest(), labels=np.nan_to_num(LABELS))
    found = one_finding(whole, "edema")
    assert len(found) == 6 and found.report.left_out == whole.report.left_out


@pytest.mark.parametrize(
    ("finding", "message"),
    [("edma", "did you mean 'Edema'"), ("x", "choose any or one of them"), ("", "no finding ''")],
)
def test_an_unknown_finding_is_one_line(finding: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        one_finding(chest(), finding)


def test_it_is_an_option_of_every_set() -> None:
    with pytest.raises(ConfigError, match="this set is binary"):
        load("synthetic-cxr:images=40,finding=any")
    assert load("synthetic-cxr:images=40,labels=multi,finding=any").task == "binary"
