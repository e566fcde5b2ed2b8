"""transformers members of any size: spread over devices and disk, of few bits, with adapters."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from sessions import open_session, sync
from tiny_models import one_byte_tokens, save_model
from tokenizers import AddedToken
from torchao.quantization import Int8WeightOnlyConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3nTextConfig,
    GPT2Config,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    TorchAoConfig,
)

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.hf import device_map, quantisation
from deepen_ext.members.hf.attention import NAME as OWN_ATTENTION
from deepen_ext.members.hf.bytes_needed import estimate_bytes
from deepen_ext.members.hf.checkpoint_bytes import checkpoint_bytes
from deepen_ext.members.hf.kv_cache import ManyLanes, cache_bytes
from deepen_ext.members.hf.placement import home, is_spread, layer_devices
from deepen_ext.members.hf.rooms import take_room
from deepen_ext.members.hf.session import _on_fixed_buffers
from deepen_ext.members.hf.weights import non_embedding_parameters, stored_bytes
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

CPU = torch.device("cpu")
TEXTS = {0: [1, 2, 3, 4, 5, 6, 7, 8], 1: [9, 10], 2: [1, 2, 3, 4, 5, 6, 11]}
PROMPT = "The capital of France is"
PROSE = (
    "The town stands on a hill above the river. Every morning the market opens at seven, and farmers "
    "from the valley bring bread, cheese and apples. In winter the road is often closed by snow, and the "
    "people live on what they stored in autumn. The school has two rooms and one teacher, who also rings "
    "the church bell."
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, not tied, with a tokenizer of bytes."""
    return save_model(tmp_path_factory.mktemp("any_size") / "tiny", one_byte_tokens(), seed=1)


@pytest.fixture(scope="module")
def plain(folder: Path) -> Member:
    return load_member(folder)


def batch(member: Member) -> torch.Tensor:
    """Logits of texts of different lengths, first together and then, longer, some of them."""
    with open_session(member, 3) as session, torch.inference_mode():
        first = sync(session, TEXTS).clone()
        more = sync(session, {2: [*TEXTS[2][:3], 5, 6], 1: [*TEXTS[1], 4]}).clone()
    return torch.cat([first, more])


