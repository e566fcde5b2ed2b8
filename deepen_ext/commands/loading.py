"""From options to members and ensembles. torch is imported where a model is needed, not before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from deepen_ext.commands.console import progress
from deepen_ext.commands.load_options import Loading
from deepen_ext.commands.options import OnFailureName, RecipeName
from deepen_ext.errors import InputError
from deepen_ext.ground.collector import without_collector
from deepen_ext.members.from_text import DEMO_PAIR

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble
    from deepen_ext.fusers import Fuser
    from deepen_ext.presets import Preset

_ONE_WAY = (
    "name the models with --model, two or more, or with a --preset, or with both; or take the embedded pair "
    "with --demo alone"
)


class Named(NamedTuple):
    """The models that the options name, in their order; and the preset, where they name one."""

    members: Sequence[str]
    preset: Preset | None


def named_members(models: list[str] | None, demo: bool, preset: Path | None = None) -> Named:
    """What --model, --demo and --preset name; nothing is loaded.

    Raises:
        InputError: no models, or more than one way of naming them; a preset that cannot be read.
    """
    loaded = None
    if preset is not None:
        from deepen_ext.presets import load_preset

        loaded = load_preset(preset)
    if demo and (models or preset is not None):
        raise InputError(_ONE_WAY)
    members = models or (list(DEMO_PAIR) if demo else loaded.members if loaded is not None else None)
    if members is None:
        raise InputError(_ONE_WAY)
    return Named(members, loaded)


def ensemble_keywords(
    named: Named,
    loading: Loading,
    fuser: str | None,
    weights: list[str] | None,
    recipe: RecipeName | None,
    learning_rate: float | None,
    on_failure: OnFailureName | None = None,
) -> dict[str, Any]:
    """What `Ensemble.from_pretrained` takes beside the models, as the options ask for it.

    Args:
        named: see `named_members`.
        loading: the options of loading. They count more than the preset's, which are for its own members.
        fuser: --fuser; None, as below, where the option is not given: the preset's counts, or the default.
        weights: --weight.
        recipe: --recipe.
        learning_rate: --learning-rate.
        on_failure: --on-failure, of a command that writes texts for users.

    Raises:
        InputError: a setting out of range.
    """
    given = {
        "weights": _read_weights(weights),
        "fuser": fuser,
        "learning_rate": learning_rate,
        "on_failure": None if on_failure is None else on_failure.value,
    }
    settings = _settings(named.preset, recipe=recipe, **given)
    options = loading.options()
    if named.preset is not None and named.members is named.preset.members:
        options = named.preset.load_options(**options)
    return options | settings


def load_ensemble(
    named: Named, *options: Any, check: Callable[[type[Fuser], str], None] | None = None
) -> Ensemble:
    """The ensemble that the options ask for; they are those of `ensemble_keywords`.

    Args:
        named: see `named_members`.
        options: the rest of what `ensemble_keywords` takes.
        check: before anything is loaded, looks at the fuser's class and name. Not called for "auto", which
            stands for fusers that can write every text.

    Raises:
        InputError: a setting out of range; or `check` raises it.
        ModelError: a model cannot be loaded.
    """
    with progress() as say, without_collector():
        say("Starting")
        from deepen_ext.ensemble import Ensemble
        from deepen_ext.fusers import FusionSettings, fuser_class, method_name

        keywords = ensemble_keywords(named, *options)
        fuser, recipe = (keywords.get(key, getattr(FusionSettings, key)) for key in ("fuser", "recipe"))
        if check is not None and fuser != "auto":
            check(fuser_class(fuser), method_name(fuser, recipe))
        return Ensemble.from_pretrained(named.members, progress=say, **keywords)


def load_ensembles(asked: Mapping[str, tuple[Named, dict[str, Any]]]) -> dict[str, Ensemble]:
    """Several ensembles; members that are the same, loaded in the same way, are there once.

    Args:
        asked: by the ensemble's name, its members and what `ensemble_keywords` gives.

    Raises:
        InputError: a setting out of range.
        ModelError: a model cannot be loaded.
    """
    with progress() as say, without_collector():
        say("Starting")
        from deepen_ext.decoding.make_team import main_first
        from deepen_ext.ensemble import Ensemble, check_ensemble
        from deepen_ext.members.load_options import LOAD_OPTIONS, LoadOptions, options_of_each
        from deepen_ext.members.loading import load_members

        fusing = {
            name: {key: value for key, value in keywords.items() if key not in LOAD_OPTIONS}
            for name, (_, keywords) in asked.items()
        }
        for ensemble, (named, _) in asked.items():
            check_ensemble(named.members, fusing[ensemble])
        plans: dict[str, list[str]] = {}
        wanted: dict[str, tuple[str, LoadOptions]] = {}
        for ensemble, (named, keywords) in asked.items():
            loading = {key: keywords[key] for key in LOAD_OPTIONS if key in keywords}
            each = options_of_each(named.members, **loading)
            same = [f"{name} {own}" for name, own in zip(named.members, each, strict=True)]
            plans[ensemble] = same
            wanted |= dict(zip(same, zip(named.members, each, strict=True), strict=True))
        given = [own.given() for _, own in wanted.values()]
        options = {
            key: [one.get(key, False if key == "trust_remote_code" else None) for one in given]
            for key in {key for one in given for key in one}
        }
        loaded = load_members([name for name, _ in wanted.values()], progress=say, **options)
        members = dict(zip(wanted, loaded, strict=True))
        say("Matching vocabularies")
        return {
            name: Ensemble(main_first([members[one] for one in plan], fusing[name]), **fusing[name])
            for name, plan in plans.items()
        }


def ways_of_fusing(
    named: Named, fusers: Sequence[str | None] | None, recipe: RecipeName | None
) -> list[dict[str, Any]]:
    """What each --fuser sets of an ensemble; where none is given, the preset's or the default.

    Raises:
        InputError: a fuser that there is not; two that results would call by one name; "auto" beside others.
    """
    from deepen_ext.fusers import FusionSettings, method_name

    if len(fusers or ()) > 1 and "auto" in (fusers or ()):
        raise InputError(
            "--fuser auto beside others: by default the main model may be another one than the first; run it "
            "by itself, or name follow, which is its fuser with the models in their order"
        )
    defaults = {key: getattr(FusionSettings, key) for key in ("fuser", "recipe", "relative_temperature")}
    ways = [_settings(named.preset, fuser=fuser, recipe=recipe) for fuser in fusers or [None]]
    ways = [{key: own.get(key, default) for key, default in defaults.items()} for own in ways]
    check_names_differ(
        one["fuser"] if one["fuser"] == "auto" else method_name(one["fuser"], one["recipe"]) for one in ways
    )
    return ways


def check_recipe_used(
    named: Named,
    fusers: Sequence[str | None] | None,
    recipe: RecipeName | None,
    learning_rate: float | None,
) -> None:
    """That --recipe and --learning-rate, where they are given, change what one of the fusers does.

    Raises:
        InputError: none of the fusers has a search.
    """
    given = {"--recipe": recipe, "--learning-rate": learning_rate}
    if not (options := [name for name, value in given.items() if value is not None]):
        return
    from deepen_ext.fusers import fuser_class, method_name

    ways = ways_of_fusing(named, fusers, recipe)
    if not any(one["fuser"] == "auto" or fuser_class(one["fuser"]).uses_recipe for one in ways):
        methods = " and ".join(method_name(one["fuser"], one["recipe"]) for one in ways)
        raise InputError(
            f"{' and '.join(options)}: of the search, which {methods} does without; leave it out, or name "
            "--fuser deepen or follow"
        )


def check_names_differ(methods: Iterable[str]) -> None:
    """That results can tell fusers and models apart.

    Raises:
        InputError: two are called alike.
    """
    counts = Counter(methods)
    if twice := [name for name, count in counts.items() if count > 1]:
        raise InputError(
            f"two of the fusers, or a fuser and a model, are called {twice[0]}; name each once, and give "
            "functions and models' folders names of their own"
        )


def writes_alone(fuser: str) -> bool:
    """Whether a --fuser is the main model alone."""
    from deepen_ext.fusers import FUSERS

    return fuser in FUSERS and FUSERS[fuser].fewest_members == 1


def check_fuses(ways: Sequence[Mapping[str, Any]]) -> None:
    """That no way of fusing beside the models alone is the main model alone: a preset may say so.

    Raises:
        InputError: one is; the other models would not be measured.
    """
    if any(isinstance(one["fuser"], str) and writes_alone(one["fuser"]) for one in ways):
        raise InputError(
            "the preset's fuser is single, the main model alone, and every model is measured alone anyway; "
            "give --fuser with a way of fusing them"
        )


def check_likelihood(fusers: Sequence[str]) -> None:
    """That each --fuser gives a likelihood, before models are loaded.

    Raises:
        InputError: one chooses whole words.
    """
    from deepen_ext.fusers.spans import NO_DISTRIBUTION, SpansFuser

    if SpansFuser.name in fusers:
        raise InputError(NO_DISTRIBUTION)


def _settings(preset: Preset | None, *, recipe: RecipeName | None, **options: Any) -> dict[str, Any]:
    from deepen_ext.presets import Preset

    named = None if recipe is None else recipe.value
    return (preset or Preset([])).settings(recipe=named, **options)


def _read_weights(given: list[str] | None) -> list[float] | str | None:
    """The weights as `Ensemble` takes them.

    Raises:
        InputError: something that is no number.
    """
    from deepen_ext.fusers.weights import WEIGHTS_RULES

    if not given:
        return None
    if given[0] in WEIGHTS_RULES and len(given) == 1:
        return given[0]
    try:
        return [float(one) for one in given]
    except ValueError:
        raise InputError(
            f"--weight {' '.join(given)}: give a number for each member, or size or prompt once"
        ) from None
