"""A checkpoint's model: whole, of the architecture that its config names, and without code of its own."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.tokenization_auto import get_tokenizer_config, tokenizer_class_from_name
from transformers.utils.peft_utils import find_adapter_config_file

from deepen_ext.errors import DeepenError, InputError, ModelError
from deepen_ext.ground.warning import warn
from deepen_ext.members.hf.quiet import loading_notes

# Tensors that old checkpoints hold and that a model computes by itself: rotary frequencies, positions, and
# the causal masks of GPT-2's time.
_COMPUTED = re.compile(r"(rotary_emb\.inv_freq|position_ids|\b(attn|attention)\.(masked_)?bias)$")
_MOST_NAMED = 5


def load_model(
    target: Path | str,
    name: str,
    dtype: torch.dtype | str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """The causal language model of a folder or a hub name, every weight of it from the checkpoint.

    transformers fills weights that a checkpoint lacks with random numbers and leaves out those that the model
    has no place for; it says so in a report that nobody reads. Here both are looked at (`check_weights`).

    Args:
        target: the folder or the hub name.
        name: of the member, for messages.
        dtype: of the weights; "auto": as the config says.
        trust_remote_code: see `LoadOptions`.
        revision: of the hub.
        options: of `from_pretrained`, such as "device_map".

    Raises:
        InputError: the hub does not give the model.
        ModelError: it cannot be loaded, needs code of its own, or its weights are not the model's.
    """
    with failures_of_loading(target, name):
        check_code(target, name, trust_remote_code, revision)
        with loading_notes() as notes, _named_conversions(name, notes):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                target,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                revision=revision or "main",
                ignore_mismatched_sizes=True,  # the report names them, the error that it would raise does not
                output_loading_info=True,
                **options,
            )
    model: PreTrainedModel = loaded[0]
    check_weights(model, loaded[1], name)
    return model


@contextmanager
def _named_conversions(name: str, notes: list[str]) -> Iterator[None]:
    """Name the weights that transformers could not put together, as the experts of a layer are.

    Its error does not; the table that it notes before does.
    """
    try:
        yield
    except RuntimeError as error:
        rows = [line for note in notes for line in note.splitlines() if "CONVERSION" in line and "|" in line]
        if not rows:
            raise
        keys = {re.sub(r"\x1b\[[\d;]*m", "", row).split("|")[0].strip() for row in rows}
        raise ModelError(
            f"{name}: some of the weights that make up {_named(keys)} are missing or of another shape. Fetch "
            "the config and the weights again, from one place"
        ) from error


def check_code(target: Path | str, name: str, trust_remote_code: bool, revision: str | None = None) -> None:
    """Refuse what would run code that is no part of transformers, and adapters.

    Where a config names code of its own but transformers has a class for the model, that class is used, as
    transformers does it; nothing of the folder runs.

    Raises:
        ModelError: see above.
    """
    if find_adapter_config_file(str(target), revision=revision) is not None:
        raise ModelError(adapter_refusal(str(target)))
    if trust_remote_code:
        return
    # A config that names unknown code raises ValueError here; see `failures_of_loading`.
    for config in _with_its_parts(read_config(target, False, revision)):
        kernel = getattr(config, "_attn_implementation", None)
        if isinstance(kernel, str) and "/" in kernel:
            raise ModelError(_code_refusal(name, f"its config.json takes attention from the hub ({kernel})"))
    check_tokenizer_code(target, name, trust_remote_code, revision)


def read_config(target: Path | str, trust_remote_code: bool, revision: str | None) -> Any:
    """The config of a folder or a hub name."""
    return AutoConfig.from_pretrained(
        target, trust_remote_code=trust_remote_code, revision=revision or "main"
    )


def _with_its_parts(config: Any) -> Iterator[Any]:
    """A config and those of the model's parts, such as its text and vision models."""
    yield config
    for part in config.sub_configs:
        if (own := getattr(config, part, None)) is not None:
            yield from _with_its_parts(own)


def check_tokenizer_code(
    target: Path | str, name: str, trust_remote_code: bool, revision: str | None = None
) -> None:
    """Refuse a tokenizer that would run code that is no part of transformers.

    Raises:
        ModelError: see above.
    """
    if trust_remote_code:
        return
    settings = get_tokenizer_config(target, revision=revision)
    named = settings.get("auto_map") or {}
    code = named.get("AutoTokenizer") if isinstance(named, dict) else named
    if code and tokenizer_class_from_name(str(settings.get("tokenizer_class"))) is None:
        file = next(filter(None, reversed(code)), code) if isinstance(code, list | tuple) else code
        raise ModelError(_code_refusal(name, f"its tokenizer_config.json names {file}"))