def same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Up to the order of sums, which depends on where in memory the weights lie."""
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


def tied(folder: Path, target: Path) -> Path:
    """A copy whose head is the embedding."""
    shutil.copytree(folder, target)
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.tie_word_embeddings = True
    model.lm_head.weight = model.model.embed_tokens.weight
    model.save_pretrained(target)
    return target


# ---------------------------------------------------------------- device_map


@pytest.mark.parametrize(
    "places",
    [
        {"": "cpu", "model.layers.1": "disk"},
        {"model.layers": "disk", "model": "cpu", "lm_head": "cpu"},
        {"": "disk", "model.layers.0": "cpu"},
        {"": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"},
        {"": "cpu", "model.layers.0.mlp": "disk", "model.layers.1.self_attn.q_proj": "disk"},
    ],
)
def test_layers_on_the_disk_give_the_same(
    folder: Path, plain: Member, tmp_path: Path, places: dict[str, str]
) -> None:
    with pytest.warns(UserWarning, match="tiny: .* are on disk and are read from there at every step"):
        member = load_member(folder, device_map=places, offload_folder=tmp_path)
    assert any(weight.is_meta for weight in member.model.parameters())
    assert is_spread(member.model)
    assert member.device == CPU
    same(batch(member), batch(plain))
    for dtype in (None, torch.bfloat16):
        assert member.backend.fingerprint(dtype) == plain.backend.fingerprint(dtype)
    assert torch.equal(member.embedding, plain.embedding)
    assert member.backend.describe() == plain.backend.describe()
    with open_session(member, 3) as session:
        sync(session, TEXTS)
        assert 0 < session.bytes_held[CPU] <= member.backend.bytes_needed(3, 8)[CPU]


def test_a_tied_head_goes_to_the_disk_with_the_embedding(folder: Path, tmp_path: Path) -> None:
    model = tied(folder, tmp_path / "tied")
    whole = load_member(model)
    both = {"": "cpu", "model.embed_tokens": "disk", "lm_head": "disk"}
    with pytest.warns(UserWarning, match="are on disk"):
        member = load_member(model, device_map=both)
    same(batch(member), batch(whole))
    assert member.backend.fingerprint() == whole.backend.fingerprint()
    assert member.backend.describe() == whole.backend.describe()
    parted = load_member(folder).backend.describe()  # its head is a table of its own
    assert whole.backend.describe().non_embedding_parameters == parted.non_embedding_parameters
    with pytest.raises(InputError, match=r"lm_head.* on cpu and model\.embed_tokens.* on disk, .*one weight"):
        load_member(model, device_map={"": "cpu", "model.embed_tokens": "disk"})


@pytest.mark.parametrize("how", ["auto", "balanced", "sequential"])
def test_what_has_no_room_goes_to_the_disk_where_a_folder_is_given(
    folder: Path, plain: Member, tmp_path: Path, how: str
) -> None:
    same(batch(load_member(folder, device_map=how)), batch(plain))
    limit = {"cpu": plain.backend.describe().weights_bytes - 10_000}
    with pytest.raises(InputError, match=rf"device_map='{how}' has no room for .* GB.*offload_folder"):
        load_member(folder, device_map=how, max_memory=limit)
    with pytest.warns(UserWarning, match="are on disk"):
        member = load_member(folder, device_map=how, max_memory=limit, offload_folder=tmp_path)
    assert {str(one) for one in member.model.hf_device_map.values()} == {"cpu", "disk"}
    same(batch(member), batch(plain))


@pytest.mark.parametrize(
    "options",
    [{"device_map": {"": "disk"}}, {"device_map": "auto", "max_memory": {"cpu": "2KB"}}],
)
def test_no_room_for_a_single_layer(folder: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"device_map has no room: no part.*model\.embed_tokens, takes 0 MB|"
                                         r"device_map has no room: no part.*, takes"):  # fmt: skip
        load_member(folder, offload_folder=tmp_path, **options)


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ({"model.layer.0": "cpu", "": "cpu"}, r"names 'model\.layer\.0'.*no such part; .*model\.layers\.0"),
        ({"model.layers": "cpu"}, r"no device for model\.embed_tokens\.weight, model\.norm\.weight"),
        ({"": 7}, "cuda:7: torch sees"),
    ],
)
def test_mappings_that_do_not_fit_the_model(folder: Path, places: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_member(folder, device_map=places)


def test_weights_that_are_not_mapped_need_a_folder(folder: Path, plain: Member, tmp_path: Path) -> None:
    """Pickled weights cannot be read one by one from where they are."""
    pickled = Path(shutil.copytree(folder, tmp_path / "pickled"))
    torch.save(plain.model.state_dict(), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    places = {"": "cpu", "model.layers.1": "disk"}
    with pytest.raises(ModelError, match=r"offload_folder"), pytest.warns(UserWarning, match="are on disk"):
        load_member(pickled, device_map=places)
    with pytest.warns(UserWarning, match="are on disk"):
        member = load_member(pickled, device_map=places, offload_folder=tmp_path / "off")
    same(batch(member), batch(plain))


@pytest.mark.parametrize("options", [{}, {"device_map": "auto"}, {"quantization": "int8"}])
def test_room_is_looked_for_before_anything_is_loaded(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(device_map, "available_bytes", lambda device: 20_000)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # it is not reached
    with pytest.raises(InputError, match=r"its weights take 0\.00 GB on cpu, and 0\.00 GB are free; give"):
        load_member(folder, **options)


def test_bytes_of_a_checkpoint_by_its_headers(folder: Path, plain: Member, tmp_path: Path) -> None:
    size = sum(weight.nbytes for weight in plain.model.parameters())
    assert checkpoint_bytes(folder, torch.float32, None) == size
    assert checkpoint_bytes(folder, torch.bfloat16, None) == size // 2
    assert checkpoint_bytes(folder, "auto", None) == size
    plain.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert checkpoint_bytes(tmp_path, torch.float32, None) == size
    assert checkpoint_bytes("somebody/not-here", torch.float32, None) is None


def test_parts_on_several_devices(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As accelerate marks a model over two CUDA devices; here they are marks alone."""
    member = load_member(folder)
    model = member.model
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "lm_head": 1}
    for layer, device in ((0, 0), (1, torch.device("cuda:1"))):
        model.model.layers[layer].self_attn._hf_hook = SimpleNamespace(execution_device=device)
    several = SimpleNamespace(hooks=(SimpleNamespace(), SimpleNamespace(execution_device="cuda:0")))
    model.model.embed_tokens._hf_hook = several
    zero, one = torch.device("cuda:0"), torch.device("cuda:1")
    assert home(model) == zero
    assert layer_devices(model) == {0: zero, 1: one}
    backend = replace(member.backend, device=zero)
    caches = cache_bytes(backend, 2, 100)
    assert set(caches) == {zero, one}
    assert caches[zero] == caches[one] == sum(cache_bytes(load_member(folder).backend, 2, 100).values()) / 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    needed = estimate_bytes(backend, 2, 100)
    assert set(needed) == {zero, one}
    assert needed[zero] - needed[one] == 2 * 2 * member.vocab_size * 4  # the logits
    room = take_room(replace(member.backend), 2, 0)
    assert room.stream is None
    assert not _on_fixed_buffers(backend, room.cache)
    del model.hf_device_map
    assert _on_fixed_buffers(backend, room.cache)


