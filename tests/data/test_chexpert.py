"""CheXpert's raw states under every policy, its views, labels and parts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from fedsec import data
from fedsec.data.uncertainty import POLICIES, policies, resolved
from fedsec.errors import ConfigError, DataError
from tests.data.trees import CHEXPERT, chexpert, edit, write_csv

NAN = math.nan
COMPETITION = ("Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion")
RAW = np.array([[1.0], [0.0], [-1.0], [NAN]], dtype=np.float32)
# The table of the specification (2.2): what 1, 0, -1 and empty become, blank=zero; NaN is unknown.
TABLE = {"u_zeros": 0.0, "u_ones": 1.0, "u_ignore": NAN, "u_selftrained": 0.7}


@pytest.mark.parametrize("blank", ["zero", "ignore"])
@pytest.mark.parametrize("policy", TABLE)
def test_four_raw_states(policy: str, blank: str) -> None:
    soft = np.full((4, 1), 0.7, dtype=np.float32)
    found = resolved(RAW, (policy,), blank, list("abcd"), soft)[:, 0]  # type: ignore[arg-type]
    expected = [1.0, 0.0, TABLE[policy], 0.0 if blank == "zero" else NAN]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("blank", ["zero", "ignore"])
def test_uncertain_as_a_class(blank: str) -> None:
    found = resolved(RAW, ("u_multiclass",), blank, list("abcd"))  # type: ignore[arg-type]
    unknown = [NAN] * 3 if blank == "ignore" else [0, 1, 0]
    np.testing.assert_allclose(found, [[1, 0, 0], [0, 1, 0], [0, 0, 1], unknown])


@pytest.mark.parametrize(("policy", "low", "high"), [("u_lsr_ones", 0.55, 0.85), ("u_lsr_zeros", 0.0, 0.3)])
def test_label_smoothing_is_drawn_once_for_each_image(policy: str, low: float, high: float) -> None:
    raw = np.full((500, 1), -1.0, dtype=np.float32)
    ids = [f"i{k}" for k in range(500)]
    drawn = resolved(raw, (policy,), "zero", ids)[:, 0]  # type: ignore[arg-type]
    assert low <= drawn.min() < drawn.max() <= high
    assert abs(drawn.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * 500)
    later = resolved(raw[250:], (policy,), "zero", ids[250:])[:, 0]  # type: ignore[arg-type]
    assert np.array_equal(later, drawn[250:])


def test_policies_by_label() -> None:
    mixed = dict(zip(COMPETITION, policies("mixed", COMPETITION), strict=True))
    assert {name for name, policy in mixed.items() if policy == "u_ones"} == {"Atelectasis", "Edema"}
    assert set(mixed.values()) == {"u_ones", "u_zeros"}
    assert policies("u_zeros+Edema:u_ignore", COMPETITION)[3] == "u_ignore"
    for text, words in (
        ("u_one", "did you mean 'u_ones'"),
        ("u_ones+Edma:u_zeros", "did you mean 'Edema'"),
        ("u_ones+Edema:u_multiclass", "all labels or to none"),
    ):
        with pytest.raises(ConfigError, match=words):
            policies(text, COMPETITION)
    assert set(POLICIES) >= {*TABLE, "u_multiclass"}


def uncertain(root: Path) -> Path:
    """The tree with uncertain Edema in the first row, a blank one in the second, and two lateral views."""
    chexpert(root)
    at = CHEXPERT.index("Edema")
    lines = (root / "train.csv").read_text().splitlines()
    for row, value in ((1, "-1.0"), (2, "")):
        fields = lines[row].split(",")
        fields[at] = value
        lines[row] = ",".join(fields)
    for row in (5, 9):
        lines[row] = lines[row].replace(",Frontal,AP", ",Lateral,")
    (root / "train.csv").write_text("\n".join(lines) + "\n")
    return root


def test_labels_views_patients_and_parts(tmp_path: Path) -> None:
    root = uncertain(tmp_path)
    d = data.load(root, size=16)
    assert d.class_names == COMPETITION and d.task == "multilabel"
    assert len(d) == 28 and d.report.left_out == {"lateral (view=frontal)": 2}
    assert d.labels[0, 3] == 1 and d.labels[1, 3] == 0 and d.report.policy["policy"]["Edema"] == "u_ones"
    assert d.meta["patient"][0] == "patient00001" and d.meta["study"][0] == "patient00001/study1"
    assert set(d.meta["sex"]) == {"F", "M"} and d.meta["age"][0] == 40 and d.meta["view"][0] == "AP"
    # The radiologists' part tests; a tenth of the training patients validates, with labels mined from reports.
    assert all(file.startswith("valid/") for file in d.meta["file"][d.split == "test"])
    assert np.sum(d.split == "test") == 6 and np.sum(d.split == "val") > 0
    assert "mined from reports" in d.report.policy["weak_labels"]
    assert any("published validation part tests" in text for text in d.report.notes)
    everything = data.load(root, size=16, view="all")
    assert len(everything) == 30 and everything.meta["view"][4] == "L"
    assert len(data.load(root, size=16, view="lateral")) == 2
    all14 = data.load(f"{root}:labels=all14", size=16)
    assert all14.num_classes == 14 and np.array_equal(all14.labels[:, 5], d.labels[:, 3])
    assert data.load(root, size=16, labels="Fracture+No Finding").class_names == ("Fracture", "No Finding")
    with pytest.raises(ConfigError, match="did you mean 'Fracture'"):
        data.load(root, labels="Fractur")


def test_policy_changes_the_labels_and_the_fingerprint(tmp_path: Path) -> None:
    root = uncertain(tmp_path)
    ones, ignored = data.load(f"{root}:policy=u_ones", size=16), data.load(f"{root}:policy=u_ignore", size=16)
    assert ones.fingerprint != ignored.fingerprint
    assert np.isnan(ignored.labels[0, 3]) and not ignored.label_mask[0, 3] and ignored.label_mask[0, 2]
    assert ignored.report.unknown_labels == {"Edema": 1}
    assert np.isnan(data.load(f"{root}:blank=ignore", size=16).labels[1, 3])
    three = data.load(f"{root}:policy=u_multiclass", size=16)
    assert three.num_classes == 15 and three.labels[0, 9:12].tolist() == [0, 0, 1]
    assert three.class_names[9:12] == ("Edema", "Edema: absent", "Edema: uncertain")


def test_self_training_takes_predictions(tmp_path: Path) -> None:
    root = uncertain(tmp_path / "set")
    with pytest.raises(ConfigError, match="needs predictions=FILE"):
        data.load(f"{root}:policy=u_selftrained", size=16)
    ids = data.load(root, size=16).meta["image"].tolist()
    table = write_csv(tmp_path / "p.csv", ["Path", *COMPETITION], [[i, 0.1, 0.2, 0.3, 0.4, 0.5] for i in ids])
    d = data.load(f"{root}:policy=u_selftrained,predictions={table}", size=16)
    assert d.labels[0, 3] == np.float32(0.4) and d.labels[2, 3] in (0, 1)
    edit(table, 3, "0.3", "1.3")
    with pytest.raises(DataError, match=r"p.csv:3: a probability lies outside 0 to 1"):
        data.load(f"{root}:policy=u_selftrained,predictions={table}", size=16)
    write_csv(table, ["Path", *COMPETITION], [[i, 0, 0, 0, 0, 0] for i in ids[1:]])
    with pytest.raises(DataError, match=r"no row for .*patient00001"):
        data.load(f"{root}:policy=u_selftrained,predictions={table}", size=16)


@pytest.mark.parametrize("value", ["-1.0", ""])
def test_radiologists_are_not_uncertain(tmp_path: Path, value: str) -> None:
    root = chexpert(tmp_path)
    lines = (root / "valid.csv").read_text().splitlines()
    fields = lines[2].split(",")
    fields[CHEXPERT.index("Edema")] = value
    lines[2] = ",".join(fields)
    (root / "valid.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"valid.csv:2: 'Edema' is '.*labelled by radiologists"):
        data.load(root, size=16)


def test_test_labels_become_the_test_part(tmp_path: Path) -> None:
    root = chexpert(tmp_path)
    rows = [line.split(",") for line in (root / "valid.csv").read_text().splitlines()[1:]]
    (root / "test").symlink_to(root / "valid")
    for row in rows:
        row[0] = row[0].replace("valid/", "test/").replace("patient9", "patient8")
    for row in rows:
        source = root / row[0].replace("CheXpert-v1.0-small/test", "valid").replace("patient8", "patient9")
        target = root / row[0].replace("CheXpert-v1.0-small/test", "valid")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(source.read_bytes())
    write_csv(root / "test_labels.csv", [CHEXPERT[0], *CHEXPERT[5:]], [[row[0], *row[5:]] for row in rows])
    d = data.load(root, size=16)
    assert {part: int((d.split == part).sum()) for part in ("train", "val", "test")} == {
        "train": 24,
        "val": 6,
        "test": 6,
    }
    (root / "test_labels.csv").unlink()
    write_csv(root / "test.csv", CHEXPERT[:5], [row[:5] for row in rows])
    d = data.load(root, size=16)
    assert len(d) == 30 and any("test.csv has no labels" in text for text in d.report.notes)