def check_weights(model: PreTrainedModel, report: dict[str, Any], name: str) -> None:
    """Compare what the checkpoint held with what the model has.

    Args:
        model: as loaded.
        report: transformers' loading info: "missing_keys", "unexpected_keys", "mismatched_keys".
        name: for messages.

    Raises:
        ModelError: tensors are missing or of another shape; or the checkpoint holds tensors for places inside
            this model's layers that the model does not have, so that it was made for another architecture.
            Whole parts that the model does not have, such as a vision tower, are left out with a warning.
    """
    if mismatched := report["mismatched_keys"]:
        shapes = {f"{key} is {list(held)}, not {list(wanted)}" for key, held, wanted in mismatched}
        raise ModelError(
            f"{name}: the weights do not fit the config: {_named(shapes)}. Fetch the config and the weights "
            "again, from one place"
        )
    if missing := report["missing_keys"]:
        raise ModelError(
            f"{name}: the checkpoint lacks weights that this model ({type(model).__name__}) has: "
            f"{_named(missing)}. They would be random. Fetch the weights again, or the config.json that "
            "belongs to them"
        )
    unexpected = {key for key in report["unexpected_keys"] if not _COMPUTED.search(key)}
    # A quantiser keeps scales and zero points beside the weights and names them as it likes.
    quantised = getattr(model, "hf_quantizer", None) is not None
    foreign = set() if quantised else {key for key in unexpected if _inside(model, key)}
    if foreign:
        raise ModelError(
            f"{name}: the checkpoint has weights for which this model ({type(model).__name__}) has no place: "
            f"{_named(foreign)}. Its config.json names another architecture than the weights are of; fetch "
            "the config.json that belongs to them"
        )
    if unexpected:
        warn(
            f"{name}: left out of the checkpoint, because {type(model).__name__} has no such parts: "
            f"{_named(unexpected)}"
        )


def _inside(model: PreTrainedModel, key: str) -> bool:
    """Whether a tensor of this name would belong to a part that the model has, not be a part itself."""
    prefix = model.base_model_prefix
    modules = dict(model.named_modules())
    for full in (key, f"{prefix}.{key}"):
        parts = full.split(".")
        deepest = max((i for i in range(1, len(parts)) if ".".join(parts[:i]) in modules), default=0)
        owner = ".".join(parts[:deepest])
        if not owner or owner == prefix:
            continue
        if isinstance(modules[owner], torch.nn.ModuleList):
            # Layers beyond the config's number, but for those that predict further tokens at once.
            config = model.config.get_text_config()
            further = getattr(config, "num_nextn_predict_layers", None) or 0
            # A tensor of the list itself, and of no layer, is one that the model has no place for.
            return not parts[deepest].isdecimal() or int(parts[deepest]) >= len(modules[owner]) + further
        return True
    return False


def _named(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:_MOST_NAMED])
    return shown if len(keys) <= _MOST_NAMED else f"{shown} and {len(keys) - _MOST_NAMED} more"


def adapter_refusal(name: str) -> str:
    """What to say of a folder or hub name that holds an adapter."""
    return (
        f"{name}: this holds a PEFT adapter (adapter_config.json), which needs its base model. Name both as "
        f"'base@{name}', or name the base and give adapter='{name}' (--adapter {name})"
    )


def _code_refusal(name: str, why: str) -> str:
    return (
        f"{name}: needs code that is no part of transformers and is not run: {why}. Read that code; if you "
        "trust it, load with trust_remote_code=True (--trust-remote-code)"
    )


@contextmanager
def failures_of_loading(target: Path | str, name: str) -> Iterator[None]:
    """Whatever transformers raises, as one clear error.

    Raises:
        InputError: the hub does not give it.
        ModelError: it cannot be loaded.
    """
    try:
        yield
    except DeepenError:
        raise
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise ModelError(_code_refusal(name, _code_named_by(target))) from error
        if isinstance(target, str) and not isinstance(error, ImportError):
            raise InputError(
                f"{name}: neither a local file or folder nor a model the hub gives: {_first_line(error)}. "
                "Check the name, and the network if it has not been downloaded before"
            ) from error
        raise ModelError(f"{target}: transformers cannot load this model: {_first_line(error)}") from error


def _code_named_by(target: Path | str) -> str:
    """Which files a folder's configs name as code."""
    found = [
        f"its {path.name} names {code}"
        for path in (Path(target) / "config.json", Path(target) / "tokenizer_config.json")
        if path.is_file() and (code := json.loads(path.read_text()).get("auto_map"))
    ]
    return "; ".join(found) or "its config names some"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