def test_a_feed_is_moved_to_a_layer_s_device_once() -> None:
    index = torch.tensor([[0], [2]])
    feed = ManyLanes(torch.tensor([0, 2]), index, torch.tensor([[3], [4]]), first={None: 0}, end=5)
    assert feed.on(CPU) is feed
    moved = feed.on(torch.device("meta"))
    assert {one.device.type for one in (moved.lanes, moved.lane_index, moved.slots)} == {"meta"}
    assert (moved.first, moved.end) == (feed.first, feed.end)
    assert feed.on(torch.device("meta")) is moved


# ---------------------------------------------------------------- few bits


def linear_layers(member: Member) -> list[torch.nn.Linear]:
    """Those that are rounded: all but the head."""
    model = member.model
    return [
        one
        for one in model.modules()
        if isinstance(one, torch.nn.Linear) and one is not model.get_output_embeddings()
    ]


def test_int8_is_the_model_with_rounded_weights(folder: Path) -> None:
    member, rounded = load_member(folder, quantization="int8"), load_member(folder)
    pairs = list(zip(linear_layers(member), linear_layers(rounded), strict=True))
    for layer, other in pairs:
        error = (layer.weight.dequantize() - other.weight).abs().amax(1)
        assert bool((error <= other.weight.abs().amax(1) / 127 / 1.99).all())  # half a step of each row
        other.weight = torch.nn.Parameter(layer.weight.dequantize(), requires_grad=False)
    assert member.backend.dtype == torch.float32
    same(batch(member), batch(rounded))
    assert not torch.allclose(batch(member), batch(load_member(folder)), atol=1e-4)
    assert member.backend.fingerprint() == rounded.backend.fingerprint()
    assert member.backend.capabilities.repeatable
    described, whole = member.backend.describe(), rounded.backend.describe()
    assert described.parameters == whole.parameters
    assert described.non_embedding_parameters == whole.non_embedding_parameters
    # A byte a weight, and for each row a scale and a zero point.
    saved = sum(3 * layer.weight.numel() - 5 * layer.weight.shape[0] for layer, _ in pairs)
    assert described.weights_bytes == whole.weights_bytes - saved


def test_int8_lanes_are_as_alone(folder: Path) -> None:
    member = load_member(folder, quantization="int8")
    together = batch(member)
    alone = []
    for ids in (*TEXTS.values(), [*TEXTS[2][:3], 5, 6], [*TEXTS[1], 4]):
        with open_session(member) as session, torch.inference_mode():
            alone.append(sync(session, {0: ids}).clone())
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_int4_is_bfloat16_with_half_a_byte_a_weight(folder: Path) -> None:
    member, coarse = load_member(folder, quantization="int4"), load_member(folder, dtype="bfloat16")
    assert member.backend.dtype == torch.bfloat16
    assert not member.backend.capabilities.repeatable
    layers = linear_layers(member)
    packed = sum(one.weight.numel() * (1 / 2 + 2 * 2 / quantisation.GROUP) for one in layers)
    whole = coarse.backend.describe().weights_bytes
    assert member.backend.describe().weights_bytes == whole - 2 * sum(
        one.weight.numel() for one in layers
    ) + int(packed)
    step = max(float(one.weight.max() - one.weight.min()) / 15 for one in linear_layers(coarse))
    for layer, other in zip(layers, linear_layers(coarse), strict=True):
        values = layer(torch.eye(32, dtype=torch.bfloat16)).T
        assert float((values - other.weight).abs().max()) <= 0.75 * step
    assert member.backend.fingerprint() == load_member(folder, quantization="int4").backend.fingerprint()
    assert member.backend.fingerprint() != coarse.backend.fingerprint()


