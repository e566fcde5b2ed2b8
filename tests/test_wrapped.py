"""Members whose model stands in a wrapper, or whose linear layers are quantised, against the plain model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sessions import changed, open_session, sync
from tiny_models import one_byte_tokens, save_model
from torch.nn.functional import linear

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import ModelError
from deepen_ext.measure.doctor.member_facts import is_same_model
from deepen_ext.measure.likelihood.token_likelihoods import TokenLikelihoods
from deepen_ext.members.hf.loaded_model import dense, inner_model
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

TEXTS = {0: [1, 2, 3, 4, 5, 6], 1: [7, 8]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("wrapped") / "tiny", one_byte_tokens(), seed=1)


@pytest.fixture
def plain(folder: Path) -> Member:
    return load_member(folder)


class Adapted(torch.nn.Module):
    """Shaped as a PeftModel: two modules around the model, and a forward that takes anything."""

    class Tuner(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.model(*args, **kwargs)

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.base_model = self.Tuner(model)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model.model, name)

    def get_base_model(self) -> torch.nn.Module:
        return self.base_model.model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_model(*args, **kwargs)


class Int8(torch.Tensor):
    """Shaped as torchao's weights: float32 to the outside, whole numbers and scales within; linear is all."""

    @staticmethod
    def __new__(cls, weight: torch.Tensor) -> Int8:
        made = torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)
        made.scale = weight.abs().amax(dim=1, keepdim=True) / 127
        made.whole = (weight / made.scale).round().to(torch.int8)
        return made

    def dequantize(self) -> torch.Tensor:
        return self.whole * self.scale

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            x, weight, *bias = args
            return linear(x, weight.dequantize(), *bias)
        return super().__torch_function__(func, types, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{func} of quantised weights")


def compiled(model: torch.nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def quantise(model: torch.nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.weight = torch.nn.Parameter(Int8(layer.weight.detach()), requires_grad=False)


def batch(member: Member) -> torch.Tensor:
    with open_session(member, 2) as session, torch.inference_mode():
        return sync(session, TEXTS).clone()


@pytest.mark.parametrize("wrap", [Adapted, compiled, lambda model: compiled(Adapted(model))])
def test_texts_of_different_lengths_through_a_wrapper(folder: Path, plain: Member, wrap: Any) -> None:
    wanted = batch(plain)
    inner = load_member(folder)
    wrapped = changed(inner, model=wrap(inner.model))
    assert type(wrapped.model) is not type(inner.model)
    assert inner_model(wrapped.model) is inner.model
    with torch.compiler.set_stance(
        "force_eager"
    ):  # the wrapper is what is tested; tracing takes half a minute
        torch.testing.assert_close(batch(wrapped), wanted, atol=1e-6, rtol=1e-6)
    assert wrapped.backend.fingerprint() == plain.backend.fingerprint()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("PromptTuningConfig", {"num_virtual_tokens": 4}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
        ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
        ("AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 1}),
    ],
)
def test_an_adapter_before_the_text_is_refused(folder: Path, kind: str, more: dict[str, int]) -> None:
    """One text alone was written, wrongly: every forward had the adapter's states anew."""
    peft = pytest.importorskip("peft")
    inner = load_member(folder)
    wrapped = peft.get_peft_model(inner.model, getattr(peft, kind)(task_type="CAUSAL_LM", **more))
    for model in (wrapped, compiled(wrapped)):
        with pytest.raises(ModelError, match=r"tiny: its model has an adapter of the kind .* \(LoRA, IA3"):
            changed(inner, model=model)


@pytest.mark.slow
def test_an_adapter_that_changes_weights_is_taken(folder: Path, plain: Member) -> None:
    peft = pytest.importorskip("peft")
    inner = load_member(folder)
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])  # it changes nothing yet
    wrapped = changed(inner, model=peft.get_peft_model(inner.model, lora).eval())
    torch.testing.assert_close(batch(wrapped), batch(plain), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("texts", [{0: [1, 2, 3]}, TEXTS])
def test_a_wrapper_that_adds_positions(plain: Member, texts: dict[int, list[int]]) -> None:
    class Longer(Adapted):
        def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            for name in ("position_ids", "attention_mask"):
                kwargs.pop(name, None)
            return super().forward(input_ids=torch.cat([input_ids[:, :1], input_ids], 1), **kwargs)

    with (
        open_session(changed(plain, model=Longer(plain.model)), 2) as session,
        torch.inference_mode(),
        pytest.raises(ModelError, match=r"tiny: its model makes \d+ states of \d+ tokens"),
    ):
        sync(session, texts)


@pytest.mark.slow
def test_a_compiled_model_is_traced_as_one_graph(folder: Path, plain: Member) -> None:
    """A part that torch.compile cannot trace made the next forward fail, inside transformers."""
    inner = load_member(folder)
    whole = changed(inner, model=torch.compile(inner.model, backend="eager", fullgraph=True))
    torch.testing.assert_close(batch(whole), batch(plain), atol=1e-6, rtol=1e-6)


def test_a_wrapped_model_that_cannot_is_named_itself(plain: Member) -> None:
    plain.model.config._attn_implementation = "flex_attention"
    with pytest.raises(Exception, match=r"this model \(LlamaForCausalLM\) cannot run texts of different"):
        open_session(changed(plain, model=Adapted(plain.model)), 2)


def test_quantised_layers_keep_their_own_product(folder: Path) -> None:
    member = load_member(folder)
    rounded = load_member(folder)
    quantise(member.model)
    for layer, other in zip(member.model.modules(), rounded.model.modules(), strict=True):
        if isinstance(layer, torch.nn.Linear):
            other.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    wanted = batch(rounded)
    assert not torch.equal(wanted, batch(load_member(folder)))  # so rounding changes something
    torch.testing.assert_close(batch(member), wanted, atol=1e-5, rtol=1e-5)
    assert member.backend.fingerprint() == rounded.backend.fingerprint()


def test_quantised_embeddings_are_read_by_value(plain: Member) -> None:
    weight = Int8(plain.embedding.detach())
    assert dense(plain.embedding) is plain.embedding
    plain.model.get_input_embeddings().weight = torch.nn.Parameter(weight, requires_grad=False)
    assert type(plain.embedding) is torch.Tensor
    assert torch.equal(plain.embedding, weight.dequantize())


def test_wrapped_and_quantised_members_write(folder: Path) -> None:
    adapted, int8 = load_member(folder), load_member(folder)
    quantise(int8.model)
    members = [changed(adapted, model=Adapted(adapted.model), name="adapted"), replace(int8, name="int8")]
    texts = Ensemble(members).generate(["hello", "so it goes"], max_new_tokens=4)
    assert [len(one.token_ids) for one in texts] == [4, 4]


@pytest.mark.parametrize("change", ["wrapped", "quantised", "both quantised"])
def test_one_model_is_recognised_by_its_values(folder: Path, plain: Member, change: str) -> None:
    read = TokenLikelihoods([-1.0], [1], [True], 1)
    other = load_member(folder)
    if change == "wrapped":
        other = changed(other, model=Adapted(other.model))
    else:
        quantise(other.model)
    if change == "both quantised":
        quantise(plain.model)
    assert is_same_model(plain, other, read, read) == (change != "quantised")
