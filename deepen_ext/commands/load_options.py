"""The options of loading members, which six commands share: --backend, --device, --quantization, ...

A command gets them all as one parameter:

    @with_load_options
    def mine(loading: Loading, model: options.Models = None) -> None:
        load_members(model, **loading.options())

No torch is imported here, so that --help answers at once.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any

import typer

from deepen_ext.members.from_text import DEFAULT, option_from_text
from deepen_ext.members.registry import BACKENDS, PROTOCOLS

_PANEL = f"Loading: one for all, or one for each ({DEFAULT}: the default)"
_HELP = {
    "backend": f"What runs the model, by default what goes with its name: {', '.join(BACKENDS)}.",
    "device": "Where the model runs; cpu by default.",
    "dtype": "Of the weights: float32 (the default), float16 or bfloat16.",
    "threads": "CPU threads of the forward passes.",
    "device_map": "Spread the model over devices: auto, or JSON of module names and devices.",
    "max_memory": 'The most that --device-map puts on each device, as JSON: {"0": "20GiB", "cpu": "30GiB"}.',
    "offload_folder": "Where the layers go that --device-map puts on disk.",
    "quantization": "Round the weights on loading: int8 or int4.",
    "adapter": "A PEFT adapter on the model: a folder or a hub name. --model BASE@ADAPTER is the same.",
    "revision": "Branch, tag or commit of a hub model.",
    "attn_implementation": "How transformers computes attention, such as eager or sdpa.",
    "protocol": f"Of a server (--model http://host:port): {', '.join(PROTOCOLS)}; found out by default.",
    "tokenizer": "Of a server's model: a folder, a hub name, a .gguf file or demo:NAME.",
    "api_key": "Where the server's key is: env:NAME or file:PATH.",
    "placement": 'Run the model in an actor of Ray, as JSON: {"num_cpus": 2, "num_gpus": 1}.',
    "timeout": "Of a model that runs elsewhere: the most seconds of one request.",
}
_TRUST = "Run code that a model's folder or repository brings along. Without it such a model is refused."


@dataclass(frozen=True)
class Loading:
    """What the command line says about loading, as texts."""

    texts: Mapping[str, list[str] | None]
    trust_remote_code: bool

    def without_key(self) -> Loading:
        """The same for members that are not to get the key."""
        return Loading({**self.texts, "api_key": None}, self.trust_remote_code)

    def options(self) -> dict[str, Any]:
        """The keywords of `load_members` that were given: one value for all, or a list of one for each.

        Raises:
            InputError: a text that is no number or no JSON. Ranges are checked where members are loaded.
        """
        found: dict[str, Any] = {"trust_remote_code": True} if self.trust_remote_code else {}
        for name, texts in self.texts.items():
            values = [option_from_text(name, text) for text in texts or ()]
            if values:
                found[name] = values if len(values) > 1 else values[0]
        return found


def with_load_options(
    command: Callable[..., None], flags: Mapping[str, str] = MappingProxyType({})
) -> Callable[..., None]:
    """The command with the options of loading in the place of its parameter `loading`.

    Args:
        command: the function.
        flags: of options whose usual flag means something else in this command.
    """

    @functools.wraps(command)
    def run(*, trust_remote_code: bool, **given: Any) -> None:
        texts = {name: given.pop(name) for name in _HELP}
        command(loading=Loading(texts, trust_remote_code), **given)

    own = inspect.signature(command, eval_str=True)
    parameters = [one for one in own.parameters.values() if one.name != "loading"] + _parameters(flags)
    run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return run


def _parameters(flags: Mapping[str, str]) -> list[inspect.Parameter]:
    """As typer reads them. Numbers and JSON are texts there, because `-` may stand in their place."""

    def parameter(name: str, kind: Any, text: str, default: Any) -> inspect.Parameter:
        option = typer.Option(
            flags.get(name, _flag(name)), help=text, rich_help_panel=_PANEL, show_default=False
        )
        kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD
        return inspect.Parameter(name, kinds, default=default, annotation=Annotated[kind, option])

    found = [parameter(name, list[str] | None, text, None) for name, text in _HELP.items()]
    return [*found, parameter("trust_remote_code", bool, _TRUST, False)]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
