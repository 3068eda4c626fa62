"""`fedsec audit` end to end: leaks are found, false claims refuted, hostile files refused, pages opened."""

from __future__ import annotations

import html.parser
import itertools
import json
import shutil
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import fedsec
from fedsec import checkpoint, models
from fedsec import data as data_sets
from fedsec.audit.run import Wanted, audit
from fedsec.audit.subjects import Said
from fedsec.cli import run as command_line
from fedsec.config import Cell, read_resolved
from fedsec.errors import ConfigError, RefusedError, UnsafeFileError
from fedsec.experiment import training_key_of
from tests.audit.networks import NAME
from tests.test_checkpoint import Bomb

DATA = "synthetic-cxr:images=2200,shift=0"


@pytest.fixture(scope="module")
def overfitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images, no regularisation, canaries without any noise."""
    out = tmp_path_factory.mktemp("overfitted") / "run"
    fedsec.run(
        {"data": {"name": DATA, "max_train": 440, "canaries": 220}, "model": {"name": NAME}},
        clients=1, rounds=1, local_epochs=200, lr=0.003, batch_size=16, engine="serial", device="cpu", out=out,
    )  # fmt: skip
    return out


@pytest.fixture(scope="module")
def report(overfitted: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    folder = overfitted.parent
    wanted = Wanted(
        attacks=("membership:methods=loss",), shadows=0, report=folder / "audit.html", junit=folder / "audit.xml",
        sarif=folder / "audit.sarif", card=folder / "audit.md", json=folder / "audit.json",
        fail_above={"auc": 0.6},
    )  # fmt: skip
    yield audit(overfitted, Said(epsilon=1.0, model=NAME), wanted), folder


def test_an_overfitted_model_is_found(tmp_path: Path) -> None:
    """200 images without any pattern: whatever the network knows of them it has memorised."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 200), ("val", 500), ("test", 250)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        arrays[f"{part}_labels"] = rng.integers(0, 2, (count, 1)).astype(np.uint8)
    np.savez(tmp_path / "noise.npz", **arrays)  # type: ignore[arg-type]
    fedsec.run(
        {"data": {"name": str(tmp_path / "noise.npz")}, "model": {"name": NAME}}, out=tmp_path / "run",
        clients=1, rounds=1, local_epochs=60, lr=0.003, batch_size=16, engine="serial", device="cpu",
    )  # fmt: skip
    found = audit(tmp_path / "run", Said(model=NAME), Wanted(attacks=("membership:methods=loss",), shadows=0))
    leak = found["membership"]["attacks"]["loss"]["auc"]
    assert leak["value"] >= 0.8 and leak["low"] > 0.7


def test_a_false_claim_is_refuted(report: tuple[dict[str, Any], Path]) -> None:
    found, _ = report
    assert found["dp_audit"]["verdict"] == "contradicted" and "claimed epsilon refuted" in found["risk_sentences"][0]
    assert found["exit_code"] == 1 and found["thresholds"][0]["result"] == "failed"


def test_every_number_has_its_interval_and_nobody_is_named(report: tuple[dict[str, Any], Path]) -> None:
    """A1, A2, A26."""
    found, folder = report
    for attack in found["membership"]["attacks"].values():
        for key in ("auc", "advantage", "tpr_at_1pct_fpr", "tpr_at_01pct_fpr"):
            assert {"value", "low", "high", "level", "method", "n"} <= attack[key].keys() or "not_resolvable" in attack[
                key
            ]
    text = "".join((folder / f"audit.{kind}").read_text() for kind in ("html", "json", "sarif", "xml", "md"))
    names = fedsec_images()
    assert not [name for name in names if name in text]
    assert json.loads((folder / "audit.json").read_text())["schema"] == "fedsec.audit/1"


def fedsec_images() -> list[str]:

    return [str(name) for name in data_sets.load(DATA).meta["image"]]


def test_exports_are_what_ci_reads(report: tuple[dict[str, Any], Path]) -> None:
    found, folder = report
    suite = ElementTree.parse(folder / "audit.xml").getroot()
    assert suite.tag == "testsuite" and int(suite.get("failures", "0")) == 2  # the threshold and the claim
    assert len(suite.findall("testcase")) == int(suite.get("tests", "0"))
    sarif = json.loads((folder / "audit.sarif").read_text())
    (run,) = sarif["runs"]
    assert sarif["version"] == "2.1.0" and {r["ruleId"] for r in run["results"]} >= {"FSA001", "FSA003"}
    assert {r["id"] for r in run["tool"]["driver"]["rules"]} == {r["ruleId"] for r in run["results"]}
    assert len((folder / "audit.md").read_text().splitlines()) <= 20
    assert found["model"]["sha256"][:16] in (folder / "audit.md").read_text()


class Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_the_page_loads_nothing_and_can_be_read_aloud(report: tuple[dict[str, Any], Path]) -> None:
    page = Page()
    page.feed((report[1] / "audit.html").read_text())
    tags = [tag for tag, _ in page.tags]
    assert "script" not in tags and tags.count("h1") == 1 and tags.count("main") == 1
    for tag, attrs in page.tags:
        for key in ("src", "href"):
            assert not (attrs.get(key) or "").startswith(("http:", "https:", "//")), attrs
        if tag == "img":
            assert attrs.get("alt")
        if tag == "svg":
            assert attrs.get("role") == "img" and attrs.get("aria-labelledby")
        if attrs.get("tabindex"):
            assert attrs.get("aria-label")
        if tag == "th":
            assert attrs.get("scope")
    assert tags.count("table") == tags.count("caption") and tags.count("svg") == tags.count("desc") >= 2
    levels = [int(tag[1]) for tag in tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in itertools.pairwise(levels))
    places = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    links = [attrs["href"] or "" for tag, attrs in page.tags if tag == "a"]
    assert len(links) > 3 and {link.removeprefix("#") for link in links} <= places


def test_redacted_pages_hold_no_image(overfitted: Path, report: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """A26: with --redact not a single picture; without it the banner stands before the most exposed members."""
    plain = (report[1] / "audit.html").read_text()
    assert "data:image/png" in plain and plain.index("do not share") < plain.index("data:image/png")
    wanted = Wanted(attacks=("membership:methods=loss",), shadows=0, redact=True, report=tmp_path / "audit.html")
    found = audit(overfitted, Said(epsilon=1.0, model=NAME), wanted)
    redacted = (tmp_path / "audit.html").read_text()
    assert "data:image" not in redacted and "were left out" in redacted
    assert sum(found["membership"]["exposed"].values()) == 8


def chromium(page: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync",
             "--enable-logging=stderr",
             f"--user-data-dir={folder / 'profile'}", f"--log-net-log={folder / 'net.json'}"]  # fmt: skip
    return subprocess.run([program, *flags, *words, page.as_uri()], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
def test_a_browser_shows_the_page_without_a_complaint_or_a_request(
    report: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    page = report[1] / "audit.html"
    done = chromium(page, tmp_path, "--dump-dom", "--virtual-time-budget=2000")
    assert "Claimed epsilon refuted" in done.stdout and done.stdout.count('class="curve"') >= 2
    assert "CONSOLE" not in done.stderr, done.stderr
    log = (tmp_path / "net.json").read_text()
    assert not _requested(log), "the page asked the network for something"
    shot = tmp_path / "page.png"
    chromium(page, tmp_path, f"--screenshot={shot}", "--window-size=1000,2600")
    from PIL import Image

    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    blue = (np.abs(pixels.astype(int) - np.array([0x0B, 0x5C, 0xAD])).sum(1) < 30).sum()
    assert blue > 100  # the first curve is drawn


def _requested(log: str) -> list[str]:
    events = json.loads(log if log.rstrip().endswith("}") else log.rstrip().rstrip(",") + "]}")["events"]
    urls = [e.get("params", {}).get("url", "") for e in events]
    return [u for u in urls if u.startswith(("http:", "https:")) and "google" not in u and "gvt1" not in u]


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An untrained model of the right shape."""
    net = models.build("lenet", num_classes=2, in_channels=1, image_size=28)
    path = tmp_path / "model.safetensors"
    checkpoint.save(path, net.state_dict(), {"model": "lenet", "num_classes": 2})
    return path


def zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 50_000_000)


def with_nan(path: Path, source: Path) -> None:
    tensors, record = checkpoint.load(source)
    first = next(iter(tensors))
    checkpoint.save(path, {**tensors, first: torch.full_like(tensors[first], float("nan"))}, record)


def other_architecture(path: Path) -> None:
    net = models.build("cnn", num_classes=2, in_channels=1, image_size=28)
    checkpoint.save(path, net.state_dict(), {"model": "lenet", "num_classes": 2})


@pytest.mark.parametrize(
    ("kind", "code", "says"),
    [
        ("pickle", 4, "not executed"),
        ("joblib", 4, "was not opened"),
        ("whole module", 4, "not executed"),
        ("exported program", 4, "can run code"),
        ("objects as members", 4, "Python objects"),
        ("cut off", 2, "bad.safetensors"),
        ("zip bomb", 4, "unpack to"),
        ("other architecture", 2, "another architecture"),
        ("nan", 4, "NaN"),
        ("five", 4, "fewer than 200"),
        ("shifted", 4, "differ too much"),
        ("absent", 2, "no such model file"),
    ],
)
def test_what_is_refused_in_one_line(
    kind: str, code: int, says: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, others, data = tmp_path / "bad.pt", "val", DATA
    marker = tmp_path / "executed"
    if kind == "pickle":
        torch.save(Bomb(marker), path)
    elif kind == "joblib":
        path = tmp_path / "bad.joblib"
        path.write_bytes(b"\x80\x04")
    elif kind == "whole module":
        torch.save(models.build("lenet", num_classes=2, in_channels=1, image_size=28), path)
    elif kind == "exported program":
        path = path.with_suffix(".pt2")
        path.write_bytes(b"PK\x03\x04")
    elif kind == "objects as members":
        path = model
        others = str(tmp_path / "others.npy")
        np.save(others, np.array([Bomb(marker)], dtype=object), allow_pickle=True)
    elif kind == "cut off":
        path = tmp_path / "bad.safetensors"
        path.write_bytes(model.read_bytes()[:1000])
    elif kind == "zip bomb":
        zip_bomb(path)
    elif kind in ("nan", "other architecture"):
        path = tmp_path / "bad.safetensors"
        with_nan(path, model) if kind == "nan" else other_architecture(path)
    elif kind == "five":
        path = model
        others = str(tmp_path / "five.txt")
        Path(others).write_text("\n".join(str(row) for row in data_sets.load(DATA).rows(split="test")[:5]))
    elif kind == "shifted":
        path, data, others = model, str(tmp_path / "shifted.npz"), "test"
        shifted(Path(data))
    before = sorted(tmp_path.iterdir())
    report = tmp_path / "out.html"
    words = ["audit", str(path), "--data", data, "--nonmembers", others, "--shadow", "0"]
    assert command_line([*words, "--attack", "membership:methods=loss", "--report", str(report)]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and says in lines[0]
    assert not marker.exists() and not report.exists() and sorted(tmp_path.iterdir()) == before


def shifted(path: Path) -> None:
    """Non-members from another scanner: a little brighter."""
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count, offset in (("train", 500, 0), ("val", 60, 0), ("test", 500, 12)):
        arrays[f"{part}_images"] = (rng.integers(0, 200, (count, 28, 28)) + offset).astype(np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % 2)[:, None]
    np.savez(path, **arrays)  # type: ignore[arg-type]


def test_a_file_may_not_choose_the_code_that_is_imported(overfitted: Path, model: Path) -> None:
    with pytest.raises(UnsafeFileError, match="not run"):
        audit(overfitted)
    tensors, record = checkpoint.load(model)
    checkpoint.save(model, tensors, {**record, "model": "this:factory"})
    with pytest.raises(UnsafeFileError, match="not run"):
        audit(model, Said(data=DATA, nonmembers="test"))


def test_an_untrained_model_is_at_chance(model: Path) -> None:
    wanted = Wanted(attacks=("membership:methods=loss",), shadows=0)
    found = audit(model, Said(data=DATA, nonmembers="test"), wanted)
    head = found["membership"]["headline"]["auc"]
    assert head["low"] <= 0.5 <= head["high"] and found["exit_code"] == 0


def test_a_model_trained_on_other_images_is_at_chance(overfitted: Path, tmp_path: Path) -> None:
    """It remembers its own 330 images; of two halves of 2,400 that it never saw it knows nothing."""
    cell = Cell.from_json(read_resolved(overfitted / "resolved.json")[0])
    others = "synthetic-cxr:images=3000,shift=0,seed=5"
    rows = data_sets.load(others).rows(split="train")
    for name, half in zip("ab", np.array_split(np.random.default_rng(0).permutation(rows), 2), strict=True):
        (tmp_path / name).write_text("\n".join(map(str, half)))
    model = overfitted / "artifacts" / training_key_of(cell) / "model.safetensors"
    said = Said(data=others, members=str(tmp_path / "a"), nonmembers=str(tmp_path / "b"), model=NAME)
    found = audit(model, said, Wanted(attacks=("membership:methods=loss+label_only",), shadows=0))
    for attack in found["membership"]["attacks"].values():
        assert attack["auc"]["low"] <= 0.5 <= attack["auc"]["high"]
    assert found["outcome"]["kind"] == "pass" and "exposed" not in found["membership"]


def test_a_threshold_on_what_was_not_computed_is_a_usage_error(model: Path) -> None:
    wanted = Wanted(attacks=("membership:methods=loss",), shadows=0, fail_above={"source_lift": 0.1})
    with pytest.raises(ConfigError, match="did not compute it"):
        audit(model, Said(data=DATA, nonmembers="test"), wanted)


def test_mixed_up_sets_are_refused(tmp_path: Path, model: Path) -> None:
    """A5: the same images in both sets."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (400, 28, 28)).astype(np.uint8)
    labels = (np.arange(400, dtype=np.uint8) % 2)[:, None]
    arrays = {"train_images": images, "train_labels": labels, "val_images": images[:300], "val_labels": labels[:300]}
    np.savez(tmp_path / "d.npz", **arrays, test_images=images[:20], test_labels=labels[:20])
    with pytest.raises(RefusedError, match="pixel for pixel"):
        audit(model, Said(data=str(tmp_path / "d.npz")), Wanted(attacks=("membership:methods=loss",), shadows=0))


def test_hostile_names_stay_text(model: Path) -> None:
    from fedsec.audit import page

    wanted = Wanted(attacks=("membership:methods=loss",), shadows=0)
    found = audit(model, Said(data=DATA, nonmembers="test"), wanted)
    found["model"]["path"] = "<script>alert(1)</script>"
    assert "<script>" not in page.render(found)
