"""Running cells: the one entry point behind `fedsec run` and `fedsec.run`. Finished cells are kept and skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedsec.config import Cell, expand
from fedsec.errors import FedsecError, RunError, reason_of
from fedsec.progress import Progress
from fedsec.store import RunFolder, default_folder

if TYPE_CHECKING:
    from fedsec.experiment import Stage


def run(
    tables: Mapping[str, Any] | None = None,
    *,
    out: str | Path | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
    debug: bool = False,
    **shortcuts: Any,
) -> dict[str, Any]:
    """Train, defend and attack; return every cell's result.

    Args:
        tables: the configuration, as `config.toml` holds it. out: run folder; by default `runs/<slug>-<hash>`.
        data_dir: where data sets are looked up first. progress: told how far it is.
        debug: let a failing cell's own exception through.
        shortcuts: `attack=`, `defense=`, `data=`, `model=` as on the command line, `seed=`, `seeds=`, `baseline=`,
            and any key of the `[federation]` table.

    Returns:
        `{"run": folder, "cells": [...]}`; each cell is the JSON object that docs/results.md describes.

    Raises:
        FedsecError: see `fedsec.errors` for the kinds.

    Example:
        ``fedsec.run(attack="gradinversion", defense="dp:epsilon=8", rounds=3, clients=4)``
    """
    from fedsec.federation.assemble import build_stack, resolve

    asked = with_shortcuts(tables or {}, shortcuts)
    cells = [resolve(cell) for cell in expand(asked)]
    for cell in cells:
        build_stack(cell)  # a wrong name or an impossible stack is refused before anything runs
    folder = RunFolder(Path(out) if out else default_folder(cells))
    folder.begin(asked, cells, cells[0].federation.device)
    results = run_cells(cells, folder, Path(data_dir) if data_dir else None, progress or Progress(), debug)
    return {"run": str(folder.path), "cells": results}


def with_shortcuts(tables: Mapping[str, Any], shortcuts: Mapping[str, Any]) -> dict[str, Any]:
    """Tables plus flat words: `data` and `model` name a plugin, unknown words belong to `[federation]`."""
    asked: dict[str, Any] = {k: dict(v) if isinstance(v, Mapping) else v for k, v in tables.items()}
    for key, value in shortcuts.items():
        if key in ("attack", "defense", "seed", "seeds", "baseline"):
            asked[key] = value
        elif key in ("data", "model"):
            asked[key] = {**asked.get(key, {}), "name": str(value)}
        else:
            asked["federation"] = {**asked.get("federation", {}), key: value}
    return asked


def finished_cells(
    cells: Sequence[Cell], folder: RunFolder, data_dir: Path | None, progress: Progress
) -> dict[str, dict[str, Any]]:
    """Cell id -> result of those cells that were finished before, on the same data."""
    from fedsec.federation.assemble import dataset_of

    kept = {c.key(): done for c in cells if (done := folder.finished(c.key())) is not None}
    for cell in cells:
        if cell.key() in kept and kept[cell.key()]["data_fingerprint"] != dataset_of(cell, data_dir).fingerprint:
            progress.message(f"{cell.data.name} has changed since cell {cell.key()} was finished: computing it again")
            del kept[cell.key()]
    return kept


def run_cells(
    cells: Sequence[Cell], folder: RunFolder, data_dir: Path | None, progress: Progress, debug: bool = False
) -> list[dict[str, Any]]:
    """Compute the cells that are not finished, and return the results of all, in order.

    Raises:
        RunError: a cell failed; those before it are kept.
    """
    from fedsec.experiment import run_cell, shared_rounds, training_key_of
    from fedsec.federation.assemble import assemble

    stages: dict[str, Stage] = {}
    wanted = shared_rounds(cells)
    kept = finished_cells(cells, folder, data_dir, progress)
    for cell in {training_key_of(c): c for c in cells if c.key() not in kept}.values():
        assemble(cell, data_dir)  # what cannot work is refused before the first round of the first cell
    results = []
    for number, cell in enumerate(cells, 1):
        if (done := kept.get(cell.key())) is not None:
            progress.message(f"cell {number}/{len(cells)} ({cell.label()}, seed {cell.seed}): finished before, kept")
            results.append(done)
            continue
        progress.message(f"cell {number}/{len(cells)}: {cell.label()}, seed {cell.seed}")
        try:
            result = run_cell(
                cell, folder.path / "artifacts", data_dir, progress, stages, wanted[training_key_of(cell)]
            )
        except FedsecError:
            raise
        except Exception as error:
            if debug:
                raise
            raise RunError(
                f"cell {cell.label()}, seed {cell.seed} failed: {reason_of(error)}; --debug shows the traceback"
            ) from error
        folder.finish(cell.key(), result)
        results.append(result)
    return results
