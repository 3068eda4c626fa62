"""The command line: a group whose commands are imported when they are called, and the one place that exits.

Exit codes: 0 done; 1 a --fail-above threshold was exceeded or a claim is contradicted; 2 usage or configuration; 3 the
run failed; 4 refused (unsafe file, undefined privacy claim); 130 interrupted (finished cells are kept).
"""

from __future__ import annotations

import importlib
import sys

import click

from fedsec import __version__
from fedsec.errors import FedsecError

COMMANDS = {
    "run": "Train a federation, attack it, defend it, and measure both sides.",
    "sweep": "Compute a grid of attacks, defenses and seeds; the same line resumes.",
    "audit": "Audit a trained model: membership, claimed epsilon, inversion, attributes.",
    "plot": "Draw the figures of finished runs.",
    "report": "One self-contained HTML page over finished runs.",
    "track": "Hand finished cells on to TensorBoard or MLflow.",
    "show": "Print the results of a finished run.",
    "list": "List attacks, defenses, datasets, models or strategies.",
    "data": "Get public data sets, and check your own.",
    "export": "Write an app that runs the same cells on several machines.",
    "doctor": "Check this installation and machine.",
}


class LazyGroup(click.Group):
    """Knows its commands' names and summaries; imports a command's module when it is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which people need them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"fedsec.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Summaries without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Offer the nearest command where the name is unknown."""
        from fedsec.plugins import nearest

        name = args[0]
        if name not in COMMANDS and not name.startswith("-"):
            raise click.UsageError(f"unknown command '{name}': {nearest(name, COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="fedsec")
def cli() -> None:
    """What does a federated medical image classifier give away, and what does it cost to stop that?

    \b
    The main job, on built-in synthetic X-rays (no download):
        fedsec run --attack gradinversion --defense dp
    On real ones:
        fedsec data get pneumoniamnist
        fedsec run --attack gradinversion --defense dp:epsilon=8 --data pneumoniamnist
    """


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit with the documented code."""
    sys.exit(exit_code(args))


def exit_code(args: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. Errors are one line on standard error."""
    words = sys.argv[1:] if args is None else args
    try:
        code = cli.main(args=words, prog_name="fedsec", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except FedsecError as error:
        if "--debug" in words:
            raise
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except click.ClickException as error:
        where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "fedsec"
        click.echo(f"error: {' '.join(error.format_message().split())} (see {where} --help)", err=True)
        return 2
    except (KeyboardInterrupt, click.Abort):
        click.echo("interrupted; finished cells are kept, and the same line resumes", err=True)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone (`fedsec list | head`); nothing is wrong.
        sys.stderr.close()
        return 0
    except Exception as error:
        if "--debug" in words:
            raise
        text = str(error).splitlines()[0] if str(error) else ""
        click.echo(f"error: {type(error).__name__}: {text}; --debug shows the traceback", err=True)
        return 3


run = exit_code
"""The name that callers know; `main` does not use it, since loading the command `fedsec.cli.run` replaces it."""
