"""The backends that the contract holds for. A new one is a function, and its name in `SUBJECTS`."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import Mock, patch

import ray
import torch
from accelerate import dispatch_model
from gguf import GGMLQuantizationType
from gguf_files import CountingLlama, plain_model, write_tiny_model
from llama_server import LlamaServer
from ray.exceptions import RayActorError
from ray_cluster import in_actor, start_ray
from sessions import OnFixedBuffers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from deepen_ext.cluster.actors import get
from deepen_ext.members.backend import Backend
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.hf.backend import HFBackend
from deepen_ext.members.hf.loaded_model import dense
from deepen_ext.members.hf.quantisation import quantise
from deepen_ext.members.http.address import read_address
from deepen_ext.members.http.backend import HttpBackend
from deepen_ext.members.http.client import Client
from deepen_ext.members.http.protocols import find_protocol
from deepen_ext.members.llama_cpp import api
from deepen_ext.members.llama_cpp.context import Context, Feed
from deepen_ext.members.llama_cpp.library import load_library
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.threads import Threads
from deepen_ext.members.member import Member
from deepen_ext.members.ray.actor import MemberActor
from deepen_ext.members.ray.backend import RayBackend
from deepen_ext.members.top_k_only import TopKOnly


@dataclass(repr=False)
class Subject:
    """A backend under test. What a kind of backend cannot do is None.

    Attributes:
        backend: of a model with 100 tokens or more, all of which a text may hold, and in which every token of
            a text counts.
        vocab_size: what the backend should say.
        context_length: the same; a few hundred tokens, of which tests fill all.
        device: the same.
        dtype: the same, of its `Description`.
        other_weights: makes a backend of the same model with other weights, and one of a copy in bfloat16.
        breaks: within it every forward pass fails; gives what the error should say of why.
        plain: the model's own logits [n, V] after each of n ids, without a session; among the most probable
            tokens some tie, as in `_model`.
        fed: how many tokens the model has read so far, padding included.
        cuts: a text can be cut anywhere, and its states grow with it; else it is read again.
        plain_tolerance: by which `plain` may differ, where its arithmetic is another; None: by `tolerance`.
        tolerance: by which two log-probabilities of one token after one text may differ, however it was fed.
    """

    backend: Backend
    vocab_size: int
    context_length: int | None
    device: torch.device
    dtype: str | None
    other_weights: Callable[[], tuple[Backend, Backend]]
    breaks: Callable[[], AbstractContextManager[str]] | None = None
    plain: Callable[[Sequence[int]], torch.Tensor] | None = None
    fed: Callable[[], int] | None = None
    cuts: bool = True
    plain_tolerance: float | None = None
    tolerance: float = 1e-4
    said: dict[tuple[int, ...], Distribution] = field(default_factory=dict)  # by fresh sessions, of these ids


_VOCAB = 120
_CONTEXT = 200
_CPU = torch.device("cpu")
_SHAPE = {
    "vocab_size": _VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": _CONTEXT,
}
_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def _model(family: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(_SHAPE | (_WINDOWS if "gemma" in family else {})))
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(4)  # from the usual initialisation no token would depend on another
        head = model.get_output_embeddings().weight
        head[1::10] = head[0::10]  # so that tokens tie
    return model.to(dtype)


def _transformers(
    family: str,
    dtype: torch.dtype = torch.float32,
    kind: type[HFBackend] = HFBackend,
    tolerance: float = 1e-4,
    prepared: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
    same_in_plain: Callable[[PreTrainedModel], PreTrainedModel] = lambda model: model,
) -> Subject:
    """A model as `prepared` makes it; `same_in_plain` makes one of the same values without that."""
    model = prepared(_model(family, dtype))
    untouched = same_in_plain(_model(family, dtype))
    untouched.set_attn_implementation("eager")  # sessions bring an attention of their own
    tokens = 0

    def count(_: object, inputs: tuple[torch.Tensor]) -> None:
        nonlocal tokens
        tokens += inputs[0].numel()

    model.get_input_embeddings().register_forward_pre_hook(count)

    def backend(model: PreTrainedModel, dtype: torch.dtype) -> HFBackend:
        return kind(family, model, _VOCAB, _CONTEXT, _CPU, dtype)

    def others() -> tuple[Backend, Backend]:
        changed = _model(family, dtype)
        next(changed.parameters()).data.mul_(1.01)
        changed = prepared(changed)
        coarse = same_in_plain(_model(family, dtype)).to(torch.bfloat16)
        return backend(changed, dtype), backend(coarse, torch.bfloat16)

    @contextmanager
    def breaks() -> Iterator[str]:
        """In the last layer, when the others have written the new states."""

        def fail(*_: object) -> None:
            raise RuntimeError("out of luck")

        hook = model.model.layers[-1].register_forward_pre_hook(fail)
        try:
            yield "out of luck"
        finally:
            hook.remove()

    def plain(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return untouched(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    return Subject(
        backend(model, dtype),
        vocab_size=_VOCAB,
        context_length=_CONTEXT,
        device=_CPU,
        dtype=str(dtype).removeprefix("torch."),
        other_weights=others,
        breaks=breaks,
        plain=plain,
        fed=lambda: tokens,
        tolerance=tolerance,
    )


def _on_disk(model: PreTrainedModel) -> PreTrainedModel:
    """Its last layer and its head wait on the disk."""
    folder = tempfile.mkdtemp(prefix="deepen-ext-offload-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    parts = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb"]
    places = dict.fromkeys(parts, "cpu") | {"model.layers.1": "disk", "lm_head": "disk"}
    return dispatch_model(model, places, offload_dir=folder, skip_keys=model._skip_keys_device_placement)


def _int8(model: PreTrainedModel) -> PreTrainedModel:
    quantise(model, "int8", _CPU)
    return model


def _rounded(model: PreTrainedModel) -> PreTrainedModel:
    """The weights of `_int8`, as they are."""
    for layer in _int8(model).modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(dense(layer.weight).clone(), requires_grad=False)
    return model


def top_k_only(inner: Subject, k: int) -> Subject:
    """The same with its logits hidden."""

    def others() -> tuple[Backend, Backend]:
        changed, coarse = inner.other_weights()
        return TopKOnly(changed, k), TopKOnly(coarse, k)

    return replace(inner, backend=TopKOnly(inner.backend, k), other_weights=others, said={})


def _tiny_member(family: str, changed: bool = False, dtype: torch.dtype = torch.float32) -> Member:
    """A model without a tokenizer: in the actors below the place of `load_member` is taken by this."""
    model = _model(family, dtype)
    if changed:
        next(model.parameters()).data.mul_(1.01)
    backend = HFBackend(family, model, _VOCAB, _CONTEXT, _CPU, dtype)
    backend.model.get_input_embeddings().register_forward_pre_hook(_count)
    return Member(family, backend, Mock(), Mock(), ())


_TOKENS = [0]  # that models of this process have read


def _count(_: object, inputs: tuple[torch.Tensor]) -> None:
    _TOKENS[0] += inputs[0].numel()


def _fed(_: MemberActor) -> int:
    return _TOKENS[0]


def _fail(*_: object) -> None:
    raise RuntimeError("out of luck")


def _break(actor: MemberActor) -> None:
    actor.hook = actor.member.model.model.layers[-1].register_forward_pre_hook(_fail)


def _mend(actor: MemberActor) -> None:
    actor.hook.remove()


_ACTORS: dict[tuple, tuple] = {}  # with what they say of themselves


def _ray(family: str) -> Subject:
    """A transformers model in an actor; of what is in its process, only calls tell."""
    start_ray()

    def backend(**options: object) -> RayBackend:
        """Actors are kept for other tests: each takes seconds to start."""
        key = (family, *options.items())
        with suppress(KeyError, RayActorError):
            in_actor(_ACTORS[key][0], lambda _: None)
            return RayBackend(*_ACTORS[key])
        actor = ray.remote(MemberActor).options(num_cpus=0).remote()
        _ACTORS[key] = actor, get(actor.load.remote(_tiny_member, family, options), 60)
        return RayBackend(*_ACTORS[key])

    own = backend()

    @contextmanager
    def breaks() -> Iterator[str]:
        in_actor(own.actor, _break)
        try:
            yield "out of luck"
        finally:
            in_actor(own.actor, _mend)

    return replace(
        _transformers(family),
        backend=own,
        other_weights=lambda: (backend(changed=True), backend(dtype=torch.bfloat16)),
        breaks=breaks,
        fed=lambda: in_actor(own.actor, _fed),
    )


@contextmanager
def _aborting() -> Iterator[str]:
    """llama.cpp's forward passes are aborted when they have begun."""
    abort = api.AbortCallback(lambda _: True)
    decode = Context.decode

    def aborted(context: Context, feeds: Sequence[Feed]) -> torch.Tensor:
        set_callback = context._call.llama_set_abort_callback
        set_callback(context._handle, abort, None)
        try:
            return decode(context, feeds)
        finally:
            set_callback(context._handle, api.AbortCallback(), None)

    with patch.object(Context, "decode", aborted):
        yield "it was aborted"


