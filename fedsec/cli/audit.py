"""`fedsec audit`: what does a trained model give away?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

FILE = click.Path(path_type=Path)


@click.command("audit")
@click.argument("model", type=FILE)
@click.option("--data", metavar="NAME|PATH", help="Data set; a run folder knows its own.")
@click.option("--data-dir", type=FILE, help="Where data sets are looked up first.")
@click.option("--members", default="train", metavar="SPEC", help="Part, column=value, text file or .npy mask.")
@click.option("--nonmembers", default="val", metavar="SPEC", help="The same, of images the model was not trained on.")
@click.option("--population", metavar="SPEC", help="Further images it was not trained on, for RMIA.")
@click.option("--model", "architecture", metavar="NAME", help="Architecture, or package.module:factory.")
@click.option("--recipe", type=FILE, help="TOML tables of the training; without it no shadows are trained.")
@click.option("--cell", metavar="ID", help="Which cell of a run folder (default: the last with a defense).")
@click.option("--attack", multiple=True, metavar="NAME[:KEY=VALUE,…]", help="Attack; repeat (default: all that apply).")
@click.option("--shadow", type=int, default=8, help="Shadow models, an even number (default 8).")
@click.option("--claimed-epsilon", type=float, help="Claim to compare with; a run folder knows its own.")
@click.option("--unit", metavar="UNIT", help="What the claim protects: sample, patient, client (default: the run's).")
@click.option("--delta", type=float, default=1e-5, help="Of the claim (default 1e-5).")
@click.option("--ledger", type=FILE, help="A run's ledger (JSON lines): what it proves is the claim.")
@click.option("--history", type=FILE, help="Folder with the updates of the training, for attacks on them.")
@click.option("--budget", metavar="SECONDS", help="Wall time, as 180 or 180s: fewer shadows, then fewer attacks.")
@click.option("--fail-above", multiple=True, metavar="KEY=VALUE", help="Exit 1 above; auc, tpr_at_1pct_fpr, epsilon …")
@click.option("--fail-on", type=click.Choice(["lower", "point", "upper"]), default="lower", help="What is compared.")
@click.option("--strict", is_flag=True, help="A threshold on something that cannot be resolved fails.")
@click.option("--allow-shift", is_flag=True, help="Print numbers of an invalid comparison, as no evidence.")
@click.option("--report", type=FILE, help="Write a self-contained HTML page.")
@click.option("--json", "json_file", type=FILE, help="Write the machine-readable report; - prints it alone.")
@click.option("--junit", type=FILE, help="Write JUnit XML.")
@click.option("--sarif", type=FILE, help="Write SARIF 2.1.0.")
@click.option("--card", type=FILE, help="Write a Markdown block for a model card.")
@click.option("--redact", is_flag=True, help="Leave images out of the page.")
@click.option("--cache", type=FILE, help="Where shadow models of a bare file are kept.")
@click.option("--seed", type=int, default=0, help="Seed of everything random (default 0).")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def command(
    model: Path, data_dir: Path | None, cell: str | None, cache: Path | None, debug: bool, **options: Any
) -> int:
    """Audit a trained model: a run folder, or a model file.

    \b
    Examples:
        fedsec audit runs/first --report audit.html
        fedsec audit model.safetensors --data pneumoniamnist --nonmembers held_out.txt --recipe train.toml
        fedsec audit runs/first --fail-above auc=0.6 --fail-above epsilon=8 --junit audit.xml
    """
    from fedsec.audit.gates import parse
    from fedsec.audit.run import Wanted, audit
    from fedsec.audit.subjects import Said
    from fedsec.cli.console import ConsoleProgress

    alone = str(options["json_file"]) == "-"
    said = Said(
        data=options["data"],
        members=options["members"],
        nonmembers=options["nonmembers"],
        population=options["population"],
        recipe=options["recipe"],
        model=options["architecture"],
        epsilon=options["claimed_epsilon"],
        delta=options["delta"],
        unit=options["unit"],
        ledger=options["ledger"],
        history=options["history"],
        seed=options["seed"],
    )
    wanted = Wanted(
        attacks=options["attack"],
        shadows=options["shadow"],
        fail_above=parse(options["fail_above"]),
        fail_on=options["fail_on"],
        strict=options["strict"],
        allow_shift=options["allow_shift"],
        budget=seconds(options["budget"]),
        redact=options["redact"],
        report=options["report"],
        json=None if alone else options["json_file"],
        junit=options["junit"],
        sarif=options["sarif"],
        card=options["card"],
    )
    with ConsoleProgress() as progress:
        report = audit(model, said, wanted, cell=cell, data_dir=data_dir, cache=cache, progress=progress)
    if alone:
        click.echo(json.dumps(report, indent=1, allow_nan=False))
    else:
        show(report)
    return int(report["exit_code"])


def seconds(text: str | None) -> float | None:
    """`180` or `180s`.

    Raises:
        ConfigError: not a number of seconds above 0.
    """
    from fedsec.errors import ConfigError

    if text is None:
        return None
    try:
        found = float(text.removesuffix("s"))
    except ValueError:
        found = 0.0
    if not found > 0:
        raise ConfigError(f"--budget {text}: write a number of seconds, as 180 or 180s")
    return found


def show(report: dict[str, Any]) -> None:
    """The verdict in plain words."""
    from fedsec.audit.page import number

    click.echo(report["outcome"]["title"])
    for text in report["risk_sentences"]:
        click.echo(f"- {text}.")
    table = report.get("membership", {})
    for name, row in table.get("attacks", {}).items():
        click.echo(f"  {name}: AUC {number(row['auc'])}, TPR at 1 % FPR {number(row['tpr_at_1pct_fpr'])}")
    if "blind" in table:
        click.echo(f"  without the model: AUC {number(table['blind']['auc'])}")
    for check in report["validity"]:
        if check["status"] != "ok":
            click.echo(f"  {check['status']}: {check['id']} {check['message']}")
    for gate in report["thresholds"]:
        click.echo(f"  {gate['result']}: {gate['text']}")
    for text in report["notes"]:
        click.echo(f"  note: {text}")
    click.echo(f"{report['not_shown'][0]}. {report['timings']['seconds']:g} s.")
