"""What the commands share: options, loading an ensemble, progress, exit codes. No torch is imported here.

Exit codes: 0 done, 1 a model or the run failed, 2 wrong input, 130 interrupted, 141 closed pipe.
"""

from __future__ import annotations

import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen_ext.errors import DeepenError, InputError
from deepen_ext.space.recipes import DEFAULT_LEARNING_RATE, DEFAULT_RECIPE

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.presets import Preset as LoadedPreset

_ONE_WAY = (
    "name the models with --model, two or more, or take the embedded pair with --demo, or a --preset's: "
    "one of the three"
)


class RecipeName(str, Enum):
    """How tokens are placed in the relative space."""

    bytes = "bytes"
    calibrated = "calibrated"
    paper = "paper"


class Dtype(str, Enum):
    """Of the models' weights."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model", "-m", help="Hub name, local folder or .gguf file; the main model first. Repeat it."
    ),
]
Demo = Annotated[
    bool, typer.Option("--demo", help="The embedded pair: SmolLM2-135M-Instruct and Gemma-3-270M.")
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        "--weight",
        "-w",
        help="A member's weight, in order; they sum to 1. Repeat it. Or once: prompt, by how well each "
        "member reads the prompt.",
    ),
]
FuserSpec = Annotated[
    str | None,
    typer.Option(
        "--fuser",
        help="deepen (the default), average, union-topk, union-vocab, single, or module:function.",
        show_default=False,
    ),
]
FuserSpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--fuser",
        help="deepen, deepen:RECIPE, average, union-topk, union-vocab, or module:function. Repeat it to "
        "compare; deepen by default.",
        show_default=False,
    ),
]
Recipes = Annotated[
    RecipeName | None,
    typer.Option(
        "--recipe", help=f"How deepen places tokens in the relative space; {DEFAULT_RECIPE} by default."
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(help=f"Of deepen's inverse search; {DEFAULT_LEARNING_RATE} by default."),
]
Preset = Annotated[
    Path | None,
    typer.Option("--preset", help="A YAML file that `tune` wrote; options given here come before it."),
]
Dtypes = Annotated[
    list[Dtype] | None,
    typer.Option("--dtype", help="Of the models' weights: one for all, or one for each. float32 by default."),
]
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="Where the models run: one for all, or one for each. cpu by default."),
]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Run code that a model's folder or repository brings along. Without it such a model is refused.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def load_ensemble(
    models: list[str] | None,
    demo: bool,
    preset: Path | None = None,
    *,
    weights: list[str] | None = None,
    fuser: str | None = None,
    recipe: RecipeName | None = None,
    learning_rate: float | None = None,
    dtypes: list[Dtype] | None = None,
    devices: list[str] | None = None,
    trust_remote_code: bool = False,
) -> Ensemble:
    """The ensemble that the options ask for; None stands for what was not given.

    Raises:
        InputError: no models, or too many ways of naming them; a setting out of range.
        ModelError: a model cannot be loaded.
    """
    loaded = _read_preset(preset)
    names = member_names(models, demo, loaded)
    shares = read_weights(weights)
    with progress() as say:
        say("Starting")
        from deepen_ext.ensemble import Ensemble
        from deepen_ext.members import embedded
        from deepen_ext.presets import Preset as Settings

        settings = (loaded or Settings([], {})).settings(
            weights=shares,
            fuser=fuser,
            recipe=None if recipe is None else recipe.value,
            learning_rate=learning_rate,
        )
        return Ensemble.from_pretrained(
            names if names is not None else embedded.members(say),
            dtype=one_or_more([one.value for one in dtypes or []], "float32"),
            device=one_or_more(devices, "cpu"),
            trust_remote_code=trust_remote_code,
            progress=say,
            **settings,
        )


def _read_preset(path: Path | None) -> LoadedPreset | None:
    if path is None:
        return None
    from deepen_ext.presets import load_preset

    return load_preset(path)


def member_names(
    models: list[str] | None, demo: bool, preset: LoadedPreset | None = None
) -> Sequence[str | Path] | None:
    """The models to load, main model first; None for the embedded pair.

    Raises:
        InputError: none were named, or in more than one way.
    """
    if demo and (models or preset is not None):
        raise InputError(_ONE_WAY)
    if models:
        return models
    if demo:
        return None
    if preset is not None:
        return preset.members
    raise InputError(_ONE_WAY)


def read_weights(given: list[str] | None) -> list[float] | str | None:
    """The weights as `Ensemble` takes them.

    Raises:
        InputError: something that is no number.
    """
    if not given:
        return None
    if given == ["prompt"]:
        return "prompt"
    try:
        return [float(one) for one in given]
    except ValueError:
        raise InputError(
            f"--weight {' '.join(given)}: give a number for each member, or prompt once"
        ) from None


def one_or_more(values: list[str] | None, default: str) -> str | list[str]:
    """A repeated option: one value for all members, or a list for each."""
    return values if values and len(values) > 1 else values[0] if values else default


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
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


def check_output() -> None:
    """Raise InputError where the caller has closed standard output (`>&-`)."""
    if sys.stdout is None or sys.stdout.closed:
        raise InputError("standard output is closed; send it to a file, or to /dev/null")


def write(text: str) -> None:
    """To standard output, at once.

    Raises:
        InputError: standard output is closed.
    """
    check_output()
    sys.stdout.write(text)
    sys.stdout.flush()


@contextmanager
def exit_codes(debug: bool) -> Iterator[None]:
    """Turn what goes wrong into one message on standard error and an exit code."""

    def fail(message: str, code: int, error: BaseException) -> typer.Exit:
        if debug:
            traceback.print_exception(error)
        if sys.stderr is not None:
            print(message, file=sys.stderr)
        return typer.Exit(code)

    if not debug:
        warnings.showwarning = _own_warnings
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(
            errors="replace"
        )  # a terminal that cannot show a character must not end the text
    try:
        check_output()
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
    except typer.Exit:
        raise
    except Exception as error:
        message = f"error: {type(error).__name__}: {error} (unexpected; --debug shows where)"
        raise fail(message, 1, error) from None


def _own_warnings(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any
) -> None:
    """Our warnings as one line; those of the libraries beneath are for developers (--debug)."""
    if Path(__file__).parent.parent in Path(filename).parents:
        print(f"warning: {message}", file=sys.stderr)
