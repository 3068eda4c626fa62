"""`fedsec run`: train a federation, attack it, defend it, and measure both sides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

# Option -> where it stands in the configuration tables.
PLACES = {
    "data": ("data", "name"),
    "size": ("data", "size"),
    "partition": ("data", "partition"),
    "alpha": ("data", "alpha"),
    "model": ("model", "name"),
    "clients": ("federation", "clients"),
    "rounds": ("federation", "rounds"),
    "local_steps": ("federation", "local_steps"),
    "local_epochs": ("federation", "local_epochs"),
    "batch_size": ("federation", "batch_size"),
    "optimizer": ("federation", "optimizer"),
    "lr": ("federation", "lr"),
    "topology": ("federation", "topology"),
    "strategy": ("federation", "strategy"),
    "participation": ("federation", "participation"),
    "canaries": ("data", "canaries"),
    "canary": ("data", "canary"),
    "shadow_rules": ("federation", "shadow_rules"),
    "engine": ("federation", "engine"),
    "device": ("federation", "device"),
}


@click.command("run")
@click.option("--attack", multiple=True, metavar="NAME[:KEY=VALUE,…]", help="The adversary; repeat for several.")
@click.option(
    "--defense",
    multiple=True,
    metavar="NAME[:KEY=VALUE,…]",
    help="The defense, or a stack such as dp:epsilon=3+gaussian:sigma=0.01; repeat for alternatives.",
)
@click.option("--data", metavar="NAME|PATH", help="Data set (default: built-in synthetic chest X-rays).")
@click.option("--data-dir", type=click.Path(path_type=Path), help="Where data sets are looked up first.")
@click.option("--size", type=int, help="Side of the images in pixels, where the set comes in several sizes.")
@click.option("--skip-bad", is_flag=True, help="Leave bad rows and damaged images out, and count them.")
@click.option("--model", metavar="NAME", help="Network (default cnn): fedsec list models, or one of torchvision's.")
@click.option("--clients", type=int, help="Number of hospitals (default: the data set's sites, else 10).")
@click.option("--rounds", type=int, help="Communication rounds (default 10).")
@click.option("--local-steps", type=int, help="Optimisation steps a round …")
@click.option("--local-epochs", type=int, help="… or passes over the client's images (default 3).")
@click.option("--batch-size", type=int, help="Images per optimisation step (default 32).")
@click.option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="What clients descend with (default sgd).")
@click.option("--lr", type=float, help="Learning rate of the clients (default 0.02; with adamw 0.001).")
@click.option("--partition", metavar="LAW", help="iid, dirichlet, quantity, site or patient.")
@click.option("--alpha", type=float, help="Concentration of the dirichlet and quantity partitions (default 0.5).")
@click.option(
    "--topology",
    metavar="WHO[,WHO]",
    help="federated, central (all images pooled) or local (each hospital alone); joined by commas, side by side.",
)
@click.option(
    "--strategy", metavar="NAME[:KEY=VALUE,…]", help="What is shared and how it is combined (default fedavg)."
)
@click.option("--participation", metavar="WHO", help="full, a fraction such as 0.5, or intermittent:p=0.8.")
@click.option(
    "--shadow-rules", metavar="RULE+RULE", help="Robust rules to evaluate on the same updates without applying them."
)
@click.option("--canaries", type=int, help="Canaries to audit a claimed epsilon with (default 0).")
@click.option("--canary", metavar="KIND", help="mislabelled, dirac, random, client_dirac or client_random.")
@click.option("--engine", metavar="NAME", help="serial, processes, batched, flower or auto.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:N or auto.")
@click.option("--seed", type=int, help="Seed of everything random (default 0).")
@click.option("--seeds", type=click.IntRange(min=1), help="Run seeds 0 to N-1.")
@click.option("--config", type=click.Path(path_type=Path), help="TOML tables, or a run's resolved.json.")
@click.option("--set", "assignments", multiple=True, metavar="TABLE.KEY=VALUE", help="Any other setting; repeatable.")
@click.option("--out", type=click.Path(path_type=Path), help="Run folder (default runs/<name>-<hash>).")
@click.option("--no-baseline", is_flag=True, help="Leave out the undefended federation.")
@click.option("--json", "as_json", is_flag=True, help="Print the machine-readable result, and nothing else.")
@click.option("--debug", is_flag=True, help="Show the traceback of a failure.")
def command(
    attack: tuple[str, ...],
    defense: tuple[str, ...],
    data_dir: Path | None,
    seed: int | None,
    seeds: int | None,
    config: Path | None,
    assignments: tuple[str, ...],
    out: Path | None,
    no_baseline: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Train a federation, attack it, defend it, and measure both sides.

    The undefended federation is trained and attacked beside the defended one. Results go to standard output and to
    the run folder; the same line again resumes an interrupted run and recomputes nothing that is finished.

    \b
    Examples:
        fedsec run --attack gradinversion --defense dp
        fedsec run --attack gradinversion:images=40,batch=4 --defense dp:epsilon=3 --defense gaussian:sigma=0.01
        fedsec run --attack poisoning:fraction=0.3 --defense dos --defense krum --shadow-rules median
        fedsec run --attack gradinversion --defense dp --data ham10000 --partition site --rounds 30
    """
    tables = tables_of(attack, defense, config, assignments, seed, seeds, no_baseline, options)

    from fedsec.api import run
    from fedsec.cli.console import ConsoleProgress
    from fedsec.cli.tables import print_results

    with ConsoleProgress() as progress:
        result = run(tables, out=out, data_dir=data_dir, progress=progress, debug=debug)
    if as_json:
        click.echo(json.dumps(result, indent=1, allow_nan=False))
    else:
        print_results(result["cells"], Path(result["run"]))


def tables_of(
    attack: tuple[str, ...],
    defense: tuple[str, ...],
    config: Path | None,
    assignments: tuple[str, ...],
    seed: int | None,
    seeds: int | None,
    no_baseline: bool,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """The configuration that the options spell, on top of a file's."""
    tables = read_tables(config)
    for name, value in options.items():
        if value is not None and name in PLACES:
            table, key = PLACES[name]
            if name == "topology" and "," in value:
                value = value.split(",")
            tables[table] = {**tables.get(table, {}), key: value}
    if options.get("skip_bad") and "name" in tables.get("data", {}):
        from fedsec.data.registry import with_options

        tables["data"] = {**tables["data"], "name": with_options(tables["data"]["name"], on_bad="skip")}
    for name, words in (("attack", attack), ("defense", defense)):
        if words:
            tables[name] = list(words)
    if seed is not None and seeds is not None:
        raise click.UsageError("give --seed or --seeds, not both")
    if seed is not None:
        tables = {**{k: v for k, v in tables.items() if k != "seeds"}, "seed": seed}
    if seeds is not None:
        tables["seeds"] = seeds
    if no_baseline:
        tables["baseline"] = False

    from fedsec.config import set_path

    for assignment in assignments:
        set_path(tables, assignment)
    return tables


def read_tables(path: Path | None) -> dict[str, Any]:
    """The tables of a configuration file; none without one."""
    from fedsec.config import read_toml

    if path is None:
        return {}
    if path.suffix == ".json":
        from fedsec.config import read_resolved

        return {"cells": read_resolved(path)}
    return read_toml(path)
