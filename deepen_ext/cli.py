"""The command line.

Exit codes: 0 done, 1 a model or the run failed, 2 wrong input, 130 interrupted, 141 closed pipe.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen_ext import __version__
from deepen_ext.errors import DeepenError, InputError

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.generation import Generation

# torch and transformers are imported inside the command only, so that --help answers at once.

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    help="Language models with different vocabularies write one text, fused at every token by DeePEn.",
)


class _Recipe(str, Enum):
    calibrated = "calibrated"
    bytes = "bytes"
    paper = "paper"


class _Dtype(str, Enum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class _WithoutTemplate(str, Enum):
    error = "error"
    plain = "plain"


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
    """Options of the program itself; `generate` has its own."""


@app.command()
def generate(
    model: Annotated[
        list[str] | None,
        typer.Option(
            "--model", "-m", help="Hub name, local folder or .gguf file; the main model first. Repeat it."
        ),
    ] = None,
    demo: Annotated[
        bool, typer.Option("--demo", help="The embedded pair: SmolLM2-135M-Instruct and Gemma-3-270M.")
    ] = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; by default standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Write at most so many tokens.")] = 128,
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", "-w", help="A member's weight, in order; they sum to 1. Repeat it."),
    ] = None,
    recipe: Annotated[
        _Recipe, typer.Option(help="How tokens are placed in the relative space.")
    ] = _Recipe.calibrated,
    learning_rate: Annotated[float, typer.Option(help="Of the inverse search.")] = 0.15,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens; by default the most probable is taken.")
    ] = False,
    temperature: Annotated[float | None, typer.Option(help="Of sampling; 1 by default.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the smallest set with this probability.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling: the same seed, the same text.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="End after this text. Repeat it.")] = None,
    chat: Annotated[
        bool,
        typer.Option(
            "--chat", help="The prompt is a user's message; each member reads its own chat template."
        ),
    ] = False,
    without_template: Annotated[
        _WithoutTemplate,
        typer.Option(help="In a chat, a member that has no chat template: an error, or a plain transcript."),
    ] = _WithoutTemplate.error,
    certified_skip: Annotated[
        bool,
        typer.Option(
            "--certified-skip",
            help="Ask the assistants only where they can change the token: same text, faster.",
        ),
    ] = False,
    confidence_gate: Annotated[
        float | None,
        typer.Option(help="Do not ask them where the main model is at least so sure (0 to 1). Not exact."),
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write a line of JSON for every token: what each member said.")
    ] = None,
    dtype: Annotated[
        list[_Dtype] | None,
        typer.Option(help="Of the models' weights: one for all, or one for each. float32 by default."),
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(help="Where the models run: one for all, or one for each. cpu by default."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Continue a text with two or more models together."""
    with _exit_codes(debug):
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        if given and not sample:
            raise InputError(f"--{next(iter(given)).replace('_', '-')} needs --sample")
        if demo == bool(model):
            raise InputError(
                "name the models with --model, two or more, or take the embedded pair with --demo"
            )
        text = _prompt(prompt)
        if certified_skip and sample:
            raise InputError("--certified-skip is for greedy decoding; with --sample use --confidence-gate")
        ensemble = _load(
            model,
            weights=weight or None,
            recipe=recipe.value,
            learning_rate=learning_rate,
            dtype=_one_or_more([one.value for one in dtype or []], "float32"),
            device=_one_or_more(device, "cpu"),
        )
        result = ensemble.generate(
            [{"role": "user", "content": text}] if chat else text,
            max_new_tokens=max_new_tokens,
            do_sample=sample,
            stop_strings=stop or None,
            certified_skip=certified_skip,
            confidence_gate=confidence_gate,
            trace=trace,
            without_template=without_template.value,
            on_text=None if as_json else _writer("" if chat else text),
            **given,
        )
        if as_json:
            _write(json.dumps(_report(ensemble, result)) + "\n")
        else:
            _write("\n")
            _summarise(ensemble, result)


def _one_or_more(values: list[str] | None, default: str) -> str | list[str]:
    """A repeated option: one value for all members, or a list for each."""
    return values if values and len(values) > 1 else values[0] if values else default


