"""`fedsec list`: the registered plugins, and with -v their parameters."""

from __future__ import annotations

from typing import Any

import click

from fedsec import plugins


@click.command("list")
@click.argument("kind", type=click.Choice(plugins.KINDS), metavar="attacks|defenses|datasets|models|strategies")
@click.option("-v", "--verbose", is_flag=True, help="Also parameters: type, default, meaning.")
def command(kind: str, verbose: bool) -> None:
    """List attacks, defenses, datasets, models or strategies.

    Third-party plugins are listed as soon as they are installed: they register the entry-point group fedsec.KIND.
    """
    names = plugins.names(kind)
    width = max(map(len, names), default=0)
    for name in names:
        click.echo(f"{name:<{width}}  {plugins.summary(kind, name)}")
        if verbose:
            for line in details(kind, name):
                click.echo(f"{'':<{width}}    {line}")
    if kind == "models":
        click.echo("\nAlso any classification network of torchvision by its name, such as resnet34; where they are")
        click.echo("installed, timm:NAME and torchxrayvision:densenet; and your own as package.module:factory.")
    if kind == "datasets":
        from fedsec.data.registry import catalogue

        click.echo("\nBy name, from an npz file (fedsec data get NAME downloads those marked *):")
        for item in catalogue():
            if item.licence:
                star = "*" if item.downloadable else " "
                click.echo(f"{item.name:<15}{star} {item.summary}; {item.licence}")


def details(kind: str, name: str) -> list[str]:
    """One line a parameter; for plugins that are functions, their signature."""
    import dataclasses
    import inspect

    plugin = plugins.load(kind, name)
    if not (inspect.isclass(plugin) and dataclasses.is_dataclass(plugin)):
        return [str(inspect.signature(plugin))]
    seat = getattr(plugin, "seat", None)
    lines = [f"seat: {seat}"] if seat else []
    if kind == "strategies":
        lines += origin(plugin)
    for key, (annotation, default, text) in plugins.parameter_fields(plugin).items():
        shown = "required" if default is dataclasses.MISSING else f"default {default}"
        lines.append(f"{key}: {type_name(annotation)}, {shown}{f'. {text}' if text else ''}")
    return lines


def origin(strategy: Any) -> list[str]:
    """Where a strategy is from, what leaves the hospital beyond parameters, and which defenses stand beside it."""
    from fedsec.federation.composition import composes, leaves

    told = leaves(strategy) or (("no parameters, and nothing else",) if strategy.shares_nothing else ("nothing",))
    return [
        f"source: {strategy.source} ({strategy.label})",
        *(f"leaves beyond parameters: {line}" for line in told),
        *(f"defenses: {line}" for line in composes(strategy)),
    ]


def type_name(annotation: Any) -> str:
    """A type as people read it: `float`, `int or none`, `recovered|oracle`."""
    import types
    import typing

    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return type_name(typing.get_args(annotation)[0])
    if origin is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(a) for a in typing.get_args(annotation))
    if annotation is type(None):
        return "none"
    return getattr(annotation, "__name__", str(annotation))
