"""Does the page hold the numbers of results.jsonl, nothing from outside, and work in a browser, with its filters?"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from fedsec import checkpoint
from fedsec.errors import ConfigError
from fedsec.report import Threshold, write_report
from fedsec.store import RunFolder
from fedsec.tradeoff import command_of
from tests.grid.cells import DEFENSES, run_folder

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=3000"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")

PROBE = """
<script>
const pick = (name, value) => {
  const select = document.querySelector(`select[name=${name}]`);
  select.value = value;
  select.dispatchEvent(new Event("change"));
  return document.querySelectorAll("#cell-table tbody tr").length;
};
const values = [...document.querySelectorAll("#cell-table tbody tr")].map((row) =>
  [row.dataset.id, ...[...row.querySelectorAll("[data-value]")].map((cell) => Number(cell.dataset.value))]);
const all = document.querySelectorAll("#cell-table tbody tr").length;
const points = document.querySelectorAll("#plot .point").length;
const one = pick("defense", "dp");
const two = pick("seed", "1");
const point = document.querySelector("#plot .point");
point.focus();
const detail = document.querySelector("#detail").textContent;
const names = [...document.querySelectorAll("select, [role=img], svg[role=group], img")].map((node) =>
  node.getAttribute("aria-label") || node.getAttribute("alt") || "");
const found = { all, points, one, two, values, detail, names,
  status: document.querySelector("#shown").textContent, label: point.getAttribute("aria-label"),
  fetched: performance.getEntriesByType("resource").map((entry) => entry.name) };
const out = document.createElement("pre");
out.id = "probe";
out.textContent = JSON.stringify(found);
document.body.append(out);
</script>
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_folder(tmp_path_factory.mktemp("report") / "run")


def page_of(run: RunFolder, **options: Any) -> str:
    return write_report([run.path], figures=False, **options).path.read_text(encoding="utf-8")


def browse(page: str, folder: Path) -> tuple[dict[str, Any], str]:
    """Open the page in Chromium; what the probe saw, and what the console said."""
    path = folder / "page.html"
    path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    words = [str(CHROMIUM), *FLAGS.split(), f"--user-data-dir={folder / 'profile'}", "--dump-dom", path.as_uri()]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    match = re.search(r'<pre id="probe">(.*?)</pre>', done.stdout, re.S)
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    assert match, console or done.stderr[-2000:]
    text = match[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    return json.loads(text), console


@needs_browser
def test_in_a_browser(run: RunFolder, tmp_path: Path) -> None:
    seen, console = browse(page_of(run), tmp_path)
    assert console == ""
    assert seen["fetched"] == []
    results = {c["id"]: c for c in map(json.loads, (run.path / "results.jsonl").read_text().splitlines())}
    assert seen["all"] == seen["points"] + 18 == len(results) == 36
    for key, *numbers in seen["values"]:
        cell = results[key]
        leakage = cell["leakage"]["psnr"] if "leakage" in cell else cell["utility"]["auc"]
        expected = [cell["utility"]["auc"]["value"], leakage["value"]]
        expected += [cell["privacy"]["epsilon"]] if "privacy" in cell else []
        assert numbers == expected
    assert seen["one"] == 12 and seen["two"] == 4  # two dp defenses x two attacks x three seeds, then one seed
    assert seen["status"] == "4 of 36 cells, 2 of them drawn."
    assert "dp:epsilon=1, gradinversion:images=20, seed 1: test AUC 0.874" in seen["label"]
    assert "fedsec run --no-baseline --seed 1" in seen["detail"]
    assert all(seen["names"])  # everything has a name for a screen reader


def test_the_page_asks_no_server_and_believes_no_file(run: RunFolder) -> None:
    page = page_of(run)
    assert "default-src 'none'" in page
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page)
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "") and "https://" not in page
    assert "<b>&" not in page and "Leakage measured &lt;b&gt;&amp;" in page


def test_the_verdict_table_holds_the_numbers(run: RunFolder) -> None:
    rows = re.findall(r"<tr(?: class=\"reference\")?>\n<th scope=.row.>.*?</tr>", page_of(run), re.S)
    assert len(rows) == 2 * len(DEFENSES)
    first = [float(x) for x in re.findall(r'data-value="([^"]+)"', rows[0])]
    assert first[0] == pytest.approx(0.904)  # the mean of 0.900, 0.904 and 0.908
    assert first[1] == pytest.approx(30.95)  # the median of 30.0, 30.1 … 31.9 in every seed


