"""Is what the documentation says true of the code? Commands parse, examples run, tables are complete, links resolve."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import click
import pytest

from fedsec import config, errors, plugins
from fedsec.cli import COMMANDS, cli
from fedsec.data.partition import Kind
from fedsec.data.registry import catalogue
from fedsec.federation.assemble import build_stack

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
LOOSE = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "experiments/README.md")]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"^`([\w./]+)`\n\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def blocks(text: str, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(text) if language in languages]


def words_in_code(text: str) -> set[str]:
    """Everything inside backticks, outside fenced blocks."""
    return set(CODE.findall(FENCE.sub("", text).replace("\\|", "|")))


def commands(path: Path) -> list[tuple[str, str]]:
    """(command line, the error that the page shows below it) for every `fedsec ...` of a page."""
    text = path.read_text(encoding="utf-8")
    found = [(span, "") for span in words_in_code(text) if re.match(r"fedsec [a-z-]", span)]
    for body in blocks(text, "", "sh", "bash", "console"):
        lines = [line.removeprefix("$ ") for line in body.replace("\\\n", " ").splitlines()]
        for line, after in zip(lines, [*lines[1:], ""], strict=True):
            if re.match(r"(\S*/)?fedsec( |$)", line):
                found.append((line, after if after.startswith("error: ") else ""))
    return sorted(set(found))


ALL_COMMANDS = [(p, *c) for p in [*PAGES, *LOOSE] if p.exists() for c in commands(p)]


@pytest.fixture(scope="module")
def page_plugins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The package of plugins.md, written out and installed as pip would: modules beside a dist-info folder."""
    folder = tmp_path_factory.mktemp("site-packages")
    files = dict(FILE.findall(page("plugins.md")))
    project = tomllib.loads(files.pop("pyproject.toml"))["project"]
    for name, body in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(body, encoding="utf-8")
    info = folder / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"[{g}]\n{name} = {value}\n" for g, t in project["entry-points"].items() for name, value in t.items()]
    (info / "entry_points.txt").write_text("".join(lines))
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    plugins._entry_points.cache_clear()
    yield
    sys.path.remove(str(folder))
    for module in [m for m in sys.modules if m.partition(".")[0] == "hospital_plugins"]:
        del sys.modules[module]
    plugins._entry_points.cache_clear()


def check_tables(tables: Mapping[str, Any], **_: Any) -> dict[str, Any]:
    """Everything that `fedsec.run` checks before it runs; stands in for it."""
    names = {listing.name for listing in catalogue()}
    for cell in config.expand(tables):
        build_stack(cell)
        data = cell.data.name.partition(":")[0]
        assert data in names or data.endswith(".npz") or "/" in data, f"{data} is no known data set"
    return {"cells": [], "run": "runs/nothing"}


