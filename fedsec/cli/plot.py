"""`fedsec plot`: figures of finished runs, without recomputing anything."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("plot")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--redact", is_flag=True, help="Blur all patients' images and reconstructions.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def command(runs: tuple[Path, ...], redact: bool, debug: bool) -> None:
    """Draw reconstructions beside originals, and the training curves.

    Figures go to RUN/figures as PNG and SVG, with the data behind each as CSV.
    """
    from fedsec.figures import draw

    for run in runs:
        for path in draw(run, redact=redact):
            click.echo(str(path))
