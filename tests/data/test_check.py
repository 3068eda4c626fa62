"""`fedsec data check`: it finds what was put there, changes nothing, and its last line works."""

from __future__ import annotations

import dataclasses
import io
import json
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedsec import data
from fedsec.cli import main
from fedsec.data.base import Dataset
from fedsec.data.check import check, of_dataset
from fedsec.data.images import ArrayImages
from fedsec.data.near import near_pairs, thumbnails
from fedsec.data.registry import with_options
from tests.data.conftest import make_dataset, npz_arrays
from tests.data.trees import TREES, edit, own_csv, picture

PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Result:
    exit_code: int
    stdout: str
    output: str


def command(*words: str) -> Result:
    """What the command line prints and returns."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
        main(list(words))
    return Result(int(ended.value.code or 0), out.getvalue(), out.getvalue() + err.getvalue())


def run(*words: str) -> Result:
    return command("data", "check", *words)


def spoiled(root: Path) -> Path:
    """A hospital's table with a damaged file, a copy in another part and a patient in two parts."""
    own_csv(root)
    pictures = root / "pictures"
    (pictures / "5.png").write_bytes(b"no image")
    shutil.copy(pictures / "0.png", pictures / "23.png")
    return root


def contents(root: Path) -> dict[str, tuple[bytes, int]]:
    return {str(p): (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(root.rglob("*")) if p.is_file()}


def test_findings(tmp_path: Path) -> None:
    found = check(str(spoiled(tmp_path)), size=24)
    assert found.layouts[0] == "csv" and found.bad == 1 and len(found.dataset) == 23
    assert found.dataset.meta["image"][found.exact].tolist() == [["pictures/0.png", "pictures/23.png"]]
    assert found.leaks and not found.shared
    text = "\n".join(found.lines())
    assert "bad: labels.csv:6: pictures/5.png (8 bytes) cannot be decoded" in text
    assert "exact duplicates: 1 (1 across parts, 1 across groups): pictures/0.png = pictures/23.png" in text
    assert "near duplicates: none" in text and "in several parts: no patient or lesion" in text
    assert json.loads(json.dumps(found.to_json(), default=str))["images"] == 23


def test_shared_patients_missing_values_and_confounded_sites() -> None:
    labels = np.arange(40) % 2
    d = make_dataset(
        labels,
        split=["train"] * 20 + ["test"] * 20,
        patient=np.array([f"p{i % 30}" for i in range(40)]),
        site=np.where(labels == 1, "a", "b"),
        sex=np.array(["F"] * 35 + [""] * 5),
        age=np.array([50.0] * 37 + [np.nan] * 3),
    )
    found = of_dataset(d)
    assert len(found.shared) == 10 and found.missing == {"sex": 5, "age": 3}
    assert found.confounding == pytest.approx(1.0)
    text = "\n".join(found.lines())
    assert "in several parts: 10 patients or lesions, such as p0: train (1) and test (1)" in text
    assert "site tells the label: 1.00 bits" in text
    assert found.advice("x") == (
        "fedsec run --attack gradinversion --defense dp --data x --partition site --set data.splits=safe"
    )
    apart = make_dataset(labels, split=["train"] * 40, site=np.array(["a", "a", "b", "b"] * 10))
    assert of_dataset(apart).confounding == pytest.approx(0.0)


def near_set(kind: str) -> Dataset:
    """60 pictures of one anatomy with details of their own; the last is the first one, changed."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 64
    common = 120 + 90 * np.cos(6 * x) * np.sin(3 * y)
    details = np.stack(
        [
            np.asarray(Image.fromarray(rng.normal(0, 1, (8, 8)).astype(np.float32)).resize((64, 64), 3))
            for _ in range(60)
        ]
    )
    images = np.clip(common + 25 * details, 0, 255).astype(np.uint8)
    first = Image.fromarray(images[0])
    if kind == "brighter":
        changed = np.clip(images[0] * 1.1 + 5, 0, 255)
    elif kind == "rescaled":
        changed = np.asarray(first.resize((40, 40), 3).resize((64, 64), 3))
    else:
        changed = images[0] + np.random.default_rng(1).integers(-4, 5, (64, 64))
    images[-1] = np.clip(changed, 0, 255).astype(np.uint8)
    d = make_dataset(np.arange(60) % 2)
    return dataclasses.replace(d, images=ArrayImages(images[..., None]))


@pytest.mark.parametrize("kind", ["brighter", "rescaled", "noisy"])
def test_near_duplicates_are_found_among_pictures_of_one_anatomy(kind: str) -> None:
    d = near_set(kind)
    thumbs = thumbnails(d.images)
    others = (thumbs @ thumbs.T)[np.triu_indices(59, 1)]
    assert np.median(others) > 0.8  # all of them look alike
    assert near_pairs(thumbs).tolist() == [[0, 59]]
    found = of_dataset(d)
    assert len(found.exact) == 0 and found.near.tolist() == [[0, 59]]


def test_the_hash_finds_what_comparing_all_pairs_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    thumbs = rng.standard_normal((900, 576)).astype(np.float32)
    thumbs[600:] = thumbs[:300] + 0.1 * rng.standard_normal((300, 576))
    thumbs -= thumbs.mean(1, keepdims=True)
    thumbs /= np.linalg.norm(thumbs, axis=1, keepdims=True)
    exact = near_pairs(thumbs)
    monkeypatch.setattr("fedsec.data.near.EXACT", 10)
    assert len(exact) > 100 and np.array_equal(near_pairs(thumbs), exact)


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    root = spoiled(tmp_path / "set")
    before = contents(root)
    result = run(str(root), "--size", "24")
    assert result.exit_code == 2, result.output
    assert "labels.csv:6: pictures/5.png (8 bytes) cannot be decoded" in result.output and "[D08]" in result.output
    assert "--skip-bad" in result.output
    for name in ("contact_sheet.png", "labels.png"):
        assert (tmp_path / "runs" / "check-csv" / name).read_bytes().startswith(PNG)
        assert Image.open(tmp_path / "runs" / "check-csv" / name).width > 400
    result = run(str(root), "--size", "24", "--skip-bad", "--no-figures")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if line.startswith("next: ")]
    words = shlex.split(line.removeprefix("next: "))
    used = data.load(words[words.index("--data") + 1], size=24)
    assert len(used) == 23 and "--size" in words and "data.splits=safe" in words
    assert contents(root) == before


def test_json_alone_on_standard_output(tmp_path: Path) -> None:
    result = run(str(own_csv(tmp_path)), "--json", "--no-figures")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["layouts"] == ["csv"]


def test_recognised_layouts_and_the_choice(tmp_path: Path) -> None:
    root = TREES["ham10000"].make(tmp_path)
    found = check(str(root))
    assert found.layouts[0] == "ham10000" and "csv" in found.layouts
    assert any("also looks like: csv" in line for line in found.lines())
    assert check(str(root), layout="imagefolder").dataset.name == "imagefolder"


@pytest.mark.parametrize("name", ["csv", "chexpert", "ham10000", "imagefolder"])
def test_fix_writes_a_new_list_and_never_touches_the_source(name: str, tmp_path: Path) -> None:
    root = TREES[name].make(tmp_path / "set")
    path = root / TREES[name].picture
    path.write_bytes(path.read_bytes()[:80])
    before = contents(root)
    result = run(str(root), "--fix", str(tmp_path / "fixed"), "--no-figures", "--size", "16")
    assert result.exit_code == 0, result.output
    assert contents(root) == before
    line = next(line for line in result.output.splitlines() if line.startswith("next: "))
    words = shlex.split(line)
    fixed = data.load(words[words.index("--data") + 1], size=16)
    assert fixed.report.n_bad == 0
    original = data.load(root, size=16, on_bad="skip", max_bad=0.5)
    assert fixed.class_names == tuple(n.lower() if name == "chexpert" else n for n in original.class_names)
    place = {file: i for i, file in enumerate(original.meta["file"].tolist())}
    rows = [place[file] for file in fixed.meta["file"].tolist()]
    assert len(rows) == len(original) == TREES[name].images - 1
    assert np.array_equal(fixed.labels, original.labels[rows])
    assert np.array_equal(fixed.split, original.split[rows])
    if "patient" in original.meta:
        assert np.array_equal(fixed.meta["patient"], original.meta["patient"][rows])
    assert "left_out.csv" in {p.name for p in (tmp_path / "fixed").iterdir()}
    assert json.loads((tmp_path / "fixed" / "about.json").read_text())["licence"] == original.licence


def test_fix_leaves_copies_out_and_separates_patients(tmp_path: Path) -> None:
    root = spoiled(tmp_path / "set")
    result = run(str(root), "--fix", str(tmp_path / "fixed"), "--no-figures")
    assert result.exit_code == 0, result.output
    fixed = data.load(f"{tmp_path / 'fixed' / 'labels.csv'}:root={root}", size=24)
    assert len(fixed) == 22 and not fixed.report.duplicates.across
    left = (tmp_path / "fixed" / "left_out.csv").read_text()
    assert "pictures/23.png,the same pixels as pictures/0.png" in left and "labels.csv:6" in left


def test_fix_of_an_npz_file(tmp_path: Path) -> None:
    arrays = npz_arrays()
    arrays["test_images"][0] = arrays["train_images"][0]
    source = tmp_path / "set" / "mine.npz"
    source.parent.mkdir()
    np.savez(source, **arrays)
    before = source.read_bytes()
    result = run(str(source), "--fix", str(tmp_path / "fixed"), "--no-figures")
    assert result.exit_code == 0 and source.read_bytes() == before
    fixed = data.load(tmp_path / "fixed" / "mine_fixed.npz")
    assert len(fixed) == 23 and not fixed.report.duplicates.across


def test_fix_refuses_the_source_and_full_folders(tmp_path: Path) -> None:
    root = own_csv(tmp_path / "set")
    before = contents(tmp_path)
    for folder in (root, root / "new", tmp_path):
        result = run(str(root), "--fix", str(folder), "--no-figures")
        assert result.exit_code == 2 and "--fix" in result.output
    assert contents(tmp_path) == before
    result = run("synthetic-cxr:images=60", "--fix", str(tmp_path / "x"), "--no-figures")
    assert result.exit_code == 2 and "built in" in result.output


def test_options_behind_a_path_are_kept(tmp_path: Path) -> None:
    assert with_options("a/b.csv:root=/x", on_bad="skip") == "a/b.csv:on_bad=skip,root=/x"
    assert with_options("a/b.csv:on_bad=error", on_bad="skip") == "a/b.csv:on_bad=error"
    assert with_options("nih14") == "nih14"


def test_builtin_and_npz_sets(tmp_path: Path) -> None:
    result = run("synthetic-cxr:images=60", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "next: fedsec run --attack gradinversion --defense dp --data synthetic-cxr:images=60" in result.output


def test_run_takes_skip_bad(tmp_path: Path) -> None:
    root = own_csv(tmp_path)
    (root / "pictures" / "5.png").unlink()
    picture(root / "pictures" / "99.png", 99)
    edit(root / "labels.csv", 1, "no", "no")
    words = ["run", "--data", f"{root}:max_bad=0.1", "--rounds", "1", "--clients", "2", "--size", "16", "--no-baseline"]
    result = command(*words, "--set", "data.min_images=2", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2 and "D07" in result.output
    words += ["--skip-bad", "--local-steps", "1", "--batch-size", "4"]
    result = command(*words, "--set", "data.min_images=2", "--out", str(tmp_path / "out2"))
    assert result.exit_code == 0, result.output
