"""The first line of a result file: everything that determines the results, and how two headers differ."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deepen_ext import __version__
from deepen_ext.decoding.prompt_weights import LEAST_WEIGHT, PROMPT_TOKENS
from deepen_ext.errors import InputError
from deepen_ext.fusers.function import FunctionFuser
from deepen_ext.fusers.weighing.disagreement import Disagreement
from deepen_ext.measure.evaluation.choices import ChoiceItem, ChoiceTask
from deepen_ext.measure.evaluation.tasks import Item, Task

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble

_FORMAT = 1  # of the lines; a file of another format cannot be continued

Header = dict[str, Any]


def task_header(task: Task, split: str, items: Sequence[Item], left_out: int = 0) -> Header:
    """The part of a header that a task determines; known before a model is loaded.

    The digest is over the items as they are read: which items, their prompts, references and choices. Only
    likelihood is named as `scoring`: a header without it is of texts that were written.
    """
    digest = hashlib.sha256()
    for item in items:
        read = [item.index, item.prompt, list(item.references)]
        if isinstance(item, ChoiceItem):
            read.append(list(item.choices))
        digest.update(json.dumps(read).encode() + b"\n")
    header = {"name": task.name, "split": split, "items": len(items), "items_sha256": digest.hexdigest()}
    if isinstance(task, ChoiceTask):
        return header | {"scoring": "likelihood", "left_out": left_out}
    return header | {"max_new_tokens": task.max_new_tokens, "stop_strings": list(task.stop_strings)}


def by_likelihood(header: Header) -> bool:
    """Whether a file's records are of choices that were scored, and not of texts that were written."""
    return bool(header["task"].get("scoring") == "likelihood")


def configuration_header(
    name: str, ensemble: Ensemble, *, certified_skip: bool, share_forwards: bool
) -> Header:
    """The part of a header that an ensemble and its settings determine.

    The batch size is not in it: it may be made smaller when memory runs out.
    """
    fuser = {
        key: value
        for key, value in sorted(vars(ensemble.fuser).items())
        if isinstance(value, bool | int | float | str)
    }
    if isinstance(ensemble.fuser, FunctionFuser):  # its name may be another function's
        fuser["function"] = f"{ensemble.fuser.function.__module__}:{ensemble.method}"
    if ensemble.fuser.first_end_needs_all:
        fuser["first_end_needs_all"] = True
    if ensemble.fuser.uses_recipe and isinstance(ensemble.fuser.rule, Disagreement):
        fuser["alone_as_it_is"] = True  # files from before the search left the main model alone there
    weights: Any = list(ensemble.weights)
    if ensemble.weighs_prompts:
        how = {"sharpness": ensemble.team.sharpness, "tokens": PROMPT_TOKENS, "least": LEAST_WEIGHT}
        weights = {ensemble.team.weights_rule: weights, **how}
    aware, leads = ensemble.boundary_rule is not None, max(ensemble.weights) > ensemble.weights[0]
    # Files from before an assistant that counts more kept a part of its weight do not have it.
    shares = {"boundary_shares": True} if aware and (leads or ensemble.weighs_prompts) else {}
    models = [member.backend.describe() for member in ensemble.members]
    return {
        "name": name,
        "method": ensemble.method,
        "members": [
            {
                "name": member.name,
                "vocabulary": member.vocabulary.fingerprint,
                "weights": member.backend.fingerprint(),
                "eos_ids": list(member.eos_ids),
                "backend": model.backend,
                "dtype": model.dtype,
                "device": member.device.type,
            }
            for member, model in zip(ensemble.members, models, strict=True)
        ],
        "weights": weights,
        "fuser": fuser,
        "relative_maps": [one.fingerprint for one in ensemble.maps],
        "boundary_aware": aware,
        **shares,
        "certified_skip": certified_skip,
        "share_forwards": share_forwards,
    }


def make_header(task: Header, configuration: Header) -> Header:
    """The whole header. Everything in it reads the same after a round trip through JSON."""
    return {"format": _FORMAT, "package": __version__, "task": task, "configuration": configuration}


def check_same(path: Path, there: Header, now: Header) -> None:
    """Check that the header of a file agrees with that of this run.

    Files of earlier versions do not say the backend: there the weights alone tell members apart.

    Raises:
        InputError: it does not; the message says what differs.
    """
    try:
        old, new = dict(_flat(there)), dict(_flat(now))
    except RecursionError as error:
        raise damaged(path, "its header is nested too deeply") from error
    differ = [
        f"{key} is {_short(old.get(key))} there and {_short(new.get(key))} now"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key) and (key in old or not key.endswith(".backend"))
    ]
    if differ:
        raise InputError(
            f"{path} holds results of another run: {'; '.join(differ)}. Give the same settings to go on with "
            "it, another folder (--json), or fresh=True (--fresh) to drop it and begin anew"
        )


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Each value in a header with its name, such as `configuration.members 1.weights`."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for number, inner in enumerate(value, start=1):
            yield from _flat(inner, f"{name} {number}")
    else:
        yield name, value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:36]}..."


def damaged(path: Path, what: str) -> InputError:
    """The error for a file of results that cannot be read."""
    return InputError(f"{path}: {what}; remove the file, or begin it anew with fresh=True (--fresh)")
