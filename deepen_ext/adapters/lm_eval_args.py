"""The harness's `model_args` as an ensemble."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from deepen_ext.decoding.team import require_stop
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.fusers import FusionSettings
from deepen_ext.fusers.weights import WEIGHTS_RULES
from deepen_ext.ground.numbers import true_or_false
from deepen_ext.members.from_text import DEMO_PAIR, option_from_text
from deepen_ext.members.load_options import LOAD_OPTIONS
from deepen_ext.presets import Preset, load_preset

SEPARATOR = "|"  # neither the harness's parser nor a hub name knows it, and hardly a path

_WHOLE = "answers of a smaller ensemble would count as this one's"

log = logging.getLogger("lm_eval.deepen_ext")  # shown as the harness shows its own lines


def ensemble_from(
    pretrained: str | Sequence[str] | Ensemble | None, arguments: Mapping[str, Any]
) -> Ensemble:
    """Load what `model_args` ask for.

    Lists come as lists (JSON, YAML, Python) or as text with `|` between the parts, since the harness's
    own parser splits at commas.

    Args:
        pretrained: the members, as `Ensemble.from_pretrained` takes them, or an ensemble, which is returned.
        arguments: `demo` (the embedded pair) or `preset` (a YAML file) instead of `pretrained`; the options
            of loading (`LoadOptions`: backend, device, dtype, ...), one for all or one for each; and the
            settings of `Ensemble`. What is given counts more than the preset. `fuser` is a name as on the
            command line.

    Raises:
        InputError: an unknown argument, none or two of the ways to name members, a value out of range,
            on_failure="continue", a model that is not there.
        ModelError: a model cannot be loaded.
    """
    given = {name: value for name, value in arguments.items() if value is not None}
    settings = {one.name for one in fields(FusionSettings)}
    known = {"demo", "preset", *LOAD_OPTIONS, *settings}
    if unknown := sorted(given.keys() - known):
        raise InputError(
            f"model_args: there is no {', '.join(unknown)}; there are pretrained, batch_size, max_gen_toks, "
            f"piece, context, without_template, {', '.join(sorted(known))}"
        )
    demo, preset_file = given.pop("demo", False), given.pop("preset", None)
    true_or_false("model_args: demo", demo)
    if sum([pretrained is not None, demo, preset_file is not None]) != 1:
        raise InputError(
            "model_args: name the members with pretrained=A|B, or take demo=True or preset=FILE; one of these"
        )
    if isinstance(pretrained, Ensemble):
        if given:
            raise InputError(f"model_args: the ensemble is made; leave out {', '.join(sorted(given))}")
        pretrained.team.require_stop(_WHOLE)
        return pretrained
    if preset_file is not None:
        preset = load_preset(str(preset_file))
    else:
        named = DEMO_PAIR if pretrained is None else _parts("pretrained", pretrained)
        preset = Preset([str(name) for name in named])
    loading = {name: _option(name, given.pop(name)) for name in LOAD_OPTIONS if name in given}
    weights = given.get("weights")
    if weights is not None and not (isinstance(weights, str) and weights in WEIGHTS_RULES):
        given["weights"] = [_number(one) for one in _parts("weights", weights)]
    if not isinstance(given.get("fuser", ""), str):
        raise InputError("model_args: fuser is a name, or module:function; for a function, give an Ensemble")
    chosen = preset.settings(**given)
    require_stop(chosen.get("on_failure", "stop"), _WHOLE)  # before minutes of loading
    return Ensemble.from_pretrained(
        preset.members, progress=log.info, **preset.load_options(**loading), **chosen
    )


def places_members(arguments: Mapping[str, Any]) -> bool:
    """Whether `model_args`, or the preset that they name, say where the members run.

    Raises:
        InputError: a preset that cannot be read.
    """
    found = dict(arguments)
    if arguments.get("preset") is not None:
        found = load_preset(str(arguments["preset"])).loading | found
    return any(found.get(name) is not None for name in ("device", "device_map"))


def whole_number(name: str, value: Any, least: int = 1) -> int:
    """A number that the command line may have left as text."""
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = least - 1
    if number < least or str(value) != str(number):
        raise InputError(f"{name} is {value!r}; give a whole number, {least} or more")
    return number


def _parts(name: str, value: Any) -> list[Any]:
    """A list, or the parts of a text; one value is a list of one."""
    if isinstance(value, str):
        value = [part.strip() for part in value.split(SEPARATOR)]
    parts = list(value) if isinstance(value, Sequence) else [value]
    if not parts or any(isinstance(one, str) and not one for one in parts):
        raise InputError(f"model_args: {name} is {value!r}; write {name}=A{SEPARATOR}B, or give a list")
    return parts


def _option(name: str, value: Any) -> Any:
    """An option of loading: one value for all members, or a list of one for each."""
    parts = [option_from_text(name, one) if isinstance(one, str) else one for one in _parts(name, value)]
    return parts if len(parts) > 1 else parts[0]


def _number(value: Any) -> Any:
    """A number that may have been left as text; what else it may not be, the ensemble says."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        raise InputError(
            f"model_args: {value!r} is no weight; write weights=0.6{SEPARATOR}0.4, a list, size or prompt"
        ) from None
