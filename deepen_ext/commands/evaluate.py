"""`deepen-ext eval`: ways of fusing two or more models on the paper's benchmarks, beside the models alone."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import LINE_SECONDS, exit_codes, plain, tables
from deepen_ext.commands.load_options import Loading, with_load_options
from deepen_ext.commands.loading import (
    check_fuses,
    check_likelihood,
    check_names_differ,
    check_recipe_used,
    ensemble_keywords,
    load_ensemble,
    named_members,
    ways_of_fusing,
    writes_alone,
)
from deepen_ext.errors import InputError
from deepen_ext.ground.paths import check_apart, user_path
from deepen_ext.measure.evaluation.choices import CHOICE_TASKS
from deepen_ext.measure.evaluation.tasks import TASKS
from deepen_ext.plots.output_file import check_output_file

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.measure.evaluation.jobs import Progress
    from deepen_ext.measure.evaluation.votes import Poll
    from deepen_ext.measure.evaluation.writers import Ensembles

_VOTE = "vote"  # a --fuser that is none: the models' own answers vote


class Split(str, Enum):
    """Of the data."""

    dev = "dev"
    test = "test"


class Scoring(str, Enum):
    """How an answer is found."""

    generation = "generation"
    likelihood = "likelihood"


@with_load_options
def evaluate(
    loading: Loading,
    task: Annotated[
        list[str],
        typer.Option(help=f"{', '.join(TASKS)}, or all of them: all. Repeat it."),
    ],
    data: Annotated[Path, typer.Option(help="The folder of the benchmarks, with a folder for each task.")],
    out: Annotated[
        Path,
        typer.Option("--json", help="Folder for the results: a line of JSON an item, and summary.json."),
    ],
    model: options.Models = None,
    demo: options.Demo = False,
    split: Annotated[Split, typer.Option(help="dev is for choosing settings, test for reporting.")] = (
        Split.test
    ),
    limit: Annotated[
        int | None, typer.Option(min=1, help="At most so many items a task, spread evenly; all by default.")
    ] = None,
    scoring: Annotated[
        Scoring,
        typer.Option(
            help="generation: the models write an answer. likelihood: the choice that is most probable to "
            f"them, as lm-evaluation-harness scores it, of {', '.join(CHOICE_TASKS)}."
        ),
    ] = Scoring.generation,
    fuser: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{options.FUSER_NAMES}, or module:function; or vote: the models' own answers vote. Repeat "
            "it to compare; by default each text follows the larger member, or one that reads its "
            "prompt far better.",
            show_default=False,
        ),
    ] = None,
    weight: options.Weights = None,
    recipe: options.Recipes = None,
    learning_rate: options.LearningRate = None,
    preset: options.Preset = None,
    singles: Annotated[
        bool, typer.Option("--singles/--no-singles", help="Each model alone too, to compare with.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Texts written side by side.")] = 16,
    votes: Annotated[
        int, typer.Option(min=1, help="Sampled texts an item, of which the majority's answer counts.")
    ] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="Of sampling, with --votes; 0.7 by default.", show_default=False)
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Of sampling, with --votes; 0.95 by default.", show_default=False)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Of sampling, with --votes; 0 by default.", show_default=False)
    ] = None,
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
    replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Whole ensembles in actors of Ray, which share the items; --placement says where.",
        ),
    ] = None,
    plot: options.Plot = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Drop the folder's results of these tasks first.")
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Score models together and alone on the paper's benchmarks, with intervals and paired comparisons.

    A run that was ended, however that happened, goes on where it ended when the same command is given again.
    """
    with exit_codes(debug):
        from deepen_ext.fusers import fuser_class
        from deepen_ext.measure.evaluation.jobs import prepare, tasks_of
        from deepen_ext.measure.evaluation.limits import check_fuser
        from deepen_ext.measure.evaluation.votes import Votes
        from deepen_ext.members.source import absolute_name

        polled = _VOTE in (fuser or [])
        if scoring is Scoring.likelihood:
            check_likelihood(fuser or [])
            if polled:
                raise InputError(
                    "--fuser vote: texts vote, and --scoring likelihood writes none; leave one out"
                )
        data, out = user_path(data), user_path(out)
        check_output_file("--plot", plot)
        if plot is not None and not singles:
            raise InputError("--plot: gains are over the models alone; leave out --no-singles")
        named = named_members(model, demo, preset)
        if plot is not None and len(named.members) == 1:
            raise InputError("--plot: a model alone has no gain to show; name two or more models")
        tasks = list(tasks_of(scoring.value)) if "all" in task else task
        drawn = Votes.read(votes, temperature, top_p, seed)
        prepare(
            tasks,
            data,
            split.value,
            limit,
            out,
            scoring=scoring.value,
            votes=drawn,
            certified_skip=certified_skip,
            fresh=fresh,
        )
        if polled and not singles:
            raise InputError("--fuser vote: the models' own answers vote; leave out --no-singles")
        only_polled = polled and fuser == [_VOTE]
        fuser = [one for one in fuser or [] if one != _VOTE]
        check_apart({"--plot": plot}, {"--preset": preset}, named.members)
        if any(map(writes_alone, fuser)):
            raise InputError("--fuser single: each model runs alone anyway; name a way of fusing them")
        check_recipe_used(named, fuser, recipe, learning_rate)
        fused = ways_of_fusing(named, fuser, recipe)
        alone = len(named.members) == 1 and not fuser and not polled
        if alone and not singles:
            raise InputError("--no-singles leaves nothing of one model; leave it out, or name two or more")
        if not alone:
            check_fuses(fused)
        first = "single" if alone else next(iter(fuser), "follow" if polled else None)  # voters as named
        fused = [] if alone or only_polled else fused
        for kind in (fuser_class(one["fuser"]) for one in fused if one["fuser"] != "auto"):
            check_fuser(kind, scoring is Scoring.likelihood, drawn)
        configurations = partial(_configurations, fused=fused, singles=singles, polled=polled)
        ensembles: Ensembles | Callable[[], Ensembles]
        whole = options.OnFailureName.stop  # whatever a preset says: what is measured is the whole ensemble
        chosen = (first, weight, recipe, learning_rate, whole)
        placement = None
        if replicas is None:
            ensembles = configurations(load_ensemble(named, loading, *chosen))
        else:
            keywords = ensemble_keywords(named, loading, *chosen)
            if isinstance(placement := keywords.pop("placement", None), list):
                raise InputError("--placement: with --replicas it says where each replica goes; give it once")
            ensembles = partial(_in_replica, [*map(absolute_name, named.members)], keywords, configurations)

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
                    scoring=scoring.value,
                    batch_size=batch_size,
                    certified_skip=certified_skip,
                    share_forwards=share_forwards,
                    votes=votes,
                    temperature=temperature,
                    top_p=top_p,
                    seed=seed,
                    fresh=fresh,
                    replicas=replicas,
                    placement=placement,
                    on_progress=show,
                    on_line=lambda line: print(line, file=sys.stderr, flush=True),
                )
        except KeyboardInterrupt:
            same = "the same command without --fresh" if fresh else "the same command"
            print(f"\nwhat is done is kept in {out}; {same} goes on from there", file=sys.stderr)
            raise

        tables(160).print(summary_table(summary))
        if plot is not None:
            from deepen_ext.plots.evaluation import gains_plot

            gains_plot(summary).save(plot)
        print(f"written to {out / 'summary.json'}", file=sys.stderr)


