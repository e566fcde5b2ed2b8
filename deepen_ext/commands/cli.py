"""The command line: `deepen-ext COMMAND`. Each command is a file of `deepen_ext/commands/`."""

from __future__ import annotations

from typing import Annotated

import typer

from deepen_ext import __version__
from deepen_ext.commands.doctor import doctor
from deepen_ext.commands.evaluate import evaluate
from deepen_ext.commands.generate import generate
from deepen_ext.commands.lm_eval import CONTEXT, lm_eval
from deepen_ext.commands.nll import nll
from deepen_ext.commands.serve import serve
from deepen_ext.commands.trace import trace
from deepen_ext.commands.tune import tune

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Language models with different vocabularies write one text, fused at every token by DeePEn.",
)
app.command()(generate)
app.command()(doctor)
app.command()(nll)
app.command("eval")(evaluate)
app.command()(tune)
app.command()(serve)
app.command()(trace)
app.command("lm-eval", context_settings=CONTEXT)(lm_eval)


def main() -> None:
    """Entry point of `deepen-ext`."""
    app()


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"deepen-ext {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit."),
    ] = False,
) -> None:
    """Options of the program itself; each command has its own."""


if __name__ == "__main__":
    main()