@pytest.fixture
def harmless(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Commands check their arguments and do nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedsec.api.run", check_tables)
    for name in COMMANDS:
        command = importlib.import_module(f"fedsec.cli.{name}").command
        for item in [command, *getattr(command, "commands", {}).values()]:
            if name != "run" and not isinstance(item, click.Group):
                monkeypatch.setattr(item, "callback", lambda **_: None)


@pytest.mark.usefixtures("page_plugins", "harmless")
@pytest.mark.parametrize(("path", "line", "error"), ALL_COMMANDS, ids=[f"{p.name}: {c}" for p, c, _ in ALL_COMMANDS])
def test_every_command_line_is_valid(path: Path, line: str, error: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    if all(word.isalpha() for word in words) and f"`{line}`" in path.read_text(encoding="utf-8"):
        words.append("--help")  # a sentence that names a command is no command line
    if "--config" in words:
        write_config(path, Path(words[words.index("--config") + 1]))
    if error:
        with pytest.raises(errors.FedsecError) as caught:
            cli.main(args=words, prog_name="fedsec", standalone_mode=False)
        assert f"error: {caught.value}" == error
    else:
        cli.main(args=words, prog_name="fedsec", standalone_mode=False)


def write_config(source: Path, target: Path) -> None:
    """The file that a command line of a page refers to: a recipe, the page's own TOML, or a finished run's cells."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if (ROOT / target).is_file():
        target.write_text((ROOT / target).read_text(encoding="utf-8"))
    elif target.suffix == ".json":
        target.write_text(json.dumps({"cells": [config.Cell().to_json()]}))
    else:
        target.write_text(blocks(source.read_text(encoding="utf-8"), "toml")[0])


TOML = [(p.name, t) for p in PAGES if p.name != "plugins.md" for t in blocks(p.read_text(encoding="utf-8"), "toml")]


@pytest.mark.parametrize(("name", "body"), TOML)
def test_every_configuration_file_is_valid(name: str, body: str) -> None:
    check_tables(tomllib.loads(body))


def test_the_number_of_cells_that_the_page_promises() -> None:
    text = page("configuration.md")
    promised = re.search(r"This is (\d+) cells", text)
    assert promised
    assert len(config.expand(tomllib.loads(blocks(text, "toml")[0]))) == int(promised[1])


@pytest.mark.parametrize("path", [p for p in PAGES if p.name != "plugins.md"], ids=lambda p: p.name)
def test_python_outside_the_plugin_page_is_valid(path: Path) -> None:
    for body in blocks(path.read_text(encoding="utf-8"), "python"):
        exec(compile(body, path.name, "exec"), {"__name__": "example"})


@pytest.fixture(scope="module")
def finished(page_plugins: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A tiny federation, attacked and defended by the plugins of the page."""
    import fedsec

    tables = {
        "attack": ["none", "labelflip:fraction=0.34", "lookalike:images=3,pool=20"],
        "defense": ["clip:bound=0.5+gaussian:clip=0.5,epsilon=50"],
        "data": {"name": "synthetic-cxr:images=200"},
        "model": {"name": "lenet"},
    }
    folder = tmp_path_factory.mktemp("run")
    return fedsec.run(tables, out=folder / "first", rounds=2, clients=3, engine="serial", device="cpu")


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One image of a tiny federation, attacked by gradient inversion, without and with noise on the update."""
    import fedsec

    return fedsec.run(
        attack="gradinversion:images=1,rounds=last,adaptive=both,budget_s=1",
        defense="gaussian:sigma=0.01",
        data="synthetic-cxr:images=2100",
        model="lenet",
        rounds=2,
        local_steps=2,
        clients=3,
        engine="serial",
        device="cpu",
        out=tmp_path_factory.mktemp("attacked") / "run",
    )


def cell_of(result: Mapping[str, Any], attack: str | None, *, defended: bool) -> dict[str, Any]:
    return next(
        c for c in result["cells"] if (c["attack"] or {}).get("name") == attack and bool(c["defense"]) == defended
    )


@pytest.mark.parametrize("defended", [False, True])
def test_the_plugins_of_the_page_do_what_it_says(finished: dict[str, Any], defended: bool) -> None:
    plain, flipped, looked = (cell_of(finished, a, defended=defended) for a in (None, "labelflip", "lookalike"))
    assert looked["training"] == plain["training"] != flipped["training"]
    assert looked["leakage"]["psnr"]["value"] > 0
    assert looked["assumptions"]["labels"] == "those of the public image"
    assert looked["assumptions"]["rounds_observed"] == [1, 2]
    assert flipped["utility"]["auc"] != plain["utility"]["auc"]
    assert ("privacy" in looked) == defended


def test_a_run_is_reproduced_by_its_resolved_configuration(finished: dict[str, Any]) -> None:
    import fedsec

    first = Path(finished["run"])
    again = fedsec.run({"cells": config.read_resolved(first / "resolved.json")}, out=first.with_name("again"))
    assert [strip(c) for c in again["cells"]] == [strip(c) for c in finished["cells"]]
    layout = page("results.md")
    for path in first.iterdir():
        assert path.name in layout


def strip(cell: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in cell.items() if k != "cost"}


OPEN = ("attack", "defense", "client_auc", "auc_by_class", "per_client", "failed_clients", "methods", "not_applicable")
"""Keys below which names are those of plugins, clients, classes and rounds."""
RARE = {
    "failed_clients",
    "notes",
    "auc_by_class",
    "quadratic_weighted_kappa",
    "nonfinite_scores",
    "others",
    "est_psnr",
    "detection_auroc",
    "detection_tpr",
    "detection_fpr",
    "attack_success_rate",
    "untriggered_rate",
    "lift",
    "attack_success_images",
}
RARE |= {"shared", "constant_outputs"}
RARE |= {"aggregation", "scheme", "degree", "modulus_bits", "scale_bits", "security_bits", "key_topology"}
RARE |= {"public_context_bytes", "fraction_encrypted", "flood_lambda", "threshold", "keygen_seconds"}
RARE |= {"encrypt_seconds", "serialise_seconds", "mask_seconds", "server_load_seconds", "server_add_seconds"}
RARE |= {"decrypt_seconds", "unmask_seconds", "rms_error", "max_error"}
RARE |= {"label_set_coverage", "label_set_size", "dp_audit"}
RARE |= {"matched_public_psnr", "matched_public_psnr_of_mean_mse", "reid_matched_rank1", "reid_matched_auc"}
"""Documented keys that the tiny run has no reason to show."""


def keys_of(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from keys_of(item)
    elif isinstance(value, Mapping) and value.keys() != {"value", "low", "high", "n"}:
        for key, inner in value.items():
            if not key.isdecimal():
                yield key
            if key not in OPEN:
                yield from keys_of(inner)


def test_every_key_of_a_result_is_documented_and_the_other_way_round(
    finished: dict[str, Any], attacked: dict[str, Any]
) -> None:
    text = page("results.md")
    found = set(keys_of([*finished["cells"], *attacked["cells"]]))
    assert found <= words_in_code(text)
    first_columns = re.findall(r"^\| ([^|]*`[^|]*|others) \|", text.partition("## Exit codes")[0], re.MULTILINE)
    documented = {word for cell in first_columns for word in CODE.findall(cell)}
    assert documented - RARE <= found


def exit_codes(kind: type[errors.FedsecError] = errors.FedsecError) -> set[int]:
    return {kind.exit_code}.union(*(exit_codes(k) for k in kind.__subclasses__()))


def test_exit_codes_are_documented() -> None:
    table = page("results.md").partition("## Exit codes")[2]
    assert {int(n) for n in re.findall(r"^\| (\d+) \|", table, re.MULTILINE)} == exit_codes() | {0, 1, 130}


def test_data_error_codes_are_documented() -> None:
    sources = [p for top in ("fedsec", "attacks", "defenses") for p in (ROOT / top).rglob("*.py")]
    used = set(re.findall(r"\"(D\d\d)\"|\[(D\d\d)\]", "".join(p.read_text(encoding="utf-8") for p in sources)))
    table = re.findall(r"^\| `(D\d\d)` \|", page("data.md"), re.MULTILINE)
    assert sorted({a or b for a, b in used}) == table
    assert set(get_args(Kind)) <= words_in_code(page("data.md"))
    assert {listing.name for listing in catalogue()} <= words_in_code(page("data.md"))


def table_after(text: str, marker: str) -> dict[str, str]:
    """Key -> default, of the first table after a line that starts with `marker`."""
    start = re.search(rf"^{re.escape(marker)}", text, re.MULTILINE)
    assert start, f"configuration.md has no line that starts with {marker}"
    rows = re.findall(r"^\|(.*)\|$", text[start.start() :].split("\n\n")[1], re.MULTILINE)
    result: dict[str, str] = {}
    for row in rows[2:]:
        keys, defaults = (cell.strip() for cell in re.split(r"(?<!\\)\|", row)[:2])
        result |= dict(zip(CODE.findall(keys), re.split(r", ?", defaults), strict=True))
    return result


def same(shown: str, default: Any) -> bool:
    word = shown.strip("`").replace("\\|", "|")
    if isinstance(default, bool) or default is None or isinstance(default, str):
        return word == str(default) if isinstance(default, str) else word == str(default).lower()
    if isinstance(default, (int, float)):
        return float(word) == default
    return word == ("empty" if not default else ", ".join(map(str, default)))


TABLES = {
    **{f"`[{name}]`": cls for name, cls in config.TABLES.items()},
    "`gradinversion`": ("attacks", "gradinversion"),
    "`dp`": ("defenses", "dp"),
    "`gaussian` and": ("defenses", "gaussian"),
    "All of `fedavg`": ("strategies", "partial"),
}


@pytest.mark.parametrize("marker", TABLES)
def test_tables_of_parameters_are_complete_and_right(marker: str) -> None:
    source = TABLES[marker]
    fields = plugins.parameter_fields(plugins.load(*source) if isinstance(source, tuple) else source)
    shown = table_after(page("configuration.md"), marker)
    assert shown.keys() == fields.keys()
    wrong = {k: (shown[k], default) for k, (_, default, _) in fields.items() if not same(shown[k], default)}
    assert not wrong


@pytest.mark.parametrize("kind", ["attacks", "defenses", "strategies"])
def test_every_plugin_and_parameter_is_on_the_configuration_page(kind: str) -> None:
    shown = words_in_code(page("configuration.md"))
    for name, point in plugins._entry_points(kind).items():
        if point.value.startswith("fedsec."):
            assert {name, *plugins.parameter_fields(plugins.load(kind, name))} <= shown


def test_every_option_of_run_is_on_the_configuration_page() -> None:
    command = importlib.import_module("fedsec.cli.run").command
    options = {option for p in command.params for option in p.opts}
    rows = re.findall(r"^\| `(--[\w-]+)", page("configuration.md"), re.MULTILINE)
    assert set(rows) == options
    assert len(rows) == len(options)


@pytest.mark.parametrize("path", [p for p in LOOSE if p.exists()], ids=lambda p: p.name)
def test_links_outside_the_site_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith(("#", "mailto:")):
            assert (path.parent / target.partition("#")[0]).exists(), f"{path.name} links to {target}"


def test_the_site_builds_strictly_and_needs_no_other_server(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="the site is built where the docs extra is installed")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    built = list((tmp_path / "site").rglob("*.html"))
    assert {p.stem for p in built} >= {p.stem for p in PAGES}
    for path in built:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"<(script|link|img|iframe)\b[^>]*\b(src|href)=[\"']?(https?:)?//", text), path.name
    for path in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", path.read_text(encoding="utf-8")), path.name