def _llama_cpp(
    family: str,
    tolerance: float = 3e-4,
    plain_tolerance: float | None = None,
) -> Subject:
    folder = Path(tempfile.mkdtemp(prefix="deepen-ext-"))
    atexit.register(shutil.rmtree, folder)

    def backend(name: str, seed: int, kind: GGMLQuantizationType) -> CountingLlama:
        size = {"vocab_size": _VOCAB, "context_length": _CONTEXT}
        path = write_tiny_model(folder / f"{name}.gguf", family, seed=seed, kind=kind, **size)
        model = LlamaModel(load_library(), path, family, _CPU)
        return CountingLlama(family, model, path, read_facts(path), threads=Threads(1, fixed=True))

    own_kind = GGMLQuantizationType.F32
    own = backend("own", 0, own_kind)
    reference = None if family == "mamba" else plain_model(folder / "own.gguf")

    def plain(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return reference(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    return Subject(
        own,
        vocab_size=_VOCAB,
        context_length=_CONTEXT,
        device=_CPU,
        dtype="float32",
        other_weights=lambda: (
            backend("other", 1, GGMLQuantizationType.F32),
            backend("coarse", 0, GGMLQuantizationType.BF16),
        ),
        breaks=_aborting,
        plain=None if reference is None else plain,
        fed=lambda: own.tokens,
        cuts=family != "mamba",
        plain_tolerance=plain_tolerance,
        tolerance=tolerance,
    )


def _http(slots: int) -> Subject:
    """llama.cpp's server, in another process."""
    folder = Path(tempfile.mkdtemp(prefix="deepen-ext-"))
    atexit.register(shutil.rmtree, folder)

    def serve(name: str, seed: int, port: int = 0) -> LlamaServer:
        size = {"vocab_size": _VOCAB, "context_length": _CONTEXT}
        file = write_tiny_model(folder / f"{name}.gguf", "llama", seed=seed, tokens=True, **size)
        return LlamaServer(file, slots, _CONTEXT, cache="F32", port=port)

    def backend(server: LlamaServer) -> HttpBackend:
        client = Client(read_address(server.url), None, 30.0, slots)
        protocol = find_protocol(client, None)
        return HttpBackend("served llama", client, protocol, _VOCAB, _CPU, slots)

    server = serve("own", 0)
    own = backend(server)
    reference = plain_model(folder / "own.gguf")

    def plain(ids: Sequence[int]) -> torch.Tensor:
        with torch.inference_mode():
            return reference(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]

    @contextmanager
    def breaks() -> Iterator[str]:
        """Nothing answers at its address, and no time is spent on asking again."""
        nonlocal server
        server.stop()
        try:
            with patch("deepen_ext.members.http.client._FIRST_PAUSE", 0.001):
                yield "gives no answer"
        finally:
            server = serve("own", 0, server.port)

    return Subject(
        own,
        vocab_size=_VOCAB,
        context_length=own.context_length,
        device=_CPU,
        dtype="float32",
        # A server's weights cannot be looked at: a copy is what has the same name.
        other_weights=lambda: (backend(serve("other", 1)), backend(server)),
        breaks=breaks,
        plain=plain,
    )


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "transformers": lambda: _transformers("llama"),
    "transformers, sliding windows": lambda: _transformers("gemma3_text"),
    "transformers, fixed buffers": lambda: _transformers("gemma3_text", kind=OnFixedBuffers),
    "transformers, float16": lambda: _transformers("llama", torch.float16, tolerance=0.1),
    "transformers, on disk": lambda: _transformers("llama", prepared=_on_disk),
    "transformers, int8": lambda: _transformers("llama", prepared=_int8, same_in_plain=_rounded),
    "llama.cpp": lambda: _llama_cpp("llama"),
    # Its activations are rounded to float16 in between.
    "llama.cpp, sliding windows": lambda: _llama_cpp("gemma3", tolerance=1e-3, plain_tolerance=0.02),
    "llama.cpp, no rollback": lambda: _llama_cpp("mamba"),
    "http, a slot for each lane": lambda: _http(5),
    "http, one slot": lambda: _http(1),
    "ray": lambda: _ray("llama"),
    "top-k only": lambda: top_k_only(_transformers("llama"), 20),
    "top-k only, sliding windows": lambda: top_k_only(_transformers("gemma3_text"), 7),
}
