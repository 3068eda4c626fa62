"""`fedsec report`: one self-contained HTML page over finished runs, and thresholds for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="RUN…", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The page (default RUN/report.html).")
@click.option(
    "--fail-above",
    multiple=True,
    metavar="KEY=VALUE",
    help="Exit with 1 where a defended federation exceeds it: psnr, reid_rank1, tpr_at_1pct_fpr, "
    "attack_success_rate, epsilon, or any path such as leakage.ssim; repeatable.",
)
@click.option(
    "--fail-on",
    type=click.Choice(["lower", "point", "upper"]),
    default="lower",
    show_default=True,
    help="Which limit of the 95 % interval is compared.",
)
@click.option("--redact", is_flag=True, help="Blur all patients' images and reconstructions.")
@click.option("--no-figures", is_flag=True, help="Leave the drawn figures out; the explorer stays.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def command(
    runs: tuple[Path, ...],
    out: Path | None,
    fail_above: tuple[str, ...],
    fail_on: Any,
    redact: bool,
    no_figures: bool,
    debug: bool,
) -> int:
    """Write one page that opens from a file share and asks no server for anything.

    \b
    Examples:
        fedsec report runs/first
        fedsec report runs/cxr runs/skin --out both.html --redact
        fedsec report runs/first --fail-above psnr=25 --fail-above reid_rank1=0.1
    """
    from fedsec.report import write_report

    report = write_report(runs, out, fail_above=fail_above, fail_on=fail_on, redact=redact, figures=not no_figures)
    click.echo(str(report.path))
    for text in report.undecided:
        click.echo(f"undecided, too few images for an interval: {text}", err=True)
    for text in report.exceeded:
        click.echo(f"exceeded: {text}", err=True)
    return 1 if report.exceeded else 0
