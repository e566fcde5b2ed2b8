"""`deepen-ext generate`: continue a text with two or more models together."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import exit_codes, plain, read_stdin, write
from deepen_ext.commands.load_options import Loading, with_load_options
from deepen_ext.commands.loading import check_recipe_used, load_ensemble, named_members
from deepen_ext.errors import InputError, MemberLost
from deepen_ext.ground.paths import check_apart, user_path

if TYPE_CHECKING:
    from deepen_ext.decoding.generation import Generation
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.fusers import Fuser

# torch and transformers are imported inside the command only, so that --help answers at once.


class WithoutTemplate(str, Enum):
    """What to do for a member without a chat template."""

    error = "error"
    plain = "plain"


@with_load_options
def generate(
    loading: Loading,
    model: options.Models = None,
    demo: options.Demo = False,
    prompt: Annotated[
        str | None, typer.Option("--prompt", "-p", help="Text to continue; by default standard input.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Write at most so many tokens.")] = 128,
    weight: options.Weights = None,
    fuser: options.FuserSpec = None,
    recipe: options.Recipes = None,
    learning_rate: options.LearningRate = None,
    on_failure: options.OnFailure = None,
    preset: options.Preset = None,
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
        WithoutTemplate,
        typer.Option(help="In a chat, a member that has no chat template: an error, or a plain transcript."),
    ] = WithoutTemplate.error,
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
    draft: Annotated[
        str | None,
        typer.Option(
            metavar="auto|N",
            help="Tokens written ahead and verified at once: same text, faster. 0 for none; auto for as many "
            "as pay, the default where every member is repeatable.",
        ),
    ] = None,
    drafter: Annotated[
        str, typer.Option(metavar="auto|main|lookup|NAME", help="Who writes ahead; NAME is a member's.")
    ] = "auto",
    trace: Annotated[
        Path | None, typer.Option(help="Write a line of JSON for every token: what each member said.")
    ] = None,
    as_json: options.AsJson = False,
    debug: options.Debug = False,
) -> None:
    """Continue a text with two or more models together."""
    with exit_codes(debug):
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        given = {name: value for name, value in sampling.items() if value is not None}
        if given and not sample:
            raise InputError(f"--{next(iter(given)).replace('_', '-')} needs --sample")
        named = named_members(model, demo, preset)  # before the prompt is read
        text = _prompt(prompt)
        if certified_skip and sample:
            raise InputError("--certified-skip is for greedy decoding; with --sample use --confidence-gate")
        check_recipe_used(named, [fuser], recipe, learning_rate)
        check_apart({"--trace": trace}, {"--preset": preset}, named.members)
        settings = {"do_sample": sample, **given}
        _check_before_loading(text, settings, stop, confidence_gate, draft, trace)
        fits = partial(_check_fuser, sampled=sample, certified_skip=certified_skip)
        chosen = (fuser, weight, recipe, learning_rate, on_failure)
        ensemble = load_ensemble(named, loading, *chosen, check=fits)
        tell = _tell_as_json if as_json else _tell
        try:
            result = ensemble.generate(
                [{"role": "user", "content": text}] if chat else text,
                max_new_tokens=max_new_tokens,
                stop_strings=stop or None,
                certified_skip=certified_skip,
                confidence_gate=confidence_gate,
                draft=draft,
                drafter=drafter,
                trace=trace,
                without_template=without_template.value,
                on_text=None if as_json else _writer("" if chat else text),
                **settings,
            )
        except MemberLost as lost:
            for written in lost.generations:
                tell(ensemble, written)
            raise
        tell(ensemble, result)


def _check_before_loading(
    text: str,
    settings: dict[str, Any],
    stop: list[str] | None,
    confidence_gate: float | None,
    draft: str | None,
    trace: Path | None,
) -> None:
    """What needs no model to be seen as wrong is said before minutes of loading.

    Raises:
        InputError: a prompt that is not UTF-8, a setting out of range, a trace that cannot be written there.
    """
    from deepen_ext.decoding.drafts.draft_settings import draft_length
    from deepen_ext.decoding.setting_rules import check_seed, check_values, stop_list
    from deepen_ext.decoding.skips import check_gate
    from deepen_ext.plots.output_file import check_place
    from deepen_ext.text.characters import check_characters

    check_characters(text)
    check_seed(settings.get("seed"))
    check_values({name: value for name, value in settings.items() if name != "seed"}, vocab_size=0)
    stop_list(stop)
    if confidence_gate is not None:
        check_gate(confidence_gate)
    if draft is not None:
        draft_length(draft)
    if trace is not None:
        place = user_path(trace)
        if not place.exists() or place.is_dir():  # a file that is there is written into
            check_place("--trace", place)


def _check_fuser(kind: type[Fuser], method: str, *, sampled: bool, certified_skip: bool) -> None:
    """Raise InputError for a fuser that cannot write such a text."""
    from deepen_ext.decoding.limits import check_sampling
    from deepen_ext.decoding.skips import check_certified_skip
    from deepen_ext.fusers import Fuser

    check_sampling(kind, method, sampled)
    if certified_skip:
        bounded = kind.search_bound is not Fuser.search_bound
        check_certified_skip(method, do_sample=sampled, bounded=bounded)


def _prompt(prompt: str | None) -> str:
    if prompt is None:
        prompt = read_stdin('no prompt: give --prompt "some text", or pipe a text to standard input')
        prompt = prompt.removesuffix("\n")  # what `echo` adds is no part of the text
    if not prompt:
        raise InputError("the prompt is empty; give some text to continue")
    return prompt


def _writer(prompt: str) -> Callable[[str], None]:
    """Text to standard output as it comes; on a terminal after the prompt, so that it reads on."""
    if sys.stdout.isatty():
        plain().print(prompt, style="dim", end="", soft_wrap=True)
    return write


def _tell(ensemble: Ensemble, result: Generation) -> None:
    """End the text, and say how it came about."""
    write("\n")
    _summarise(ensemble, result)


def _tell_as_json(ensemble: Ensemble, result: Generation) -> None:
    write(json.dumps(_report(ensemble, result)) + "\n")


def _report(ensemble: Ensemble, result: Generation) -> dict[str, Any]:
    """The JSON object; times in milliseconds, those per token without the step that reads the prompt."""
    timings, later = result.timings, result.timings.later_tokens

    def measured(value: float) -> float | None:
        """None for a text of one step, all of whose time is the prompt's: what a token takes is not known."""
        return round(value, 3) if timings.steps > 1 else None

    return {
        "text": result.text,
        "tokens": len(result.token_ids),
        "token_ids": result.token_ids,
        "finish_reason": result.finish_reason,
        "changed_tokens": result.changed_tokens,
        "lost": result.lost,
        "ms_per_token": measured(timings.ms_per_token),
        "fusion_ms_per_token": measured(timings.fusion_ms_per_token),
        "handoff_ms_per_token": measured(timings.handoff_ms / later),
        "prompt_ms": round(timings.prompt_ms, 3),
        "tokens_per_second": measured(timings.tokens_per_second),
        "skipped_share": round(timings.skipped_share, 4),
        "drafted_tokens": timings.drafted,
        "acceptance_rate": round(timings.acceptance, 4) if timings.drafted else None,
        "members": [
            # Where a rule finds the weights for each prompt, the ensemble's are not those of this text.
            {
                "name": name,
                "weight": None if ensemble.weighs_prompts else weight,
                "ms_per_token": measured(timings.members_ms[name] / later),
            }
            for name, weight in zip(ensemble.names, ensemble.weights, strict=True)
        ],
        "weights": ensemble.weights_or_rule,
        "fuser": ensemble.method,
        "recipe": ensemble.recipe if ensemble.fuser.uses_recipe else None,
        "backends": result.backends,
        "rows_computed": ensemble.rows_computed,
    }


def _summarise(ensemble: Ensemble, result: Generation) -> None:
    main, *others = ensemble.names
    timings = result.timings
    line = f"{len(result.token_ids)} tokens by {main}"
    if others:
        line += f", {result.changed_tokens} of them changed by {', '.join(others)}"
    if timings.steps > 1:
        line += f"; {timings.ms_per_token:.1f} ms a token, {timings.fusion_ms_per_token:.2f} of it fusion"
    line += f" (ended by {result.finish_reason})"
    if timings.skipped_share:
        line += f"; {timings.skipped_share:.0%} of the tokens needed no assistant"
    if timings.drafted:
        line += f"; {timings.acceptance:.0%} of {timings.drafted} drafted tokens stood"
    for name, position in result.lost.items():
        line += f"; without {name} from token {position} on"
    line += f"; run by {' and '.join(dict.fromkeys(result.backends))}"
    plain(stderr=True).print(line, style="dim", soft_wrap=True)
