"""Members in transformers."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepen_ext.errors import ModelError
from deepen_ext.ground.progress import Progress
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.checkpoint import adapter_refusal, load_model
from deepen_ext.members.hf.gguf_conversion import convert_embedded, convert_gguf
from deepen_ext.members.hf.quiet import quiet
from deepen_ext.members.hf.tokenizer_file import load_tokenizer
from deepen_ext.members.load_options import LoadOptions, find_device
from deepen_ext.members.member import Member
from deepen_ext.members.source import Source
from deepen_ext.text.vocabulary import Vocabulary


def load(source: Source, options: LoadOptions, progress: Progress | None = None) -> Member:
    """A member that transformers computes. A GGUF file is converted once and kept.

    Every weight must come from the checkpoint (`checkpoint.check_weights`), and the tokenizer is what its
    file tokenizer.json says, whatever class its config names (`tokenizer_file`).

    Raises:
        InputError: the hub does not give the model, or an option that transformers does not have.
        ModelError: the model cannot be loaded, needs code of its own, lacks weights or has those of another
            architecture; its tokenizer fails the byte round trip; the folder holds an adapter.
    """
    options.refuse_others("transformers", "dtype")
    target = _target(source, progress)
    name = target.name if isinstance(target, Path) else target
    if progress is not None:
        progress(f"Loading {name}")
    trusted = options.trust_remote_code
    with quiet():
        tokenizer = load_tokenizer(target, name, trust_remote_code=trusted)
        model = load_model(target, name, options.torch_dtype, trust_remote_code=trusted)
    model = model.to(find_device(options.device)).eval().requires_grad_(False)  # type: ignore[arg-type]
    return member_of(model, tokenizer, name)


def member_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Member:
    """A member of a model and its tokenizer that are loaded already; the model stays where it is.

    Raises:
        ModelError: the tokenizer fails the byte round trip.
    """
    head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    size = int(head.weight.shape[0] if head is not None else model.config.get_text_config().vocab_size)
    return Member(
        name=name,
        backend=HFBackend(name, model, size, _context_length(model), model.device, model.dtype),
        tokenizer=tokenizer,
        vocabulary=Vocabulary.from_tokenizer(tokenizer, size, name=name),
        eos_ids=_eos_ids(model, tokenizer, size),
    )


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


def _context_length(model: PreTrainedModel) -> int | None:
    for config in (model.config.get_text_config(), model.config):
        value = getattr(config, "max_position_embeddings", None)
        if isinstance(value, int) and value > 0:
            return value
    return None