def test_the_head_and_the_embedding_stay(folder: Path, plain: Member) -> None:
    for kind in ("int8", "int4"):
        member = load_member(folder, quantization=kind)
        assert torch.equal(member.embedding, plain.embedding.to(member.backend.dtype))
        head = member.model.get_output_embeddings().weight
        assert torch.equal(head, plain.model.lm_head.weight.to(member.backend.dtype))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantization": "int4", "dtype": "float32"}, "made for bfloat16 .*twenty times.*Leave dtype out"),
        ({"quantization": "int4", "dtype": torch.float16}, "with dtype=float16"),
        ({"quantization": "int8", "device_map": {"": "cpu", "lm_head": "disk"}}, "torchao's weights cannot"),
    ],
)
def test_wrong_combinations(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^tiny: quantization=.*{message}"):
        load_member(folder, **options)


def test_int8_takes_every_dtype(folder: Path) -> None:
    for dtype in ("float16", "bfloat16"):
        member = load_member(folder, quantization="int8", dtype=dtype)
        assert str(batch(member).dtype) == f"torch.{dtype}"


def test_int4_needs_whole_groups(folder: Path, tmp_path: Path) -> None:
    odd = Path(shutil.copytree(folder, tmp_path / "odd"))
    model = LlamaForCausalLM.from_pretrained(folder)
    model.config.intermediate_size = 48
    LlamaForCausalLM(model.config).save_pretrained(odd)
    with pytest.raises(InputError, match=r"32 inputs .*0\.mlp\.down_proj has 48 and 32; give .*int8"):
        load_member(odd, quantization="int4")
    load_member(odd, quantization="int8")


def test_experts_are_not_rounded(folder: Path, tmp_path: Path) -> None:
    mixture = Path(shutil.copytree(folder, tmp_path / "mixture"))
    config = LlamaForCausalLM.from_pretrained(folder).config
    shape = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(num_local_experts=4, **shape, **layers))
    model.save_pretrained(mixture)
    with pytest.warns(UserWarning, match=r"leaves 0\.00 GB as they are, .*0\.mlp\.experts\.gate_up_proj"):
        member = load_member(mixture, quantization="int8")
    assert member.backend.describe().weights_bytes < load_member(mixture).backend.describe().weights_bytes


def test_devices_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with pytest.raises(InputError, match=r"m: quantization='int4' on cuda:0.*8\.0 or above.*7\.5.*int8"):
        quantisation.check_device("int4", torch.device("cuda:0"), "m")
    quantisation.check_device("int8", torch.device("cuda:0"), "m")
    with pytest.raises(InputError, match="'int8' on mps: torchao has kernels for the CPU and for CUDA"):
        quantisation.check_device("int8", torch.device("mps"), "m")


@pytest.mark.parametrize(
    ("options", "package"),
    [
        ({"quantization": "int8"}, "torchao"),
        ({"device_map": "auto"}, "accelerate"),
        ({"adapter": "somebody/adapter"}, "peft"),
    ],
)
def test_packages_that_are_missing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], package: str
) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(InputError, match=f"^tiny: .*needs {package}; install with pip install {package}"):
        load_member(folder, **options)


# ---------------------------------------------------------------- quantised checkpoints


