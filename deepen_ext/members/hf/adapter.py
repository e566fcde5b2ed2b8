"""PEFT adapters: put on their base model, and merged into its weights where these are not quantised.

A merged model gives what the adapter beside the weights gives, up to the rounding of sums. It takes no longer
than its base, and is one more plain model to everything else. Packed weights cannot take a sum: on a
quantised checkpoint the adapter stays beside them. `quantization` rounds after the merge.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from deepen_ext.errors import DeepenError, ModelError
from deepen_ext.ground.warning import warn
from deepen_ext.members.hf.loaded_model import refused_kind
from deepen_ext.members.hf.placement import home, waits_elsewhere
from deepen_ext.members.hf.tokenizer_file import load_tokenizer

_MISFIT = re.compile(r"size mismatch for (\S+): .*?Size\((\[.*?\])\).*?Size\((\[.*?\])\)")


def put_on(
    adapter: Path | str, model: Any, tokenizer: Any, name: str, *, trust_remote_code: bool
) -> tuple[Any, Any]:
    """A base model with an adapter, and the tokenizer that goes with it.

    Args:
        adapter: its folder or hub name.
        model: of the base, in memory.
        tokenizer: of the base.
        name: of the base, for messages.
        trust_remote_code: see `LoadOptions`.

    Raises:
        ModelError: the adapter is not for this model, of a kind that cannot be put on it, or brings tokens
            without embeddings.
    """
    from peft import PeftConfig, PeftModelForCausalLM, load_peft_weights

    where = f"{name}: the adapter {adapter}"
    if waits_elsewhere(model):
        raise ModelError(
            f"{where} cannot be put on weights that wait on the disk or the host; give a device_map whose "
            "devices hold the whole model"
        )
    with _failures(where):
        config = PeftConfig.from_pretrained(str(adapter))
        _check_kind(config, where)
        _compare_names(config, name, where)
        weights = load_peft_weights(str(adapter), device="cpu")
        tokenizer = _tokenizer_with(adapter, weights, model, tokenizer, where, trust_remote_code)
        del weights
        config.inference_mode = True
        adapted: Any = PeftModelForCausalLM(model, config)
        report = adapted.load_adapter(str(adapter), "default", torch_device=str(home(model)))
        _check_keys(report.missing_keys, report.unexpected_keys, where)
        if getattr(model, "hf_quantizer", None) is None:
            adapted = adapted.merge_and_unload(safe_merge=True)
    return adapted, tokenizer


def _check_kind(config: Any, where: str) -> None:
    if (why := refused_kind(config)) is not None:
        raise ModelError(f"{where} is {why}")
    if config.task_type not in (None, "CAUSAL_LM"):
        raise ModelError(f"{where} is for the task {config.task_type}; a member needs one for CAUSAL_LM")


def _compare_names(config: Any, name: str, where: str) -> None:
    trained_on = config.base_model_name_or_path
    if trained_on and Path(trained_on).name.casefold() != Path(name).name.casefold():
        warn(f"{where} was trained on {trained_on}, by its config; see to it that this is the same model")


def _check_keys(missing: Collection[str], unexpected: Collection[str], where: str) -> None:
    """Refuse an adapter for a model with other layers; peft leaves out what has no place."""
    for keys, what in (
        (unexpected, "has weights for places that this model does not have, the first of them"),
        (missing, "lacks weights for layers that this model has, the first of them"),
    ):
        if keys:
            first = sorted(keys)[0].removeprefix("base_model.model.")
            raise ModelError(f"{where} {what} {first}; it was made for another base model. Name that one")


def adapter_tokenizer(adapter: Path | str, where: str, trusted: bool) -> PreTrainedTokenizerBase | None:
    """The tokenizer that an adapter brings; None where it brings none."""
    own = cached_file(
        str(adapter),
        "tokenizer_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if own is None:
        return None
    return load_tokenizer(Path(own).parent, where, trust_remote_code=trusted, alone=True)


def _tokenizer_with(
    adapter: Path | str, weights: dict[str, Any], model: Any, tokenizer: Any, where: str, trusted: bool
) -> Any:
    """The adapter's tokenizer where it has one, after the model's embeddings have room for its tokens."""
    found: Any = adapter_tokenizer(adapter, where, trusted)
    if found is None:
        return tokenizer
    before, after = tokenizer.get_vocab(), found.get_vocab()
    for token, number in sorted(before.items(), key=lambda one: one[1]):
        if after.get(token) != number:
            raise ModelError(
                f"{where} brings a tokenizer in which {token!r} is {after.get(token)}, not {number}; it was "
                "made for another base model. Name that one"
            )
    if not (added := sorted(after.keys() - before.keys(), key=lambda token: after[token])):
        return found
    embedding = model.get_input_embeddings()
    path = next(path for path, module in model.named_modules() if module is embedding)
    # Of saved embeddings, or of the tokens that were trained.
    rows = [len(weight) for key, weight in weights.items() if f".{path}." in key and weight.dim() == 2]
    if not rows:
        raise ModelError(
            f"{where} brings the token {added[0]!r}, which its base does not have, and no embedding for it; "
            "save the adapter again with save_embedding_layers=True"
        )
    if max(rows) > embedding.weight.shape[0]:
        model.resize_token_embeddings(max(rows), mean_resizing=False)
    return found


@contextmanager
def _failures(where: str) -> Iterator[None]:
    """What peft raises, as one clear error."""
    try:
        with warnings.catch_warnings():
            # Of keys that are missing, which `_check_keys` refuses; of changes to come in transformers.
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            yield
    except DeepenError:
        raise
    except Exception as error:
        if (found := _MISFIT.search(str(error))) is not None:
            key, held, wanted = found.groups()
            raise ModelError(
                f"{where} does not fit: {key.removeprefix('base_model.model.')} is {held}, not {wanted}; it "
                "was made for another base model. Name that one"
            ) from error
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{where} cannot be put on: {first}") from error