def _configurations(
    base: Ensemble, fused: list[dict[str, Any]], singles: bool, polled: bool
) -> dict[str, Ensemble | Poll]:
    """By name: the members alone, then each way of fusing them, then the vote."""
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.measure.evaluation.votes import Poll

    named = zip(base.names, base.members, strict=True) if singles else ()
    found: dict[str, Ensemble | Poll] = {name: Ensemble([member], fuser="single") for name, member in named}
    variants = [base.variant(**settings) for settings in fused]
    methods = [one.method for one in variants]  # "auto" has a name now
    check_names_differ([*found, *methods, *([_VOTE] if polled else [])])
    found |= zip(methods, variants, strict=True)
    if polled:
        found[_VOTE] = Poll(tuple(base.names))
    return found


def _in_replica(
    members: list[str], keywords: dict[str, Any], configurations: Callable[[Ensemble], Ensembles]
) -> Ensembles:
    """What each replica loads."""
    from deepen_ext.ensemble import Ensemble

    return configurations(Ensemble.from_pretrained(members, **keywords))


@contextmanager
def _progress() -> Iterator[Callable[[Progress], None]]:
    """A bar on a terminal's standard error; elsewhere a plain line now and then."""
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn
    from rich.progress import Progress as Bars

    console = plain(stderr=True)
    if not console.is_terminal:
        last = -LINE_SECONDS

        def line(one: Progress) -> None:
            nonlocal last
            finished = one.done == one.records and bool(one.configuration)
            if finished or monotonic() - last >= LINE_SECONDS:
                last = monotonic()
                print(f"{_describe(one)}, {one.share:.0%} of all", file=sys.stderr, flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn())
    with Bars(*columns, console=console, transient=True) as bars:
        bar = bars.add_task("", total=1.0)
        yield lambda one: bars.update(bar, description=_describe(one), completed=one.share)


def _describe(one: Progress) -> str:
    which = f" (task {one.number} of {one.tasks})" if one.tasks > 1 else ""
    left = "" if one.seconds_left is None else f", about {_duration(one.seconds_left)} left"
    return f"{one.task}{which}: {one.done} of {one.records} answers{left}"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 90 else f"{minutes} min"
