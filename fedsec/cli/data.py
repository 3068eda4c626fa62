"""`fedsec data`: get public data sets, and check one that lies on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from fedsec.data.base import Dataset


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
@click.option("--as", "layout", metavar="NAME", help="Read a folder as this set, whatever it looks like.")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets are looked up first.")
@click.option("--size", type=int, help="Side in pixels.")
@click.option("--skip-bad", is_flag=True, help="Bad rows and files are no error: they are counted and left out.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the figures (default runs/check-<name>).")
@click.option("--no-figures", is_flag=True, help="Leave out the contact sheet and the label bars.")
@click.option("--fix", type=click.Path(path_type=Path), help="Write a repaired list into this new folder.")
@click.option("--json", "as_json", is_flag=True, help="Print the machine-readable findings, and nothing else.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def check(
    data: str,
    layout: str | None,
    data_dir: Path | None,
    size: int | None,
    skip_bad: bool,
    out: Path | None,
    no_figures: bool,
    fix: Path | None,
    as_json: bool,
    debug: bool,
) -> None:
    """Read a data set as a run would, and say what is in it.

    Recognises the layout; counts images, labels, patients, sites and missing values; finds files that cannot be used,
    duplicates (exact and near) and patients in several parts; draws a sheet of images and bars of the labels; and ends
    with the `fedsec run` line to use. Exit code 2 where rows or files are bad, unless --skip-bad. Nothing in PATH is
    ever changed.
    """
    from fedsec.cli.console import ConsoleProgress
    from fedsec.data.check import check as examine
    from fedsec.data.registry import with_options
    from fedsec.progress import watching

    with ConsoleProgress(quiet=as_json) as progress, watching(progress):
        found = examine(data, layout=layout, data_dir=data_dir, size=size)
    dataset = found.dataset
    folder = out or Path("runs") / f"check-{dataset.name}"
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, default=str))
    else:
        click.echo(dataset.describe())
        click.echo("\n" + "\n".join(found.lines()))
    if not no_figures:
        draw(dataset, folder)
    use = with_options(data, layout=layout) if layout else data
    if fix is not None:
        from fedsec.data.check_fix import fix as repair

        use, skip_bad = repair(found, fix, source_of(data, dataset.name, data_dir, size)), True
        click.echo(f"repaired list: {fix}", err=True)
    elif skip_bad and found.bad:
        use = with_options(use, on_bad="skip", max_bad=f"{found.allowance():g}")
    click.echo(f"next: {found.advice(use, data_dir=data_dir, size=size)}", err=as_json)
    if found.bad and not skip_bad:
        raise found.error()


def draw(dataset: Dataset, folder: Path) -> None:
    """The two figures of a data set."""
    from fedsec.data.check_figures import contact_sheet, label_bars

    contact_sheet(dataset, folder / "contact_sheet.png")
    label_bars(dataset, folder / "labels.png")
    click.echo(f"figures: {folder / 'contact_sheet.png'} (images of patients), {folder / 'labels.png'}", err=True)


def source_of(data: str, name: str, data_dir: Path | None, size: int | None) -> Path:
    """The folder or file that a name or path stands for."""
    from fedsec.data.registry import place_of
    from fedsec.errors import ConfigError

    path = place_of(data, data_dir=data_dir, size=size)
    if path is None:
        raise ConfigError(f"--fix: {name} is built in; there is nothing to repair")
    return path