def test_thresholds(run: RunFolder) -> None:
    # Lower limits of the PSNR: about 28 dB for dp:epsilon=1, 26 for dp:epsilon=8; the undefended is a reference only.
    report = write_report([run.path], fail_above=["psnr=27"], figures=False)
    assert report.exceeded == ("gradinversion:images=20 on dp:epsilon=1: psnr above 27",)
    assert not write_report([run.path], fail_above=["psnr=29.0"], figures=False).exceeded
    assert write_report([run.path], fail_above=["psnr=29.0"], fail_on="upper", figures=False).exceeded
    assert len(write_report([run.path], fail_above=["epsilon=2"], figures=False).exceeded) == 2
    page = page_of(run, fail_above=["psnr=27"])
    assert page.count('class="above"') == 1 and "✗" in page and "✓" in page
    for word, problem in (("psnr", "KEY=NUMBER"), ("ssim=1", "no cell has"), ("psnr=nan", "KEY=NUMBER")):
        with pytest.raises(ConfigError, match=problem):
            write_report([run.path], fail_above=[word])


def test_a_threshold_without_an_interval_is_undecided(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", seeds=1)
    for cell in list(folder.results()):
        if "leakage" in cell:
            cell["leakage"]["psnr"] |= {"low": None, "high": None}
            folder.finish(cell["id"], cell)
    report = write_report([folder.path], fail_above=["psnr=20"], figures=False)
    assert not report.exceeded and len(report.undecided) == 5
    assert len(write_report([folder.path], fail_above=["psnr=28"], fail_on="point", figures=False).exceeded) == 1


def test_every_command_computes_its_cell(run: RunFolder) -> None:
    import shlex

    from fedsec.config import expand, set_path
    from fedsec.federation.assemble import resolve

    for item in run.resolved():
        words = shlex.split(command_of(item, "x"))
        assert words[:3] == ["fedsec", "run", "--no-baseline"]
        options = list(zip(words[3::2], words[4::2], strict=True))
        tables: dict[str, Any] = {"baseline": False}
        for option, value in options:
            if option == "--set":
                set_path(tables, value)
            else:
                name = option.removeprefix("--")
                tables[name] = int(value) if name == "seed" else [value]
        (cell,) = expand(tables)
        assert resolve(cell).key() == resolve(_cell(item)).key()


def _cell(item: dict[str, Any]) -> Any:
    from fedsec.config import Cell

    return Cell.from_json({k: v for k, v in item.items() if k != "id"})


def test_what_words_cannot_say_is_said_with_the_file() -> None:
    from fedsec.config import Cell, ModelConfig
    from fedsec.plugins import PluginSpec

    odd = Cell(model=ModelConfig(options={"a": [1]}), attack=PluginSpec("poisoning", {"method": "a,b"}))
    assert command_of(odd.to_json(), "runs/x") == "fedsec run --config runs/x/resolved.json"


def test_pictures_are_blurred_when_asked(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "r", seeds=1, defenses=("none",))
    cell = next(c for c in folder.results() if "leakage" in c)
    cell["leakage"]["round"] = 1
    folder.finish(cell["id"], cell)
    image = torch.rand(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    tensors = {"public_mean": image[0].clone(), "000/round-1/original": image, "000/round-1/recovered": image * 0.9}
    checkpoint.save(folder.artifacts(cell["id"]) / "reconstructions.safetensors", tensors, {})
    plain, hidden = page_of(folder), page_of(folder, redact=True)
    assert plain.count("data:image/png") == hidden.count("data:image/png") == 2
    assert set(re.findall(r"data:image/png;base64,[^\"]+", plain)).isdisjoint(
        re.findall(r"data:image/png[^\"]+", hidden)
    )
    assert "Synthetic images" in plain and "blurred on purpose" in hidden


def test_bad_requests_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run folder"):
        write_report([tmp_path])
    empty = RunFolder(tmp_path / "empty")
    with pytest.raises(ConfigError, match="no finished cell"):
        write_report([empty.path])
    with pytest.raises(ConfigError, match="--out"):
        write_report([empty.path, empty.path])
    assert Threshold.parse("tpr_at_1pct_fpr=0.1").path == "leakage.membership.headline.tpr_at_1pct_fpr"
