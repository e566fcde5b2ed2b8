"""Members in transformers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.progress import Progress
from deepen_ext.ground.warning import warn
from deepen_ext.members.hf import quantisation
from deepen_ext.members.hf.adapter import put_on
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.checkpoint import (
    adapter_refusal,
    check_code,
    failures_of_loading,
    load_model,
    read_config,
)
from deepen_ext.members.hf.checkpoint_bytes import checkpoint_bytes
from deepen_ext.members.hf.device_map import (
    as_accelerate_names,
    check_room,
    choose_places,
    make_blueprint,
    weights_bytes,
)
from deepen_ext.members.hf.gguf_conversion import convert_embedded, convert_gguf
from deepen_ext.members.hf.loaded_model import inner_model
from deepen_ext.members.hf.placement import home
from deepen_ext.members.hf.quiet import no_bars, quiet
from deepen_ext.members.hf.rotary import steady_positions
from deepen_ext.members.hf.tokenizer_file import load_tokenizer
from deepen_ext.members.load_options import LoadOptions
from deepen_ext.members.member import Member
from deepen_ext.members.source import Source
from deepen_ext.text.vocabulary import Vocabulary

_ATTENTIONS = ("sdpa", "eager")


def load(source: Source, options: LoadOptions, progress: Progress | None = None) -> Member:
    """A member that transformers computes. A GGUF file is converted once and kept.

    Every weight must come from the checkpoint (`checkpoint.check_weights`), and the tokenizer is what its
    file tokenizer.json says, whatever class its config names (`tokenizer_file`).

    Raises:
        InputError: the hub does not give the model, or options that do not go together or that this model,
            its devices or the installed packages cannot do.
        ModelError: the model cannot be loaded, needs code of its own, lacks weights or has those of another
            architecture; its tokenizer fails the byte round trip; the folder holds an adapter, or the
            adapter given does not fit.
    """
    target = _target(source, progress)
    name = target.name if isinstance(target, Path) else target
    _check_options(source, options, name)
    if progress is not None:
        progress(f"Loading {name}")
    trusted, revision = options.trust_remote_code, options.revision
    with quiet():
        tokenizer = load_tokenizer(target, name, trust_remote_code=trusted, revision=revision)
        model = _load_model(target, name, options)
        if options.adapter is not None:
            model, tokenizer = put_on(
                options.adapter, model, tokenizer, name, trust_remote_code=options.trust_remote_code
            )
            if options.quantization is not None:
                quantisation.quantise(model, options.quantization, home(model))
            name = f"{name}@{Path(options.adapter).name}"
        # With the adapter on: bitsandbytes packs anew in its first forward pass, which peft cannot read.
        with no_bars():
            quantisation.try_out(model, name)
    return member_of(model.eval().requires_grad_(False), tokenizer, name)


def member_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Member:
    """A member of a model and its tokenizer that are loaded already; the model stays where it is.

    Raises:
        ModelError: the tokenizer fails the byte round trip.
    """
    inner: Any = inner_model(model)
    weight = getattr(inner.get_output_embeddings(), "weight", None)  # packed heads may have none
    size = int(weight.shape[0] if weight is not None else inner.config.get_text_config().vocab_size)
    return Member(
        name=name,
        backend=HFBackend(name, model, size, _context_length(model, name), home(model), model.dtype),
        tokenizer=tokenizer,
        vocabulary=Vocabulary.from_tokenizer(tokenizer, size, name=name),
        eos_ids=_eos_ids(model, tokenizer, size),
    )


def _check_options(source: Source, options: LoadOptions, name: str) -> None:
    """Refuse what needs no look at the model.

    Raises:
        InputError: see above.
    """
    if options.revision is not None and source.hub is None:
        raise InputError(
            f"{name}: revision={options.revision!r} is for models of the hub, and this one is on the disk; "
            "leave revision out"
        )
    if options.attn_implementation not in (None, *_ATTENTIONS):
        raise InputError(
            f"{name}: attn_implementation={options.attn_implementation!r}: sessions give each text a mask "
            "and states of its own, which 'sdpa' (the default) and 'eager' take exactly, and others do not; "
            "give one of these two"
        )
    if options.adapter is not None:
        quantisation.check_installed("peft", f"{name}: the adapter {options.adapter}")


def _load_model(target: Path | str, name: str, options: LoadOptions) -> Any:
    """The model on its devices, with its weights as the options say, but for an adapter."""
    trusted, revision = options.trust_remote_code, options.revision
    with failures_of_loading(target, name):
        check_code(target, name, trusted, revision)
        config = read_config(target, trusted, revision)
    method = quantisation.method_of(config)
    quantisation.check_quantization(options, method, name)
    if method is not None:
        quantisation.check_packages(method, name)
    dtype = quantisation.dtype_of(options, method, name)
    device = torch.device(options.device)
    more: dict[str, Any] = {}
    if options.attn_implementation is not None:
        more["attn_implementation"] = options.attn_implementation
    if options.device_map is not None:
        more |= _placed(config, method, dtype, options, name)
        if options.quantization is not None:  # then none is the disk, and all are of one kind
            device = torch.device(next(iter(more["device_map"].values())))
    elif options.quantization is not None:
        assert isinstance(dtype, torch.dtype)
        blueprint = make_blueprint(config, dtype, trusted)
        quantisation.check_layers(blueprint, options.quantization, name)
        whole_first = options.adapter is not None  # it is merged before the weights are rounded
        check_room({device: weights_bytes(blueprint, None if whole_first else options.quantization)}, name)
    elif (size := checkpoint_bytes(target, dtype, revision)) is not None:
        check_room({device: size}, name)
    if options.quantization is not None and options.adapter is None:
        more["quantization_config"] = quantisation.torchao_config(options.quantization, device)
    if "device_map" not in more and (method is not None or "quantization_config" in more):
        more["device_map"] = {"": device}  # packed weights are made where they stay
    with no_bars() if method is not None else nullcontext():
        model = load_model(target, name, dtype, trust_remote_code=trusted, revision=revision, **more)
    return model if "device_map" in more else model.to(device)  # type: ignore[arg-type]


def _placed(
    config: Any, method: str | None, dtype: torch.dtype | str, options: LoadOptions, name: str
) -> dict[str, Any]:
    """Options of `from_pretrained` that spread the model.

    Of a quantised checkpoint transformers decides, which knows how its package packs the weights.
    """
    quantisation.check_installed("accelerate", f"{name}: device_map")
    more: dict[str, Any] = {"device_map": options.device_map}
    if method is None:
        assert isinstance(dtype, torch.dtype)
        blueprint = make_blueprint(config, dtype, options.trust_remote_code)
        if options.quantization is not None:
            quantisation.check_layers(blueprint, options.quantization, name)
        places = choose_places(blueprint, options, name)
        more["device_map"] = {part: as_accelerate_names(place) for part, place in places.items()}
    elif options.max_memory is not None:
        more["max_memory"] = dict(options.max_memory)
    if options.offload_folder is not None:
        more["offload_folder"] = str(options.offload_folder)
    return more


def _target(source: Source, progress: Progress | None) -> Path | str:
    """What transformers can load: a folder or a hub name."""
    if source.hub is not None:
        return source.hub
    if source.embedded is not None:
        return convert_embedded(source.embedded, progress)
    assert source.path is not None
    if source.is_gguf:
        return convert_gguf(source.path, progress)
    if (source.path / "adapter_config.json").is_file():
        raise ModelError(adapter_refusal(str(source.path)))
    return source.path


def _eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: int) -> tuple[int, ...]:
    """Every id that ends a text, by all three places that may name one; sorted."""
    found: set[int] = set()
    for source in (model.generation_config, model.config, model.config.get_text_config(), tokenizer):
        value = getattr(source, "eos_token_id", None)
        found.update([] if value is None else [value] if isinstance(value, int) else value)
    return tuple(sorted(i for i in found if 0 <= i < rows))


def _context_length(model: PreTrainedModel, name: str) -> int | None:
    """What the config says, but no more than the rotary positions keep their frequencies for (`rotary`)."""
    text = model.config.get_text_config()
    values = (getattr(config, "max_position_embeddings", None) for config in (text, model.config))
    said = next((value for value in values if isinstance(value, int) and value > 0), None)
    steady = steady_positions(text)
    if steady is None or (said is not None and said <= steady):
        return said
    warn(
        f"{name}: texts can have {steady} tokens, not the {said} that its config says: beyond them its "
        "rotary positions have other frequencies, by which all of the text would have to be read again"
    )
    return steady
