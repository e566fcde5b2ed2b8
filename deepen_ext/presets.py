"""Presets: an ensemble's members and settings in a YAML file, as `deepen-ext tune` writes them.

    members: [demo:smollm2-135m-instruct, demo:gemma-3-270m]   # main first, see Ensemble.from_pretrained
    weights: [0.4, 0.6]                                        # or "size", "prompt"
    fuser: deepen
    recipe: calibrated
    learning_rate: 0.25
    relative_temperature: 40
    confidence: 0.5
    on_failure: continue                                       # without an assistant that is lost
    backend: llama.cpp                                         # how they are loaded: one for all,
    threads: [4, null]                                         # or one for each
    measured: {...}                                            # what was measured; not read again

Only `members` must be there. What is left out has the default of `Ensemble.from_pretrained`. A file cannot
choose code: a fuser that is code (module:function), an attention kernel of the hub and `trust_remote_code`
are only used where the caller names them. Nor can it choose which key a server gets (`api_key`).
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]  # its types are a package of their own

from deepen_ext.errors import InputError, shown
from deepen_ext.fusers.make import FUSERS, parse_fuser, recipe_of
from deepen_ext.fusers.settings import FusionSettings, check_on_failure
from deepen_ext.fusers.weighing.gate import GATE_NUMBERS
from deepen_ext.fusers.weighing.make import check_rule
from deepen_ext.fusers.weights import check_weights, check_weights_rule
from deepen_ext.ground.cache_folder import atomic_write
from deepen_ext.ground.paths import user_path
from deepen_ext.members.load_options import LOAD_OPTIONS, options_of_each
from deepen_ext.members.names_in_files import name_for_file, name_from_file, path_for_file
from deepen_ext.space.recipes import DEFAULT_RECIPE, check_recipe

# Settings that a file may have, each with an example of its value.
_SETTINGS = {one.name: one.metadata["preset"] for one in fields(FusionSettings) if "preset" in one.metadata}
# How members are loaded. A file may not say whether their code is run, to which cluster they go, and which of
# the user's keys a server gets: it may name a server of its own.
_CALLERS = ("trust_remote_code", "placement", "api_key")
_LOADING = tuple(name for name in LOAD_OPTIONS if name not in _CALLERS)
_PLACES = ("device", "device_map", "max_memory", "offload_folder")  # one of the first two is given, not both
_KEYS = ("members", *_SETTINGS, *_LOADING, "measured")
_MOST_BYTES = 1 << 17  # the parser takes a second for it
_DEEPEST = 20


@dataclass(frozen=True)
class Preset:
    """What a preset file says.

    Attributes:
        members: what `load_member` takes, as for `Ensemble.from_pretrained`: `demo:` names, hub names, or
            paths (those of the file are relative to its folder, these are not).
        given: the settings that the file has, by their names in `FusionSettings`.
        measured: the section of that name; for readers.
        loading: how the members are loaded, by the names in `LoadOptions`: one value for all, or a list of
            one for each. Never `trust_remote_code`, `placement` or `api_key`.
    """

    members: list[str]
    given: dict[str, Any] = field(default_factory=dict)
    measured: dict[str, Any] = field(default_factory=dict)
    loading: dict[str, Any] = field(default_factory=dict)

    def load_options(self, **options: Any) -> dict[str, Any]:
        """The keywords of `load_members` that the file sets.

        Args:
            options: those that count more than the file's; None is the option's default. A device or a device
                map stands in the place of either in the file.
        """
        replaced = _PLACES if options.keys() & {"device", "device_map"} else ()
        return {name: value for name, value in self.loading.items() if name not in replaced} | options

    def settings(self, **options: Any) -> dict[str, Any]:
        """The keywords of `Ensemble` that the file sets; what it leaves out is not there.

        Args:
            options: settings that count more than the file's, by their names in `FusionSettings`; None is not
                given. The fuser as the command line names it. The file's temperature goes with the file's
                recipe only.

        Raises:
            InputError: a fuser that there is not; one that is code (module:function) in the file and not
                among the options; options that name two recipes.
        """
        options = {key: value for key, value in options.items() if value is not None}
        found = self.given | options
        own = str(self.given.get("fuser", ""))
        if "fuser" not in options and ":" in own and recipe_of(own) is None:
            raise InputError(
                f"the preset's fuser {shown(own)} is code, which a file cannot choose; if you trust it, "
                f"name it yourself with --fuser {own}, or in Python with preset.settings(fuser={own!r})"
            )
        _check_one_recipe(options)
        if "fuser" in found:
            found["fuser"], recipe = parse_fuser(found["fuser"], found.get("recipe", ""))
            if "fuser" not in options:
                recipe = options.get("recipe", recipe)
            if recipe:
                found["recipe"] = recipe
        own_recipe = recipe_of(own) or self.given.get("recipe")  # it may stand behind the fuser: deepen:bytes
        if found.get("recipe") != own_recipe and "relative_temperature" not in options:
            found.pop("relative_temperature", None)
        return found


def load_preset(path: str | Path) -> Preset:
    """Read a preset file.

    Raises:
        InputError: no such file, no YAML, an unknown or doubled key, a value of a wrong type, weights that do
            not go with the members. The message names the line and what to write instead.
    """
    file = user_path(path)
    values, lines = _read(file)

    def wrong(key: str, message: str) -> InputError:
        return InputError(f"{file}, line {lines[key]}: {message}")

    for key in values:
        if key == "trust_remote_code":
            raise wrong(
                key,
                "a file cannot choose to run a model's code; take this line out, and give "
                "--trust-remote-code yourself (in Python trust_remote_code=True) if you trust the model",
            )
        if key == "api_key":
            raise wrong(
                key,
                "a file cannot choose which of your keys is sent to a server; take this line out, and give "
                "--api-key yourself (of serve --member-api-key, in Python api_key=)",
            )
        if key not in _KEYS:
            raise wrong(key, f"{shown(key)} is no key of a preset; there are {', '.join(_KEYS)}")
    if "members" not in values:
        raise InputError(f"{file}: there is no 'members'; list the models, the main model first")
    members = values["members"]
    if not isinstance(members, list) or not members or not all(isinstance(m, str) and m for m in members):
        raise wrong("members", f"members is {shown(members)}; give a list of models, the main model first")
    given = {key: values[key] for key in _SETTINGS if values.get(key) is not None}  # null is not given
    for key, value in given.items():
        try:
            _check_setting(key, value, len(members))
        except InputError as error:
            raise wrong(key, str(error)) from None
    try:
        _check_one_recipe(given)
    except InputError as error:
        raise wrong("recipe", str(error)) from None
    fuser = given.get("fuser", "")
    recipe = recipe_of(fuser) or given.get("recipe", DEFAULT_RECIPE if _uses_recipe(fuser) else None)
    if recipe == "bytes" and "relative_temperature" in given:
        raise wrong(
            "relative_temperature",
            "the bytes recipe has no temperature; take this line out, or name another recipe, such as "
            "recipe: calibrated",
        )
    if not isinstance(measured := values.get("measured", {}), dict):
        raise wrong("measured", f"measured is {shown(measured)}; give keys and values, or leave it out")
    try:
        found = [name_from_file(name, file) for name in members]
    except InputError as error:
        raise wrong("members", str(error)) from None
    loading = {key: values[key] for key in _LOADING if values.get(key) is not None}
    try:
        loading = _read_loading(loading, members, file)
    except InputError as error:
        named = [key for key in loading if key in str(error)]
        raise wrong((named or list(loading))[0], str(error)) from None
    return Preset(members=found, given=given, measured=measured, loading=loading)


def write_preset(path: str | Path, preset: Preset) -> None:
    """Write a preset file in one step: no reader sees half of it. Its folder is made where it is missing.

    Members that are files or folders are written relative to the preset, unless their path is absolute.

    Raises:
        InputError: the file cannot be written, or not hold a value, such as a function as fuser.
    """
    file = user_path(path)
    content: dict[str, Any] = {"members": [name_for_file(name, file) for name in preset.members]}
    content |= {key: preset.given[key] for key in _SETTINGS if key in preset.given}
    content |= {key: _plain(key, preset.loading[key], file) for key in _LOADING if key in preset.loading}
    if preset.measured:
        content["measured"] = preset.measured
    try:
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=100)
    except yaml.representer.RepresenterError as error:
        raise InputError(
            f"{file}: a preset cannot hold {shown(error.args[-1])}; give plain numbers, lists and names"
        ) from None
    try:
        with atomic_write(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{file}: cannot be written: {error.strerror}; choose another place") from error


def _read(file: Path) -> tuple[Mapping[str, Any], dict[str, int]]:
    """The file's keys with their values and with their lines, counted from 1."""
    try:
        with file.open("rb") as opened:
            data = opened.read(_MOST_BYTES + 1)
        text = data.decode()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as a text file: {error}") from error
    if len(data) > _MOST_BYTES:
        raise InputError(f"{file}: longer than {_MOST_BYTES} bytes; a preset is a short text")
    try:
        _check_nesting(file, text)
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        values = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{file}{where}: this is no YAML: {reason}") from error
    except InputError:
        raise
    except (ValueError, LookupError, AttributeError, TypeError, OverflowError) as error:
        # The constructors of numbers, times and the like let these through.
        raise InputError(f"{file}: a value cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise InputError(f"{file}: a preset is keys and values, such as 'members: [a, b]'")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise InputError(f"{file}, line {line}: {key.value!r} stands twice; keep one of them")
        lines[key.value] = line
    return values, {key: lines.get(str(key), 1) for key in values}


def _check_nesting(file: Path, text: str) -> None:
    """Before anything is made of it: composing nested lists recurses, and aliases grow without bound."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        where = f"{file}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise InputError(f"{where}: *{event.anchor} is an alias; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise InputError(f"{where}: more than {_DEEPEST} levels of lists and keys; a preset needs three")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # False for NaN


def _check_setting(key: str, value: Any, members: int) -> None:
    """Raise InputError unless the value has the right type. Ranges are the ensemble's own to check."""
    if key == "recipe":
        check_recipe(value)
    elif key == "weights" and isinstance(value, list) and all(map(_is_number, value)):
        check_weights(value, members)
    elif key == "weights":
        check_weights_rule(value)
    elif _is_number(example := _SETTINGS[key]) and not _is_number(value):
        raise InputError(f"{key} is {shown(value)}; give a number such as {example}")
    elif key == "fuser" and not (isinstance(value, str) and value):
        raise InputError(f"fuser is {shown(value)}; give a fuser's name, such as deepen")
    elif key == "on_failure":
        check_on_failure(value)
    elif key == "weighing":
        check_rule(value)
    elif key == "gate" and not (isinstance(value, list) and all(map(_is_number, value))):
        raise InputError(f"gate is {shown(value)}; give a list of {GATE_NUMBERS} numbers")


def _uses_recipe(fuser: str) -> bool:
    """Whether a fuser has relative maps, as the default has, which "auto" stands for too."""
    return fuser in ("", "auto") or (fuser in FUSERS and FUSERS[fuser].uses_recipe)


def _check_one_recipe(given: Mapping[str, Any]) -> None:
    """Raise InputError where the fuser has a recipe behind its name, and another one stands beside it."""
    fuser, recipe = given.get("fuser"), given.get("recipe")
    behind = recipe_of(fuser) if isinstance(fuser, str) else None
    if behind is not None and recipe is not None and behind != recipe:
        raise InputError(
            f"fuser {shown(fuser)} and recipe {shown(recipe)} contradict each other; keep one of them"
        )


def _read_loading(loading: dict[str, Any], members: list[str], file: Path) -> dict[str, Any]:
    """Check how the members are loaded, and make paths absolute. Devices are looked at when they are used."""
    for kernel in _each(loading.get("attn_implementation")):
        if isinstance(kernel, str) and "/" in kernel:
            raise InputError(
                f"attn_implementation {shown(kernel)} is a kernel of the hub, and so code, which a file "
                "cannot choose; take this line out, and give --attn-implementation yourself if you trust it"
            )
    options_of_each(members, **loading)
    found = dict(loading)
    for key, read in (
        ("adapter", name_from_file),
        ("tokenizer", name_from_file),
        ("offload_folder", _folder_from_file),
    ):
        if key in loading:
            values = [None if one is None else read(one, file) for one in _each(loading[key])]
            found[key] = values if isinstance(loading[key], list) else values[0]
    return found


def _each(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _folder_from_file(name: str, file: Path) -> str:
    return str(file.absolute().parent / user_path(name))


def _plain(key: str, value: Any, file: Path) -> Any:
    """An option of loading as YAML has it."""
    if isinstance(value, list | tuple):
        return [_plain(key, one, file) for one in value]
    if isinstance(value, Mapping):
        return {name: _plain("", one, file) for name, one in value.items()}
    if key in ("adapter", "tokenizer", "offload_folder") and value is not None:
        return path_for_file(str(value), file, new=key == "offload_folder")
    if isinstance(value, Integral | Real) and not isinstance(value, int):  # numpy's too
        return int(value) if isinstance(value, Integral) else float(value)
    known = value is None or isinstance(value, str | int)
    return value if known else str(value).removeprefix("torch.")  # a device, a dtype
