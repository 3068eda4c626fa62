"""Do the recipes say something that the configuration understands, without giving the same thing twice?"""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from fedsec import config
from fedsec.federation.assemble import build_stack
from fedsec.grid.breakdown import series_of
from fedsec.plugins import names

RECIPES = sorted((Path(__file__).resolve().parents[2] / "experiments").glob("*.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_expands_to_cells_that_can_be_built(path: Path) -> None:
    tables = tomllib.loads(path.read_text(encoding="utf-8"))
    if "breakdown" in tables.get("sweep", {}):
        cells = [series.cell(f) for series in series_of(tables)[0] for f in (0, 1, series.limit)]
    else:
        cells = config.expand(tables)
    assert cells
    for cell in cells:
        build_stack(cell)
        assert cell.model.name in names("models")


def test_the_grid_of_gradient_inversion() -> None:
    path = next(p for p in RECIPES if p.stem == "gradinversion")
    text = path.read_text(encoding="utf-8")
    cells = config.expand(tomllib.loads(text))
    labels = ["none", "dp:epsilon=8", "gaussian:sigma=0.001", "gaussian:sigma=0.01", "topk:fraction=0.1"]
    assert [(c.model.name, c.label()) for c in cells] == [(m, d) for m in ("lenet", "cnn") for d in labels]
    command = f"fedsec run --config experiments/{path.name}"
    assert command in text
    assert command in (path.parent / "README.md").read_text(encoding="utf-8")
