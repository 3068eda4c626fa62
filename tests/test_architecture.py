"""The arrows between packages run one way, heavy libraries stay in their files, and listing imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for top in ("fedsec", "attacks", "defenses") for p in (ROOT / top).rglob("*.py")]

# What each layer may import of fedsec; later layers may import earlier ones.
LAYERS = [
    {"errors", "files", "machine", "progress", "embed"},
    {"plugins", "types"},
    {"attack", "defense", "metrics", "models", "data", "privacy", "config", "checkpoint"},
    {"robust"},
    {"federation"},
    {"strategies"},
    {"leakage"},
    {"experiment", "audit"},
    {"store", "tradeoff", "plotting"},
    {"charts"},
    {"api", "figures", "inlined", "report"},
    {"grid", "deployment"},
    {"cli"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
HEAVY = {
    "opacus": {"defenses/", "fedsec/privacy/accounting.py"},
    "tenseal": {"defenses/homomorphic/"},
    "flwr": {"fedsec/federation/engines/flower.py", "fedsec/deployment/app.py"},
    "click": {"fedsec/cli/"},
    "rich": {"fedsec/cli/"},
}


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    name = ".".join(p for p in parts if p != "__init__")
    return name if parts[0] == "fedsec" else f"fedsec.{name}"


def imports_of(path: Path) -> set[str]:
    """Absolute names of everything a file imports, also inside functions."""
    package = module_of(path).split(".")
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{stem}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path: Path) -> None:
    own = module_of(path).split(".")
    for name in imports_of(path):
        parts = name.split(".")
        if parts[0] in ("attacks", "defenses"):
            pytest.fail(f"{path}: imports the bare folder {name}; it ships as fedsec.{name}")
        if parts[0] != "fedsec" or len(parts) < 2:
            continue
        target = parts[1]
        if len(own) > 1 and own[1] in ("attacks", "defenses"):
            assert target == own[1] or target not in ("attacks", "defenses", "cli", "api"), f"{path}: imports {name}"
            continue
        assert target not in ("attacks", "defenses"), f"{path}: the frame imports the plugin {name}"
        if len(own) > 1 and own[1] in RANK and target in RANK:
            assert RANK[target] <= RANK[own[1]], f"{path}: {own[1]} imports {target}, which stands above it"


@pytest.mark.parametrize("library", HEAVY)
def test_heavy_libraries_are_imported_in_one_place(library: str) -> None:
    users = {str(p.relative_to(ROOT)) for p in SOURCES for n in imports_of(p) if n.split(".")[0] == library}
    strangers = {u for u in users if not any(u.startswith(allowed) for allowed in HEAVY[library])}
    assert not strangers


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["list", "attacks"],
        ["list", "defenses"],
        ["list", "datasets"],
        ["list", "models"],
        ["run", "--help"],
    ],
)
def test_help_and_list_import_no_torch(words: list[str]) -> None:
    code = f"import sys; from fedsec.cli import run; c = run({words!r}); assert 'torch' not in sys.modules; sys.exit(c)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_every_package_folder_is_shipped() -> None:
    shipped = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert {module_of(p) for p in SOURCES if p.name == "__init__.py"} == shipped


def test_files_stay_readable() -> None:
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) >= 400}
    assert not long