@pytest.fixture(scope="module")
def quantised(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of torchao's weights."""
    target = Path(shutil.copytree(folder, tmp_path_factory.mktemp("quantised") / "tiny-int8"))
    (target / "model.safetensors").unlink()
    config = TorchAoConfig(Int8WeightOnlyConfig())
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    model.save_pretrained(target)
    return target


def test_a_quantised_checkpoint(folder: Path, quantised: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        member = load_member(quantised)
    same(batch(member), batch(load_member(folder, quantization="int8")))
    assert not member.backend.capabilities.repeatable  # of others' packing nobody knows
    described, whole = member.backend.describe(), load_member(folder).backend.describe()
    assert described.parameters == whole.parameters
    assert described.non_embedding_parameters == whole.non_embedding_parameters
    assert member.backend.fingerprint() == load_member(quantised).backend.fingerprint()
    spread = load_member(quantised, device_map="auto")
    same(batch(spread), batch(member))
    with pytest.raises(InputError, match="quantised already, by torchao; leave quantization='int8' out"):
        load_member(quantised, quantization="int8")


@pytest.mark.parametrize(
    ("method", "packages"),
    [
        ("gptq", "gptqmodel and optimum"),
        ("awq", "gptqmodel"),
        ("bitsandbytes", "bitsandbytes"),
        ("compressed-tensors", "compressed-tensors"),
    ],
)
def test_packages_of_a_quantised_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, packages: str
) -> None:
    target = Path(shutil.copytree(folder, tmp_path / "packed"))
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "load_in_4bit": True}
    (target / "config.json").write_text(json.dumps(config))
    found = quantisation.find_spec
    monkeypatch.setattr(quantisation, "find_spec", lambda name: found(name) if name == "accelerate" else None)
    install = packages.replace(" and ", " ")
    with pytest.raises(
        ModelError, match=f"packed: .*by {method}, which needs {packages}; .*install {install}$"
    ):
        load_member(target)


def test_kernels_that_are_missing_are_found_at_once(quantised: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise NotImplementedError("no kernel for this\nand more")

    monkeypatch.setattr(LlamaForCausalLM, "forward", fails)
    with pytest.raises(
        ModelError, match=r"by torchao, whose kernels do not run on cpu: no kernel for this\."
    ):
        load_member(quantised)


def test_bytes_of_weights_whose_scales_hang_on_them() -> None:
    """As bitsandbytes keeps them."""
    model = torch.nn.Linear(8, 4, bias=False)
    weight = torch.nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)
    inner = SimpleNamespace(absmax=torch.zeros(3), code=torch.zeros(16), dtype=torch.float32)
    weight.quant_state = SimpleNamespace(absmax=torch.zeros(2, dtype=torch.uint8), state2=inner)
    model.weight = weight
    assert stored_bytes(model) == 16 + 2 + 4 * (3 + 16)


# ---------------------------------------------------------------- adapters


def save_adapter(folder: Path, target: Path, config: Any, *, tokens: int = 0) -> torch.Tensor:
    """An adapter of random weights on the folder's model; its own logits of `TEXTS[0]`, not merged."""
    torch.manual_seed(3)
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokens:
        tokenizer.add_tokens([AddedToken(f"<new{i}>") for i in range(tokens)])
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    adapted = get_peft_model(model, config)
    for weight in adapted.parameters():
        if weight.requires_grad:
            weight.data.normal_(0, 0.3)
    adapted.save_pretrained(target)
    if tokens:
        tokenizer.save_pretrained(target)
    with torch.inference_mode():
        return adapted(input_ids=torch.tensor([TEXTS[0]])).logits[0, -1]


def lora(**more: Any) -> LoraConfig:
    return LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **more)


