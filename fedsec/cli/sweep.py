"""`fedsec sweep`: a grid of attacks, defenses, strengths and seeds in one command that can be resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from fedsec.grid.run import Plan


@click.command("sweep")
@click.argument("recipe", metavar="GRID.toml", type=click.Path(path_type=Path))
@click.option("--jobs", type=click.IntRange(min=1), help="Processes of one thread each (default: one a core).")
@click.option("--seeds", type=click.IntRange(min=1), help="Run seeds 0 to N-1.")
@click.option("--data", metavar="NAME|PATH", help="Another data set than the recipe's.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets are looked up first.")
@click.option("--set", "assignments", multiple=True, metavar="TABLE.KEY=VALUE", help="Any other setting; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder (default runs/<recipe>-<hash>).")
@click.option("--dry-run", is_flag=True, help="Print the cells and how long they will take, and compute nothing.")
@click.option("--max-minutes", type=click.FloatRange(min=0), help="Stop after so long; the same line goes on.")
@click.option("--json", "as_json", is_flag=True, help="Print the machine-readable result, and nothing else.")
@click.option("--debug", is_flag=True, help="Show the tracebacks of failures.")
def command(
    recipe: Path,
    jobs: int | None,
    seeds: int | None,
    data: str | None,
    data_dir: Path | None,
    assignments: tuple[str, ...],
    out: Path | None,
    dry_run: bool,
    max_minutes: float | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Compute every cell of a grid; the same line again resumes, and tries failed cells again.

    A list where one value is expected spans the grid. Cells that differ only in an attack of a curious server or an
    outsider share one training. A cell that fails is recorded with its reason, and the rest goes on (exit code 3 at
    the end).

    \b
    Examples:
        fedsec sweep experiments/tradeoff_cxr.toml --dry-run
        fedsec sweep experiments/tradeoff_cxr.toml --jobs 2 --max-minutes 25
    """
    from fedsec.cli.console import ConsoleProgress
    from fedsec.cli.run import read_tables
    from fedsec.cli.tables import print_results
    from fedsec.config import set_path
    from fedsec.grid.run import plan, sweep

    tables = read_tables(recipe)
    if data is not None:
        tables["data"] = {**tables.get("data", {}), "name": data}
    if seeds is not None:
        tables = {**{k: v for k, v in tables.items() if k != "seed"}, "seeds": seeds}
    for assignment in assignments:
        set_path(tables, assignment)
    options: dict[str, Any] = {"out": out, "jobs": jobs, "name": recipe.stem}
    if "breakdown" in tables.get("sweep", {}):
        find_breakdown(tables, dry_run, as_json, {**options, "data_dir": data_dir, "max_minutes": max_minutes})
        return
    if dry_run:
        print_plan(plan(tables, **options), as_json)
        return
    with ConsoleProgress() as progress:
        result = sweep(tables, data_dir=data_dir, progress=progress, max_minutes=max_minutes, **options)
    if as_json:
        click.echo(json.dumps(result, indent=1, allow_nan=False))
    else:
        print_results(result["cells"], Path(result["run"]))
    if debug:
        for record in result["failed"]:
            click.echo("\n".join([f"cell {record['id']}:", *record["traceback"]]), err=True)
    report_unfinished(result)


def report_unfinished(result: Mapping[str, Any]) -> None:
    """Say what is missing.

    Raises:
        RunError: cells failed.
    """
    from fedsec.errors import RunError

    if result["unfinished"]:
        click.echo(f"time is up: {result['unfinished']} cells are not finished; the same line goes on", err=True)
    if result["failed"]:
        first = result["failed"][0]["reason"]
        raise RunError(
            f"{len(result['failed'])} cells failed, the first: {first}; all reasons are in {result['run']}/failed, "
            "--debug shows the tracebacks, the same line tries them again"
        )


def find_breakdown(tables: Mapping[str, Any], dry_run: bool, as_json: bool, options: Mapping[str, Any]) -> None:
    """A recipe with `[sweep.breakdown]`: how many malicious clients each rule bears."""
    from fedsec.cli.console import ConsoleProgress
    from fedsec.cli.tables import print_breakdown
    from fedsec.grid.breakdown import search, series_of

    if dry_run:
        pairs = series_of(tables)[0]
        calm = len({s.calm.key() for s in pairs})
        most = sum(s.limit for s in pairs)
        click.echo(
            f"{len(pairs)} searches over 1 to {max(s.limit for s in pairs)} malicious clients: {calm} trainings "
            f"without an attack, and between {len(pairs)} and {most} with one"
        )
        return
    with ConsoleProgress() as progress:
        result = search(tables, progress=progress, **options)
    if as_json:
        click.echo(json.dumps(result, indent=1, allow_nan=False))
    else:
        print_breakdown(result["breakdown"], Path(result["run"]))
    report_unfinished(result)


def print_plan(plan: Plan, as_json: bool) -> None:
    """The cells of a grid, which of them are finished, and an estimate for the rest."""
    duration = plan.duration()
    trainings = len(set(plan.training_of.values()))
    if as_json:
        rows = [
            {"id": c.key(), "training": plan.training_of[c.key()], "finished": c.key() in plan.finished, **c.to_json()}
            for c in plan.cells
        ]
        content = {"run": str(plan.folder), "cells": rows, "trainings": trainings, "jobs": plan.jobs}
        click.echo(json.dumps({**content, "estimate_seconds": duration.seconds}, indent=1, allow_nan=False))
        return
    for cell in plan.cells:
        state = "finished" if cell.key() in plan.finished else "        "
        what = f"{cell.data.name}, {cell.model.name}, {cell.attack or 'no attack'} on {cell.label()}, seed {cell.seed}"
        click.echo(f"{cell.key()}  {state}  {plan.training_of[cell.key()]}  {what}")
    click.echo(f"{len(plan.cells)} cells on {trainings} trainings; {len(plan.open)} to compute with {plan.jobs} jobs")
    click.echo(f"time: {duration if plan.open else 'nothing to do'}")
    click.echo(f"run folder: {plan.folder}")
