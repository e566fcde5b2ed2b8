"""`deepen-ext serve`: ensembles behind OpenAI's endpoints, for many clients at once."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import time
from typing import Annotated, Any

import typer

from deepen_ext.commands import options
from deepen_ext.commands.console import exit_codes
from deepen_ext.commands.generate import WithoutTemplate
from deepen_ext.commands.load_options import Loading, with_load_options
from deepen_ext.commands.loading import (
    Named,
    check_recipe_used,
    ensemble_keywords,
    load_ensembles,
    named_members,
)
from deepen_ext.errors import InputError

_DEFAULT = "deepen"
_PANEL = "Serving"


@partial(with_load_options, flags={"api_key": "--member-api-key"})
def serve(
    loading: Loading,
    model: options.Models = None,
    demo: options.Demo = False,
    weight: options.Weights = None,
    fuser: options.FuserSpec = None,
    recipe: options.Recipes = None,
    learning_rate: options.LearningRate = None,
    on_failure: options.OnFailure = None,
    preset: options.Preset = None,
    ensemble: Annotated[
        list[str] | None,
        typer.Option(
            "--ensemble",
            metavar="NAME=PRESET.yaml",
            help="An ensemble under a name of its own. Repeat it; a member of several is loaded once.",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen.", rich_help_panel=_PANEL)] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="0 for any free one.", rich_help_panel=_PANEL)
    ] = 8000,
    key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="env:NAME|file:PATH",
            help="Where the key is that clients must send. (Of a member's own server: --member-api-key.)",
            rich_help_panel=_PANEL,
        ),
    ] = None,
    lanes: Annotated[
        int, typer.Option(min=1, help="Texts that are written side by side.", rich_help_panel=_PANEL)
    ] = 32,
    queue: Annotated[
        int, typer.Option(min=1, help="Texts that may wait; more get a 429.", rich_help_panel=_PANEL)
    ] = 256,
    max_body: Annotated[
        float, typer.Option(min=0.001, max=1e6, help="MiB of a request.", rich_help_panel=_PANEL)
    ] = 4.0,
    time_limit: Annotated[
        float,
        typer.Option(min=0, max=1e6, help="Seconds of a request; 0 for no limit.", rich_help_panel=_PANEL),
    ] = 600.0,
    grace: Annotated[
        float,
        typer.Option(
            min=0, max=1e6, help="Seconds that running texts have after SIGTERM.", rich_help_panel=_PANEL
        ),
    ] = 30.0,
    without_template: Annotated[
        WithoutTemplate,
        typer.Option(
            help="In a chat, a member that has no chat template: a plain transcript, or an error.",
            rich_help_panel=_PANEL,
        ),
    ] = WithoutTemplate.plain,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Write prompts into the log.", rich_help_panel=_PANEL)
    ] = False,
    debug: options.Debug = False,
) -> None:
    """Serve ensembles, and each of their members alone, behind OpenAI's endpoints."""
    with exit_codes(debug):
        _check_installed()
        found = _named_ensembles(model, demo, preset, ensemble)
        for_one = (fuser, weight, recipe, learning_rate, loading.texts["api_key"])
        own = _whose_options(found, given=any(one is not None for one in for_one))
        check_recipe_used(found[own], [fuser], recipe, learning_rate)
        mine = loading, fuser, weight, recipe, learning_rate, on_failure
        others = loading.without_key(), None, None, None, None, on_failure
        asked = {
            name: (named, ensemble_keywords(named, *(mine if name == own else others)))
            for name, named in found.items()
        }
        key_text = _read_key(key)
        _say_on_standard_error()
        from deepen_ext.serving.engine import Engine
        from deepen_ext.serving.models import Models, with_members
        from deepen_ext.serving.run import WebServer, reserve
        from deepen_ext.serving.service import Limits, Service

        limits = Limits(
            key=key_text,
            body_bytes=int(max_body * (1 << 20)),
            seconds=time_limit or None,
            without_template=without_template.value,
            log_prompts=log_prompts,
        )
        with reserve(host, port) as reserved:  # before minutes of loading
            models = with_members(load_ensembles(asked))
            service = Service(Engine(models, lanes=lanes, queue=queue), Models(models, int(time())), limits)
            server = WebServer(service, host=host, port=port, grace=grace)
            listening = server.bind(reserved)
            _tell(service, server.address(listening))
            server.run([listening])
        if server.interrupted:
            raise KeyboardInterrupt


def _check_installed() -> None:
    """Before minutes of loading."""
    missing = [one for one in ("fastapi", "uvicorn", "prometheus_client") if find_spec(one) is None]
    if missing:
        raise InputError(
            f"the server needs {', '.join(missing)}, which is not installed: pip install 'deepen-ext[serve]'"
        )


def _named_ensembles(
    models: list[str] | None, demo: bool, preset: Path | None, ensembles: Sequence[str] | None
) -> dict[str, Named]:
    """Each ensemble's members; the one of --model, --demo and --preset is called `deepen`."""
    found: dict[str, Named] = {}
    for one in ensembles or ():
        name, equals, path = one.partition("=")
        if not equals or not path or not re.fullmatch(r"[\w.:@+-]+", name):
            raise InputError(f"--ensemble {one}: give NAME=PRESET.yaml, such as --ensemble mine=mine.yaml")
        if name in found:
            raise InputError(f"--ensemble {name} is there twice; give each a name of its own")
        found[name] = named_members(None, False, Path(path))
    if models or demo or preset is not None or not found:
        if _DEFAULT in found:
            raise InputError(f"--ensemble {_DEFAULT}: the ensemble of the other options has this name")
        return {_DEFAULT: named_members(models, demo, preset), **found}
    return found


def _whose_options(found: Mapping[str, Named], *, given: bool) -> str:
    """The ensemble that the options of fusing and --member-api-key are for; other presets bring their own.

    Args:
        found: see `_named_ensembles`.
        given: whether there are such options.
    """
    if given and len(found) > 1 and _DEFAULT not in found:
        raise InputError(
            "--fuser, --weight, --recipe, --learning-rate and --member-api-key are for one ensemble, and "
            f"there are {len(found)}; put settings into the presets, and give a key to a server of its own"
        )
    return _DEFAULT if _DEFAULT in found else next(iter(found))


def _read_key(where: str | None) -> str | None:
    """The key of --api-key. The key itself is refused, and not shown: others can see command lines."""
    if where is None:
        return None
    from deepen_ext.members.load_options import KEY_FORMS, LoadOptions

    try:
        LoadOptions(api_key=where)
    except InputError:
        raise InputError(f"--api-key must be {KEY_FORMS}, where the key is, not the key itself") from None
    from deepen_ext.members.http.address import read_key

    return read_key(where)


def _say_on_standard_error() -> None:
    """A line for every request: never its prompt, but with --log-prompts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log = logging.getLogger("deepen_ext.serving")
    log.addHandler(handler)
    log.setLevel(logging.INFO)


def _tell(service: Any, address: str) -> None:
    """Where it listens, and what there is."""
    names = ", ".join(one.name for one in service.models)
    log = logging.getLogger("deepen_ext.serving")
    log.info("deepen-ext serves %s at %s/v1", names, address)
    bare = [
        one.name
        for one in service.models
        if one.alone and not getattr(one.main.tokenizer, "chat_template", None)
    ]
    if bare and service.limits.without_template == "plain":
        log.info("no chat template: %s; chats reach it as a plain transcript", ", ".join(bare))