KINDS = {
    "lora": lora(),
    "lora with a head of its own": lora(modules_to_save=["lm_head"]),
    "ia3": IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("named", ["keyword", "name"])
def test_an_adapter_on_its_base(folder: Path, plain: Member, tmp_path: Path, kind: str, named: str) -> None:
    adapter = tmp_path / "style"
    wanted = save_adapter(folder, adapter, KINDS[kind])
    member = (
        load_member(folder, adapter=adapter) if named == "keyword" else load_member(f"{folder}@{adapter}")
    )
    assert member.name == "tiny@style"
    assert type(member.model) is LlamaForCausalLM  # merged
    same(batch(member)[0], wanted)
    assert not torch.allclose(batch(member)[0], batch(plain)[0], atol=1e-2)
    assert member.backend.fingerprint() != plain.backend.fingerprint()
    assert member.backend.capabilities.repeatable
    texts = Ensemble([plain, member]).generate(["hello", "so it goes"], max_new_tokens=4)
    assert [len(one.token_ids) for one in texts] == [4, 4]


def test_weights_are_rounded_after_the_merge(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "style", lora())
    member = load_member(f"{folder}@{tmp_path / 'style'}", quantization="int8")
    merged = load_member(f"{folder}@{tmp_path / 'style'}")
    for layer, other in zip(linear_layers(member), linear_layers(merged), strict=True):
        error = (layer.weight.dequantize() - other.weight).abs().amax(1)
        assert bool((error <= other.weight.abs().amax(1) / 127 / 1.99).all())


def test_on_a_quantised_checkpoint_the_adapter_stays_beside(
    quantised: Path, folder: Path, tmp_path: Path
) -> None:
    save_adapter(folder, tmp_path / "style", lora())
    with pytest.warns(UserWarning, match="was trained on .*tiny, by its config"):
        member = load_member(quantised, adapter=tmp_path / "style")
    assert isinstance(member.model, PeftModel)
    base = load_member(quantised)
    assert member.backend.fingerprint() != base.backend.fingerprint()
    with torch.inference_mode():
        alone = member.model(input_ids=torch.tensor([TEXTS[0]])).logits[0, -1]
    same(batch(member)[0], alone)
    assert not torch.allclose(batch(member)[0], batch(base)[0], atol=1e-2)


def change_base(folder: Path, target: Path, **config: Any) -> Path:
    """A model of another shape, with the same tokenizer."""
    shutil.copytree(folder, target)
    settings = LlamaForCausalLM.from_pretrained(folder).config
    settings.update(config)
    LlamaForCausalLM(settings).save_pretrained(target)
    return target


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_size": 64}, r"does not fit: \S*layers\.0\S*lora_A\S* is \[4, 64\], not \[4, 32\]"),
        ({"num_hidden_layers": 3}, r"places that this model does not have, .*layers\.2\."),
        ({"num_hidden_layers": 1}, r"lacks weights for layers that this model has, .*layers\.1\."),
    ],
)
def test_an_adapter_for_another_base(
    folder: Path, tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    other = change_base(folder, tmp_path / "tiny", **config)
    save_adapter(other, tmp_path / "style", lora())
    with pytest.raises(ModelError, match=f"tiny: the adapter .*{message}.*made for another base model"):
        load_member(folder, adapter=tmp_path / "style")


def test_layers_that_the_base_has_not(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "style", lora())
    file = tmp_path / "style" / "adapter_config.json"
    file.write_text(file.read_text().replace('"up_proj"', '"fc_in"').replace('"q_proj"', '"c_attn"'))
    with pytest.raises(ModelError, match=r"cannot be put on: Target modules .* not found"):
        load_member(folder, adapter=tmp_path / "style")


def test_another_name_of_the_base_is_a_warning(folder: Path, plain: Member, tmp_path: Path) -> None:
    renamed = Path(shutil.copytree(folder, tmp_path / "renamed"))
    wanted = save_adapter(folder, tmp_path / "style", lora())
    with pytest.warns(
        UserWarning, match=r"renamed: the adapter .*style was trained on .*tiny, by its config"
    ):
        member = load_member(renamed, adapter=tmp_path / "style")
    same(batch(member)[0], wanted)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_member(folder, adapter=tmp_path / "style")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "kind PREFIX_TUNING, which puts"),
        (lora(), "is for the task SEQ_CLS; a member needs one for CAUSAL_LM"),
    ],
)
def test_adapters_of_other_kinds(folder: Path, tmp_path: Path, config: Any, message: str) -> None:
    save_adapter(folder, tmp_path / "style", config)
    file = tmp_path / "style" / "adapter_config.json"
    if "SEQ_CLS" in message:
        file.write_text(file.read_text().replace("CAUSAL_LM", "SEQ_CLS"))
    with pytest.raises(ModelError, match=message):
        load_member(folder, adapter=tmp_path / "style")


def test_an_adapter_brings_tokens(folder: Path, plain: Member, tmp_path: Path) -> None:
    wanted = save_adapter(folder, tmp_path / "style", lora(), tokens=3)
    member = load_member(folder, adapter=tmp_path / "style")
    assert member.vocab_size == plain.vocab_size + 3
    assert member.vocabulary.encode("a<new1>") == [*plain.vocabulary.encode("a"), plain.vocab_size + 1]
    same(batch(member)[0], wanted)


