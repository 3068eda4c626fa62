"""`fedsec track`: finished cells for TensorBoard or MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("track")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path(path_type=Path))
@click.option("--to", type=click.Choice(["tensorboard", "mlflow"]), required=True, help="The tracker.")
@click.option(
    "--uri",
    metavar="WHERE",
    help="TensorBoard: the folder of event files (default RUN/tensorboard). MLflow: server, sqlite:///FILE or folder "
    "(default MLFLOW_TRACKING_URI, else RUN/mlflow.db).",
)
@click.option("--experiment", default="fedsec", show_default=True, help="MLflow's experiment.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def command(runs: tuple[Path, ...], to: Any, uri: str | None, experiment: str, debug: bool) -> None:
    """Hand the numbers of finished cells on; the same line again adds only what is new. No picture leaves.

    \b
    Examples:
        fedsec track runs/first --to tensorboard
        fedsec track runs/first --to mlflow --uri http://127.0.0.1:5000
    """
    from fedsec.cli.console import ConsoleProgress
    from fedsec.tracking import track

    for run in runs:
        with ConsoleProgress() as progress:
            done = track(run, to, uri=uri, experiment=experiment, progress=progress)
        click.echo(f"{done['uri']}: {done['written']} cells written, {done['present']} were there")