def _prompt(prompt: str | None) -> str:
    if prompt is None:
        if sys.stdin is None or sys.stdin.isatty():
            raise InputError('no prompt: give --prompt "some text", or pipe a text to standard input')
        try:
            prompt = sys.stdin.buffer.read().decode()
        except UnicodeDecodeError as error:
            raise InputError(f"standard input is not UTF-8 text: {error}") from error
        prompt = prompt.removesuffix("\n")  # what `echo` adds is no part of the text
    if not prompt:
        raise InputError("the prompt is empty; give some text to continue")
    return prompt


def _load(models: list[str] | None, **settings: Any) -> Ensemble:
    with _progress() as progress:
        progress("Starting")
        from deepen_ext import demo
        from deepen_ext.ensemble import Ensemble

        names: list[str] | list[Path] = models or demo.members(progress)
        return Ensemble.from_pretrained(names, progress=progress, **settings)


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """A moving bar on a terminal's standard error; elsewhere one line for each thing that takes long."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(message: str) -> None:
            stage = message.split(",")[0]  # without the counts
            if stage.startswith(("Downloading", "Converting", "Waiting")) and stage not in seen:
                seen.add(stage)
                print(stage, file=sys.stderr, flush=True)

        yield line
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda message: bars.update(task, description=message)


def _writer(prompt: str) -> Callable[[str], None]:
    """Text to standard output as it comes; on a terminal after the prompt, so that it reads on."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(prompt, style="dim", end="", markup=False, highlight=False, soft_wrap=True)
    return _write


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _report(ensemble: Ensemble, result: Generation) -> dict[str, Any]:
    """The JSON object; times in milliseconds, those per token without the step that reads the prompt."""
    timings, later = result.timings, max(result.timings.steps - 1, 1)
    return {
        "text": result.text,
        "tokens": len(result.token_ids),
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "changed_tokens": result.changed_tokens,
        "ms_per_token": round(timings.ms_per_token, 3),
        "fusion_ms_per_token": round(timings.fusion_ms_per_token, 3),
        "handoff_ms_per_token": round(timings.handoff_ms / later, 3),
        "prompt_ms": round(timings.prompt_ms, 3),
        "tokens_per_second": round(timings.tokens_per_second, 3),
        "skipped_share": round(timings.skipped_share, 4),
        "members": [
            {"name": name, "weight": weight, "ms_per_token": round(timings.members_ms[name] / later, 3)}
            for name, weight in zip(ensemble.names, ensemble.weights, strict=True)
        ],
        "recipe": ensemble.recipe,
        "rows_computed": ensemble.rows_computed,
    }


def _summarise(ensemble: Ensemble, result: Generation) -> None:
    from rich.console import Console

    main, *others = ensemble.names
    timings = result.timings
    line = (
        f"{len(result.token_ids)} tokens by {main}, {result.changed_tokens} of them changed by "
        f"{', '.join(others)}; {timings.ms_per_token:.1f} ms a token, {timings.fusion_ms_per_token:.2f} of "
        f"it fusion (ended by {result.finish_reason})"
        + (
            f"; {timings.skipped_share:.0%} of the tokens needed no assistant"
            if timings.skipped_share
            else ""
        )
    )
    Console(stderr=True).print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _exit_codes(debug: bool) -> Iterator[None]:
    """Turn what goes wrong into one message on standard error and an exit code."""

    def fail(message: str, code: int, error: BaseException) -> typer.Exit:
        if debug:
            traceback.print_exception(error)
        print(message, file=sys.stderr)
        return typer.Exit(code)

    if not debug:
        warnings.showwarning = _own_warnings
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal that cannot show a character must not end the text
    try:
        yield
    except KeyboardInterrupt as error:
        raise fail("\ninterrupted", 130, error) from None
    except BrokenPipeError as error:
        # The reader has gone, as in `| head`. Python would complain once more when it closes standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if debug:
            traceback.print_exception(error)
        raise typer.Exit(141) from None
    except InputError as error:
        raise fail(f"error: {error}", 2, error) from None
    except DeepenError as error:
        raise fail(f"error: {error}", 1, error) from None
    except Exception as error:
        message = f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)"
        raise fail(message, 1, error) from None


def _own_warnings(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Our warnings as one line; those of the libraries beneath are for developers (--debug)."""
    if Path(__file__).parent in Path(filename).parents:
        print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
    main()
