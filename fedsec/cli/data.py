"""`fedsec data`: get public data sets, and check one that lies on the disk."""

from __future__ import annotations

from pathlib import Path

import click


@click.group("data")
def command() -> None:
    """Get public data sets, and check your own."""


@command.command("get")
@click.argument("name")
@click.option("--size", type=int, default=28, show_default=True, help="Side in pixels: 28, 64, 128 or 224.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where to put it (default: the user's cache).")
@click.option("--mirror", metavar="URL", help="Another address that holds the published files.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def get(name: str, size: int, folder: Path | None, mirror: str | None, debug: bool) -> None:
    """Download a MedMNIST set from its official address.

    A broken download resumes; the file appears under its name only when its MD5 is the published one.
    """
    from fedsec.cli.console import ConsoleProgress
    from fedsec.data import download
    from fedsec.data.cache import cache_dir

    def show(done: int, total: int | None) -> None:
        if not started:
            progress.stage(f"downloading {name} (bytes)", total or 0)
            started.append(True)
        progress.advance(done)

    started: list[bool] = []
    with ConsoleProgress() as progress:
        path = download.get(
            name, size, folder=folder or cache_dir(), base_url=mirror or download.BASE_URL, progress=show
        )
    click.echo(str(path))
    click.echo(f"next: fedsec run --attack gradinversion --defense dp --data {name}", err=True)


@command.command("check")
@click.argument("data", metavar="NAME|PATH")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets are looked up first.")
@click.option("--size", type=int, help="Side in pixels.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def check(data: str, data_dir: Path | None, size: int | None, debug: bool) -> None:
    """Read a data set as a run would, and say what is in it."""
    from fedsec.data import load

    click.echo(load(data, data_dir=data_dir, size=size).describe())
    click.echo(f"\nnext: fedsec run --attack gradinversion --defense dp --data {data}")
