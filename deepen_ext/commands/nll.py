"""`deepen-ext nll`: how probable a text is to an ensemble, and to each member alone."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import exit_codes, plain, progress, read_stdin, write
from deepen_ext.commands.load_options import Loading, with_load_options
from deepen_ext.commands.loading import (
    check_fuses,
    check_likelihood,
    check_names_differ,
    check_recipe_used,
    load_ensemble,
    named_members,
    ways_of_fusing,
    writes_alone,
)
from deepen_ext.errors import InputError
from deepen_ext.ground.paths import check_apart, user_path
from deepen_ext.measure.likelihood.text_pieces import CONTEXT, PIECE, pieces
from deepen_ext.plots.output_file import check_output_file

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.measure.likelihood.scoring import Scores
    from deepen_ext.measure.likelihood.token_likelihoods import Difference, Estimate, Score

# torch and transformers are imported inside the command only, so that --help answers at once.


@with_load_options
def nll(
    loading: Loading,
    text: Annotated[str, typer.Option("--text", help="A UTF-8 text file, or - for standard input.")],
    model: options.Models = None,
    demo: options.Demo = False,
    fuser: options.FuserSpecs = None,
    weight: options.Weights = None,
    recipe: options.Recipes = None,
    learning_rate: options.LearningRate = None,
    preset: options.Preset = None,
    piece: Annotated[
        int, typer.Option(min=1, help="The text is read in pieces of at most so many characters.")
    ] = PIECE,
    context: Annotated[
        int, typer.Option(min=0, help="Each after at most so many of the characters before it.")
    ] = CONTEXT,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Measure the negative log-likelihood of a text: each member alone, and fused.

    Nats a token are for each one's own tokens; bits a byte can be compared. Errors are standard errors
    between blocks of 128 bytes, and differences are taken in pairs of blocks.
    """
    with exit_codes(debug):
        named = named_members(model, demo, preset)  # before the text is waited for
        if any(map(writes_alone, fuser or [])):
            raise InputError("every member alone is measured anyway; leave --fuser single out")
        check_likelihood(fuser or [])
        check_output_file("--plot", plot)
        check_apart({"--plot": plot}, {"--text": text, "--preset": preset}, named.members)
        cut = pieces(_read(text), length=piece, context=context)
        specs = list(dict.fromkeys(fuser or []))
        check_recipe_used(named, specs, recipe, learning_rate)
        ways = ways_of_fusing(named, specs, recipe)
        check_fuses(ways)
        base = load_ensemble(named, loading, specs[0] if specs else None, weight, recipe, learning_rate)
        with progress() as say:
            from deepen_ext.measure.likelihood.scoring import score_texts

            variants = [base.variant(**settings) for settings in ways]
            check_names_differ([*base.names, *(one.method for one in variants)])  # "auto" has a name now
            ensembles = {one.method: one for one in variants}
            scores = score_texts(cut, ensembles, progress=say)
        if plot is not None:
            from deepen_ext.plots.likelihood import likelihood_plot

            likelihood_plot(scores, list(ensembles)).save(plot)
        if as_json:
            report = _report(scores, ensembles)
            about = {"file": text, "pieces": len(cut), "piece": piece, "context": context}
            write(json.dumps({"text": about, **report}, ensure_ascii=False, allow_nan=False) + "\n")
        else:
            show(scores, list(ensembles))


def _read(file: str) -> str:
    """Raises InputError for what is not there, or is not UTF-8 text."""
    if file == "-":
        return read_stdin("no text: pipe one to standard input, or name a file with --text")
    try:
        return user_path(file).read_bytes().decode()
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}; name a text file with --text") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from error


def _report(scores: Scores, ensembles: dict[str, Ensemble]) -> dict[str, Any]:
    """The JSON object; what is not finite is null, and `impossible` then says why."""
    one = next(iter(ensembles.values()))
    backends = dict(zip(one.names, one.backends, strict=True))
    return {
        "main": scores.main,
        "best_single": scores.best_single,
        "members": [
            {"name": name, "backend": backends[name], **_facts(scores.score(name))} for name in scores.alone
        ],
        "fused": [
            {
                "method": name,
                "weights": one.weights_or_rule,
                **_facts(scores.score(name)),
                "against_main": _estimates(scores.against(name, scores.main)),
                "against_best_single": _estimates(scores.against(name, scores.best_single)),
            }
            for name, one in ensembles.items()
        ],
    }


def _facts(score: Score) -> dict[str, Any]:
    return {
        "tokens": score.tokens,
        "bytes": score.nbytes,
        "impossible": score.impossible,
        "greedy_share": score.greedy,
        **_estimates(score),
    }


def _estimates(of: Score | Difference) -> dict[str, Any]:
    found = {"nats_per_token": of.nats_per_token, "bits_per_byte": of.bits_per_byte}
    return {
        name: {"value": one.value if math.isfinite(one.value) else None, "standard_error": one.error}
        for name, one in found.items()
    }


def show(scores: Scores, methods: Sequence[str]) -> None:
    """Two tables: everyone by itself, and what fusing gains over the main model and the best member."""
    from rich.table import Table

    def table(*titles: str) -> Table:
        made = Table(box=None, pad_edge=False)
        for i, title in enumerate(titles):
            made.add_column(title, justify="right" if i else "left", overflow="fold")
        return made

    absolute = table("", "tokens", "nats a token", "bits a byte")
    for name in (*scores.alone, *methods):
        score = scores.score(name)
        absolute.add_row(
            name, f"{score.tokens:,}", _text(score.nats_per_token, ".3f"), _text(score.bits_per_byte, ".4f")
        )
    singles = list(dict.fromkeys([scores.main, scores.best_single]))
    relative = table("bits a byte, less those of", *singles)
    for name in methods:
        relative.add_row(
            name, *(_text(scores.against(name, single).bits_per_byte, "+.4f") for single in singles)
        )
    best = "the main model is" if scores.best_single == scores.main else f"{scores.best_single} is"
    every = [scores.score(name) for name in (*scores.alone, *methods)]
    errors = (
        "No standard errors: they take two blocks of 128 bytes, and no token of probability 0."
        if all(one.bits_per_byte.error is None for one in every)
        else "±: standard error between blocks, of differences in pairs of blocks."
    )
    console = plain()
    console.print(absolute, "", relative, sep="\n")
    console.print(
        f"\n{every[0].nbytes:,} bytes. Below 0 fusing is better; of the members alone {best} the best. "
        f"{errors}",
        style="dim",
    )


def _text(one: Estimate, form: str) -> str:
    return f"{one.value:{form}}" + (f" ± {one.error:{form.lstrip('+')}}" if one.error is not None else "")
