"""`fedsec show`: the results of a finished run, without recomputing anything."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command("show")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="The machine-readable cells.")
def command(run: Path, as_json: bool) -> None:
    """Print the results of a finished run."""
    from fedsec.store import RunFolder

    folder = RunFolder.open(run)
    cells = list(folder.results())
    if as_json:
        click.echo(json.dumps({"run": str(run), "cells": cells}, indent=1))
        return
    from fedsec.cli.tables import print_results

    missing = len(folder.resolved()) - len(cells)
    if missing > 0:
        click.echo(f"{missing} of {len(folder.resolved())} cells are not finished; type the run's line again", err=True)
    print_results(cells, run)
