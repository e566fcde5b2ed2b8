"""Finding, converting and loading the members of an ensemble."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from deepen_ext.errors import InputError, ModelError
from deepen_ext.members import embedded
from deepen_ext.members.gguf.convert import Progress, convert_gguf
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.checkpoint import adapter_refusal, load_model
from deepen_ext.members.hf.quiet import quiet
from deepen_ext.members.hf.tokenizer_file import load_tokenizer
from deepen_ext.members.member import Member
from deepen_ext.ops.checks import check_built_for
from deepen_ext.text.vocabulary import Vocabulary

__all__ = ["DTYPES", "Progress", "convert_gguf", "find_device", "load_member", "load_members", "resolve"]

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "tekken.json",
)


def resolve(name_or_path: str | Path, progress: Progress | None = None) -> Path | str:
    """What transformers can load: a local folder, or a hub name. A ``.gguf`` file is converted once and kept.

    ``demo:NAME`` is an embedded model (`embedded.MODELS`).

    Raises:
        InputError: there is no such file, folder or embedded model, and the text cannot be a hub name.
        ModelError: a ``.gguf`` file cannot be converted, an embedded model not fetched, or the folder
            holds an adapter.
    """
    if str(name_or_path).startswith("demo:"):
        return embedded.embedded(str(name_or_path).removeprefix("demo:"), progress)
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            raise ModelError(adapter_refusal(str(path)))
        if not (path / "config.json").is_file():
            raise InputError(
                f"{path}: the folder has no config.json; name the folder of a transformers model"
            )
        if not any((path / file).is_file() for file in _TOKENIZER_FILES):
            raise InputError(
                f"{path}: the folder has no tokenizer (none of {', '.join(_TOKENIZER_FILES)}); save it "
                "there with tokenizer.save_pretrained"
            )
        return path
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InputError(
                f"{path}: not a model; name a folder, a .gguf file or a hub name such as org/name"
            )
        return convert_gguf(path, progress)
    name = str(name_or_path)
    if path.suffix.lower() == ".gguf" or not _HUB_NAME.fullmatch(name):
        raise InputError(
            f"{name}: no such file or folder, and not a hub name (org/name); check the spelling of the path"
        )
    return name


def load_member(
    name_or_path: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Member:
    """Load a model and its tokenizer, ready for inference.

    Every weight must come from the checkpoint (`checkpoint.check_weights`), and the tokenizer is what its
    file tokenizer.json says, whatever class its config names (`tokenizer_file`).

    Args:
        name_or_path: hub name, local folder, ``.gguf`` file, or an embedded model (``demo:gemma-3-270m``).
        dtype: "float32", "float16", "bfloat16" or the ``torch.dtype``.
        device: where the model goes, for example "cpu" or "cuda:0".
        trust_remote_code: run code that the folder or the hub's repository brings along, where transformers
            has no class of its own for the model. False refuses such a model by name. Nothing asks on
            standard input.
        progress: called with one line of text as each stage starts.

    Raises:
        InputError: unknown path, hub name, dtype or device.
        ModelError: the model cannot be loaded, needs code of its own, lacks weights or has those of another
            architecture, or its tokenizer fails the byte round trip.
    """
    if type(trust_remote_code) is not bool:
        raise InputError(f"trust_remote_code is {trust_remote_code!r}; give True or False")
    torch_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if torch_dtype is None or torch_dtype not in DTYPES.values():
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    torch_device = find_device(device)
    target = resolve(name_or_path, progress)
    name = target.name if isinstance(target, Path) else target
    if progress is not None:
        progress(f"Loading {name}")
    with quiet():
        tokenizer = load_tokenizer(target, name, trust_remote_code=trust_remote_code)
        model = load_model(target, name, torch_dtype, trust_remote_code=trust_remote_code)
    model = model.to(torch_device).eval().requires_grad_(False)  # type: ignore[arg-type]
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


def load_members(
    members: Sequence[str | Path],
    *,
    dtype: str | torch.dtype | Sequence[str | torch.dtype] = "float32",
    device: str | torch.device | Sequence[str | torch.device] = "cpu",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> list[Member]:
    """Load several, as `load_member` does; dtype and device are one for all, or one for each.

    ``trust_remote_code`` holds for every member.

    Raises:
        InputError: see `load_member`; a number of dtypes or devices that is not the members'; a CUDA device
            that this build has no kernels for.
        ModelError: see `load_member`.
    """
    devices = [find_device(one) for one in _for_each("device", device, len(members))]
    for one in devices:
        check_built_for(one)
    dtypes = _for_each("dtype", dtype, len(members))
    return [
        load_member(name, dtype=kind, device=one, trust_remote_code=trust_remote_code, progress=progress)
        for name, kind, one in zip(members, dtypes, devices, strict=True)
    ]


def _for_each(what: str, value: Any, members: int) -> list[Any]:
    """One value for each member, from one for all or a list of them."""
    if isinstance(value, str | torch.dtype | torch.device):
        return [value] * members
    values = list(value)
    if len(values) != members:
        raise InputError(
            f"there are {len(values)} of {what} for {members} members; give one, or one for each"
        )
    return values


def find_device(device: str | torch.device) -> torch.device:
    """The device as tensors name it: with its index where it is CUDA.

    Raises:
        InputError: no such device, or a CUDA device that torch does not see.
    """
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise InputError(f"device must be like 'cpu' or 'cuda:0', got {device!r}") from error
    if found.type != "cuda":
        return found
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (found.index or 0) >= count:
        raise InputError(f"device {found}: torch sees {count} CUDA devices; use device='cpu'")
    return torch.device("cuda", torch.cuda.current_device()) if found.index is None else found


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