@pytest.mark.parametrize("keep", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {}], ids=str)
def test_a_size_is_without_what_an_adapter_brings_for_embeddings(folder: Path, keep: dict[str, Any]) -> None:
    size = load_member(folder).size
    targets = ["q_proj"] if keep else ["q_proj", "embed_tokens"]
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder), LoraConfig(target_modules=targets, **keep)
    )
    added = sum(w.numel() for name, w in model.named_parameters() if "q_proj.lora" in name)
    assert non_embedding_parameters(model) == size + added


@pytest.mark.parametrize(
    ("config", "tables"),
    [
        (GPT2Config(vocab_size=50, n_positions=16, n_embd=8, n_layer=1, n_head=2), "wte wpe"),
        (
            Gemma3nTextConfig(
                vocab_size=50,
                vocab_size_per_layer_input=50,
                hidden_size=8,
                hidden_size_per_layer_input=4,
                intermediate_size=8,
                num_hidden_layers=2,
                num_kv_shared_layers=0,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=4,
                laurel_rank=2,
                layer_types=["full_attention"] * 2,
            ),
            "embed_tokens embed_tokens_per_layer",
        ),
    ],
    ids=["positions", "a table for each layer"],
)
def test_a_size_is_without_every_table(config: Any, tables: str) -> None:
    model = AutoModelForCausalLM.from_config(config)
    named = {name: w.numel() for name, w in model.named_parameters()}
    left = [n for name, n in named.items() if not {*tables.split()} & {*name.split(".")}]
    assert len(named) - len(left) == len(tables.split())
    assert non_embedding_parameters(model) == sum(left)


def test_tokens_without_embeddings(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "style", lora())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "style")
    with pytest.raises(
        ModelError, match=r"brings the token '<new>'.*no embedding.*save_embedding_layers=True"
    ):
        load_member(folder, adapter=tmp_path / "style")


def test_a_tokenizer_of_another_base(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "style", lora())
    for file in folder.glob("tokenizer*.json"):
        shutil.copy(file, tmp_path / "style")
    load_member(folder, adapter=tmp_path / "style")
    file = tmp_path / "style" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    with pytest.raises(ModelError, match=r"brings a tokenizer in which 'a' is \d+, not \d+"):
        load_member(folder, adapter=tmp_path / "style")


def test_an_adapter_needs_weights_in_memory(folder: Path, tmp_path: Path) -> None:
    save_adapter(folder, tmp_path / "style", lora())
    places = {"": "cpu", "model.layers.1": "disk"}
    with (
        pytest.raises(ModelError, match="cannot be put on weights that wait on the disk"),
        pytest.warns(UserWarning, match="are on disk"),
    ):
        load_member(folder, adapter=tmp_path / "style", device_map=places)
    spread = load_member(folder, adapter=tmp_path / "style", device_map="auto")
    same(batch(spread), batch(load_member(folder, adapter=tmp_path / "style")))


# ---------------------------------------------------------------- revision, attention


