"""Options that several commands have. No torch is imported here, so that --help answers at once."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from deepen_ext.space.recipes import DEFAULT_LEARNING_RATE, DEFAULT_RECIPE


class OnFailureName(str, Enum):
    """What is done when an assistant is lost while a text is written."""

    stop = "stop"
    go_on = "continue"


class RecipeName(str, Enum):
    """How tokens are placed in the relative space."""

    bytes = "bytes"
    calibrated = "calibrated"
    paper = "paper"


Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        "-m",
        help="Hub name, local folder, .gguf file, demo:NAME or a server's http://host:port; with an adapter "
        "BASE@ADAPTER. Repeat it. The first is the main model, or by default one of at least twice its size.",
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
        help="A member's weight, in order; they sum to 1. Repeat it. Or once: size, by how large each "
        "member is and how well it reads the prompt; prompt, by the latter alone.",
    ),
]
# The names in `deepen_ext.fusers.FUSERS`, whose import would load torch; "single" fuses nothing.
_TUNABLE_NAMES = "deepen, deepen:RECIPE, average, union-topk, union-vocab, follow, product, consistent"
FUSER_NAMES = f"{_TUNABLE_NAMES}, draw (with sampling), spans"
FuserSpec = Annotated[
    str | None,
    typer.Option(
        "--fuser",
        help="auto (the default): each text follows the larger member, or one that reads its prompt far "
        f"better. Or {FUSER_NAMES}, single, or module:function.",
        show_default=False,
    ),
]
TunedFuser = Annotated[
    str | None,
    typer.Option(
        "--fuser",
        help=f"Whose settings are chosen; deepen if none is named: {_TUNABLE_NAMES}, or module:function.",
        show_default=False,
    ),
]
FuserSpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--fuser",
        help=f"{_TUNABLE_NAMES}, draw, or module:function. Repeat it to compare; by default "
        "each text follows the larger member, or one that reads its prompt far better.",
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
OnFailure = Annotated[
    OnFailureName | None,
    typer.Option(
        "--on-failure",
        help="When an assistant's server or actor is lost: stop (the default), or continue without it.",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object at the end instead of the text.")]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", help="Also write a picture: a .svg, .png or .pdf file.", show_default=False),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
