"""`deepen-ext eval`: ways of fusing two or more models on the paper's benchmarks, beside the models alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen_ext.commands.options import (
    Debug,
    Demo,
    Devices,
    Dtypes,
    FuserSpecs,
    LearningRate,
    Models,
    Preset,
    RecipeName,
    Recipes,
    TrustRemoteCode,
    Weights,
    exit_codes,
    load_ensemble,
)
from deepen_ext.errors import InputError
from deepen_ext.space.recipes import DEFAULT_RECIPE

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.measure.evaluation.jobs import Progress

_LINE_SECONDS = 30.0  # between two lines where there is no terminal


class Split(str, Enum):
    """Of the data."""

    dev = "dev"
    test = "test"


def evaluate(
    task: Annotated[
        list[str],
        typer.Option(help="gsm8k, arc_challenge, piqa, mmlu, triviaqa, nq, or all of them: all. Repeat it."),
    ],
    data: Annotated[Path, typer.Option(help="The folder of the benchmarks, with a folder for each task.")],
    out: Annotated[
        Path,
        typer.Option("--json", help="Folder for the results: a line of JSON an item, and summary.json."),
    ],
    model: Models = None,
    demo: Demo = False,
    split: Annotated[Split, typer.Option(help="dev is for choosing settings, test for reporting.")] = (
        Split.test
    ),
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many items a task, spread evenly; all by default.")
    ] = None,
    fuser: FuserSpecs = None,
    weight: Weights = None,
    recipe: Recipes = None,
    learning_rate: LearningRate = None,
    preset: Preset = None,
    singles: Annotated[
        bool, typer.Option("--singles/--no-singles", help="Each model alone too, to compare with.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts written side by side.")] = 16,
    certified_skip: Annotated[
        bool,
        typer.Option(
            "--certified-skip", help="Of deepen: ask the assistants only where they can change the token."
        ),
    ] = False,
    share_forwards: Annotated[
        bool,
        typer.Option(
            "--share-forwards/--no-share-forwards",
            help="Read a prompt once for all fusers. Without it slower, but the times can be compared.",
        ),
    ] = True,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop the folder's results of these tasks first.")
    ] = False,
    dtype: Dtypes = None,
    device: Devices = None,
    trust_remote_code: TrustRemoteCode = False,
    debug: Debug = False,
) -> None:
    """Score models together and alone on the paper's benchmarks, with intervals and paired comparisons.

    A run that was ended, however that happened, goes on where it ended when the same command is given again.
    """
    with exit_codes(debug):
        from deepen_ext.measure.evaluation.jobs import prepare
        from deepen_ext.measure.evaluation.tasks import TASKS

        tasks = list(TASKS) if "all" in task else task
        prepare(tasks, data, split.value, limit, out, fresh=fresh)
        fused = _fuser_settings(fuser, recipe, preset)
        alone = model is not None and len(model) == 1 and not fuser
        base = load_ensemble(
            model,
            demo,
            preset,
            weights=weight,
            fuser="single" if alone else next(iter(fuser or []), None),
            recipe=recipe,
            learning_rate=learning_rate,
            dtypes=dtype,
            devices=device,
            trust_remote_code=trust_remote_code,
        )
        ensembles = _configurations(base, fused if not alone else [], singles)

        from deepen_ext.measure.evaluation.runner import evaluate as run
        from deepen_ext.measure.evaluation.summary_table import summary_table

        try:
            with _progress() as show:
                summary = run(
                    ensembles,
                    tasks,
                    data,
                    out=out,
                    split=split.value,
                    limit=limit,
                    batch_size=batch_size,
                    certified_skip=certified_skip,
                    share_forwards=share_forwards,
                    fresh=fresh,
                    on_progress=show,
                )
        except KeyboardInterrupt:
            same = "the same command without --fresh" if fresh else "the same command"
            print(f"\nwhat is done is kept in {out}; {same} goes on from there", file=sys.stderr)
            raise

        from rich.console import Console

        wide = None if sys.stdout.isatty() else 160  # a file or a pipe has no width
        Console(width=wide, highlight=False).print(summary_table(summary))
        print(f"written to {out / 'summary.json'}", file=sys.stderr)


def _fuser_settings(
    specs: list[str] | None, recipe: RecipeName | None, preset: Path | None
) -> list[dict[str, Any]]:
    """What each fuser sets of an ensemble; before minutes of loading.

    Raises:
        InputError: a fuser that there is not.
    """
    from deepen_ext.presets import Preset as Loaded
    from deepen_ext.presets import load_preset

    loaded = load_preset(preset) if preset is not None else Loaded([])
    defaults = {"fuser": "deepen", "recipe": DEFAULT_RECIPE, "relative_temperature": None}
    found = []
    given: list[str | None] = [*specs] if specs else [None]
    for spec in given:
        if spec == "single":
            raise InputError("--fuser single: each model runs alone anyway; name a way of fusing them")
        own = loaded.settings(fuser=spec, recipe=recipe.value if recipe is not None else None)
        found.append({key: own.get(key, default) for key, default in defaults.items()})
    return found


def _configurations(base: Ensemble, fused: list[dict[str, Any]], singles: bool) -> dict[str, Ensemble]:
    """By name: the members alone, then each way of fusing them."""
    from deepen_ext.ensemble import Ensemble

    found: dict[str, Ensemble] = {}
    if singles:
        for name, member in zip(base.names, base.members, strict=True):
            found[name] = Ensemble([member], fuser="single")
    for settings in fused:
        one = base.variant(**settings)
        if one.method in found:
            raise InputError(f"two of the fusers are called {one.method}; name each once")
        found[one.method] = one
    return found


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal's standard error; elsewhere a plain line now and then."""
    from rich.console import Console
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0)
        yield lambda one: bars.update(bar, description=_describe(one), completed=one.share)


def _lines() -> Callable[[Progress], None]:
    last = -_LINE_SECONDS

    def line(one: Progress) -> None:
        nonlocal last
        finished = one.done == one.records and bool(one.configuration)
        if finished or monotonic() - last >= _LINE_SECONDS:
            last = monotonic()
            print(f"{_describe(one)}, {one.share:.0%} of all", file=sys.stderr, flush=True)

    return line


def _describe(one: Progress) -> str:
    place = f" (task {one.number} of {one.tasks})" if one.tasks > 1 else ""
    left = "" if one.seconds_left is None else f", about {_duration(one.seconds_left)} left"
    return f"{one.task}{place}: {one.done} of {one.records} answers{left}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 90 else f"{minutes} min"
