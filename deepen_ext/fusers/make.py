"""Fusers by name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

from deepen_ext.errors import InputError
from deepen_ext.fusers.average import AverageFuser
from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.consistent import ConsistentFuser
from deepen_ext.fusers.deepen import DeepenFuser
from deepen_ext.fusers.draw import DrawFuser
from deepen_ext.fusers.follow import FollowFuser
from deepen_ext.fusers.function import FunctionFuser, check_arguments
from deepen_ext.fusers.product import ProductFuser
from deepen_ext.fusers.settings import FuseFunction, FusionSettings
from deepen_ext.fusers.single import SingleFuser
from deepen_ext.fusers.spans import SpansFuser
from deepen_ext.fusers.union_topk import UnionTopkFuser
from deepen_ext.fusers.union_vocab import UnionVocabFuser
from deepen_ext.space.member_maps import MapSettings

_CLASSES: list[type[Fuser]] = [
    *(DeepenFuser, AverageFuser, UnionTopkFuser, UnionVocabFuser),
    *(FollowFuser, ProductFuser, ConsistentFuser, DrawFuser, SpansFuser, SingleFuser),
]
FUSERS = {one.name: one for one in _CLASSES}


def fuser_class(fuser: str | FuseFunction) -> type[Fuser]:
    """The class of a fuser that is set by its name or as a function.

    Raises:
        InputError: no such fuser, or a function that cannot be called as a fuser.
    """
    if not isinstance(fuser, str) and callable(fuser):
        check_arguments(fuser)
        return FunctionFuser
    if not isinstance(fuser, str) or fuser not in FUSERS:
        raise InputError(f"fuser is {fuser!r}; use one of auto, {', '.join(FUSERS)}, or a function")
    return FUSERS[fuser]


def map_settings(settings: FusionSettings) -> MapSettings | None:
    """What the relative rows of these settings are made by; None for a fuser without relative maps."""
    kind = fuser_class(settings.fuser)
    if not kind.uses_maps:
        return None
    if not kind.uses_recipe:
        return MapSettings("bytes", None, settings.entries, settings.cache)
    return MapSettings(settings.recipe, settings.relative_temperature, settings.entries, settings.cache)


def method_name(fuser: str | FuseFunction, recipe: str) -> str:
    """What tables and records call it: "deepen:bytes", "average", or the function's name."""
    if not isinstance(fuser, str):
        return str(getattr(fuser, "__qualname__", type(fuser).__name__))
    return f"{fuser}:{recipe}" if fuser_class(fuser).uses_recipe else fuser


def recipe_of(spec: str) -> str | None:
    """What stands behind the name of a fuser that has recipes, "bytes" of "deepen:bytes"; else None."""
    name, colon, rest = spec.partition(":")
    return rest if colon and name in FUSERS and FUSERS[name].uses_recipe else None


def parse_fuser(spec: str, recipe: str) -> tuple[str | FuseFunction, str]:
    """What the command line names: ("deepen", recipe), another fuser's name, "auto", or a function.

    Args:
        spec: one of `FUSERS`, "deepen:RECIPE", or "module:function" (a module of the current folder, too).
        recipe: of "deepen" without one.

    Raises:
        InputError: no such fuser, module or function.
    """
    name, _, rest = spec.partition(":")
    if spec in FUSERS or spec == "auto":
        return spec, recipe
    if (own := recipe_of(spec)) is not None:
        return name, own
    if not rest:
        raise InputError(
            f"fuser '{spec}': use one of auto, {', '.join(FUSERS)}, deepen:RECIPE or module:function"
        )
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = getattr(import_module(name), rest)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: '.:f', ':f'
        raise InputError(f"fuser '{spec}': {error}; name a function as module:function") from error
    except Exception as error:  # the module's own code runs
        raise InputError(
            f"fuser '{spec}': {name} cannot be imported: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise InputError(f"fuser '{spec}' is {found!r}; name a function")
    return found, recipe