def test_a_revision_of_the_hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over a cache of the hub with two revisions, and no network."""
    first, second = "a" * 40, "b" * 40
    repository = tmp_path / "models--somebody--tiny"
    shutil.copytree(folder, repository / "snapshots" / first)
    save_model(repository / "snapshots" / second, one_byte_tokens(), seed=2)
    (repository / "refs").mkdir()
    for name, commit in (("main", first), ("v2", second)):
        (repository / "refs" / name).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    prints = {
        revision: load_member("somebody/tiny", **({} if revision is None else {"revision": revision}))
        .backend.fingerprint()
        for revision in (None, "main", "v2", first, second)
    }  # fmt: skip
    assert prints[None] == prints["main"] == prints[first] == load_member(folder).backend.fingerprint()
    assert prints["v2"] == prints[second] != prints["main"]
    with pytest.raises(InputError, match="somebody/tiny"):
        load_member("somebody/tiny", revision="v3")


def test_a_folder_has_no_revision(folder: Path) -> None:
    with pytest.raises(InputError, match="tiny: revision='main' is for models of the hub"):
        load_member(folder, revision="main")


@pytest.mark.parametrize(
    ("asked", "used"), [(None, OWN_ATTENTION), ("sdpa", OWN_ATTENTION), ("eager", "eager")]
)
def test_attention_that_sessions_can_use(folder: Path, plain: Member, asked: str | None, used: str) -> None:
    member = load_member(folder, **({} if asked is None else {"attn_implementation": asked}))
    same(batch(member), batch(plain))
    assert member.model.config._attn_implementation == used


@pytest.mark.parametrize("asked", ["flash_attention_2", "flash_attention_3", "flex_attention", "paged|sdpa"])
def test_attention_that_sessions_cannot_use(folder: Path, asked: str) -> None:
    with pytest.raises(InputError, match=r"tiny: attn_implementation='.*': sessions give each text a mask"):
        load_member(folder, attn_implementation=asked)


# ---------------------------------------------------------------- real models


def bits_a_byte(member: Member) -> float:
    ids = member.vocabulary.prefix_ids + member.vocabulary.encode(PROSE)
    with open_session(member) as session, torch.inference_mode():
        blocks = [block.scores().clone() for block in session.read(0, ids, 0, 1)]
    logprobs = torch.cat(blocks).float().log_softmax(-1)
    start = max(len(member.vocabulary.prefix_ids), 1)
    wanted = logprobs[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None])
    return -float(wanted.sum()) / math.log(2) / len(PROSE.encode())


def greedy(member: Member, tokens: int) -> str:
    ids = member.vocabulary.prefix_ids + member.vocabulary.encode(PROMPT)
    start = len(ids)
    with open_session(member) as session, torch.inference_mode():
        for _ in range(tokens):
            ids.append(int(sync(session, {0: ids}).argmax()))
    return member.tokenizer.decode(ids[start:])


@pytest.mark.slow
@pytest.mark.parametrize("model", ["smollm2", "gemma"])
@pytest.mark.parametrize(("kind", "bytes_share", "worse"), [("int8", 0.75, 0.01), ("int4", 0.4, 0.12)])
def test_real_models_of_few_bits(
    request: pytest.FixtureRequest, model: str, kind: str, bytes_share: float, worse: float
) -> None:
    folder, whole = request.getfixturevalue(f"{model}_dir"), request.getfixturevalue(model)
    member = load_member(folder, quantization=kind)
    assert member.backend.describe().weights_bytes < bytes_share * whole.backend.describe().weights_bytes
    before, after = bits_a_byte(whole), bits_a_byte(member)
    assert 0.5 < before < 2
    assert abs(after - before) < worse
    assert re.search(r"Paris|France|capital|city", greedy(member, 12))


@pytest.mark.slow
def test_a_real_model_with_layers_on_the_disk(smollm2_dir: Path, smollm2: Member) -> None:
    odd = {f"model.layers.{i}": "disk" for i in range(1, 30, 2)}
    with pytest.warns(UserWarning, match=r"0\.21 of 0\.54 GB"):
        member = load_member(smollm2_dir, device_map={"": "cpu", **odd})
    targets = {0: smollm2.vocabulary.encode(PROSE), 1: smollm2.vocabulary.encode(PROMPT)}
    with open_session(member, 2) as spread, open_session(smollm2, 2) as whole, torch.inference_mode():
        for extra in ([], [5], [7, 8]):
            asked = {lane: [*ids, *extra] for lane, ids in targets.items()}
            same(sync(spread, asked), sync(whole, asked), 1e-4)
    assert member.backend.fingerprint() == smollm2.backend.fingerprint()


@pytest.mark.slow
def test_a_real_adapter(smollm2_dir: Path, smollm2: Member, tmp_path: Path) -> None:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    save_adapter(smollm2_dir, tmp_path / "style", config)
    member = load_member(f"{smollm2_dir}@{tmp_path / 'style'}")
    base = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32)
    adapted = PeftModel.from_pretrained(base, tmp_path / "style").eval()
    ids = smollm2.vocabulary.encode(PROSE)
    with open_session(member) as session, torch.inference_mode():
        found = sync(session, {0: ids})
        wanted = adapted(input_ids=torch.tensor([ids])).logits[0, -1:]
    torch.testing.assert_close(found, wanted, atol=2e-3, rtol=2e-3)
    assert member.backend.fingerprint() != smollm2.backend.fingerprint()
