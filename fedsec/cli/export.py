"""`fedsec export flower`: the same cells as an app for several machines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from fedsec.cli.run import command as run_command
from fedsec.cli.run import tables_of

NOT_HERE = {"out", "engine", "device", "as_json", "debug"}
"""Options of `fedsec run` that have no meaning for an app."""


@click.group("export")
def command() -> None:
    """Write an app that runs the same cells on several machines."""


def _flower(
    folder: Path,
    nodes: int,
    superlink: str,
    data_dir: Path | None,
    deal: bool,
    sizes: str | None,
    debug: bool,
    **words: Any,
) -> None:
    """Write a Flower app to DIR: the server's and the hospitals' part, and a README with the lines to type.

    Takes the options of `fedsec run`. Every cell is checked and its data are dealt before anything is written.

    \b
    Example:
        fedsec export flower app --attack gradinversion --defense dp --clients 10 --nodes 3 --superlink fl.example.org
    """
    tables = tables_of(
        words.pop("attack"),
        words.pop("defense"),
        words.pop("config"),
        words.pop("assignments"),
        words.pop("seed"),
        words.pop("seeds"),
        words.pop("no_baseline"),
        words,
    )
    from fedsec.deployment.export import export_flower

    try:
        own = None if sizes is None else [int(word) for word in sizes.split(",")]
    except ValueError:
        raise click.UsageError(f"--sizes {sizes}: write numbers such as 312,410,288") from None
    app = export_flower(tables, folder, nodes=nodes, superlink=superlink, data_dir=data_dir, deal=deal, sizes=own)
    click.echo(f"{folder}: {len(app.cells)} cells for {app.clients} clients on {nodes} nodes")
    click.echo(f"next: read {folder / 'README.md'}")


command.add_command(
    click.Command(
        "flower",
        callback=_flower,
        help=_flower.__doc__,
        params=[
            click.Argument(["folder"], metavar="DIR", type=click.Path(path_type=Path)),
            click.Option(["--nodes"], type=click.IntRange(min=1), default=3, show_default=True, help="SuperNodes."),
            click.Option(
                ["--superlink"],
                default="127.0.0.1:8000",
                show_default=True,
                metavar="HOST[:PORT]",
                help="Where the server listens.",
            ),
            click.Option(
                ["--deal/--no-deal"],
                default=True,
                help="Write each node's images into its folder (--no-deal: they are brought there in another way).",
            ),
            click.Option(
                ["--sizes"],
                metavar="N,N,…",
                help="The hospitals bring images of their own, so many each, that the server never has.",
            ),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of a failure."),
            *(p for p in run_command.params if p.name not in NOT_HERE),
        ],
    )
)
