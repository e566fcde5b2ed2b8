"""Finding, converting and loading models, and what an interruption or a damaged file leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from deepen_ext.errors import InputError, ModelError
from deepen_ext.ground.cache_folder import atomic_write
from deepen_ext.members.hf.gguf_conversion import convert_gguf
from deepen_ext.members.hf.gguf_reader import read_once
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.members.source import Source, find_source

ROOT = Path(__file__).parent.parent
ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
MERGES = ["a b", "Ġ Ġ", "Ġ 1"]
TEMPLATE = "{{ bos_token }}{{ messages[0]['content'] }}"


@pytest.fixture
def assets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of its own."""
    folder = tmp_path / "assets"
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole Llama model of one layer in a GGUF file, quantised to Q8_0, with a byte-level tokenizer."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(path: Path, without: str = "", more: Any = None, **further: tuple[int, ...]) -> Path:
    """The file without the weights of this name, or with more; `more(writer)` adds settings."""
    tokens = ["<unk>", "<s>", "</s>", "<eot>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES)]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 3, *([1] * (len(tokens) - 4))])
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_eot_token_id(3)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)
    if more is not None:
        more(writer)
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), 64),
        "blk.0.attn_q": (64, 64),
        "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64),
        "blk.0.attn_output": (64, 64),
        "blk.0.ffn_gate": (96, 64),
        "blk.0.ffn_up": (96, 64),
        "blk.0.ffn_down": (64, 96),
        **further,
    }
    shapes.pop(without, None)
    for name, shape in shapes.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        blocks = gguf.quants.quantize(random.standard_normal(shape, dtype=np.float32), kind)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", random.standard_normal(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if ".tmp-" in path.name]


def test_weights_that_transformers_would_drop_are_refused(assets: Path, tmp_path: Path) -> None:
    """Without them it would be another model, and transformers says nothing."""
    path = write_gguf(tmp_path / "more.gguf", **{"blk.0.attn_q_norm": (32,)})
    with pytest.raises(ModelError, match=r"no place: blk\.0\.attn_q_norm\.weight \(1 in all\).*llama\.cpp"):
        convert_gguf(path)
    path = write_gguf(tmp_path / "vision.gguf", **{"mm.0": (32,)})
    with pytest.warns(UserWarning, match=r"vision\.gguf: left out of the file.*mm\.0\.weight"):
        convert_gguf(path)


def test_conversion_keeps_exact_weights(tiny_gguf: Path, assets: Path) -> None:
    messages: list[str] = []
    folder = convert_gguf(tiny_gguf, messages.append)
    weights = load_file(folder / "model.safetensors")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tiny_gguf).tensors}
    pairs = {"model.layers.0.mlp.down_proj": "blk.0.ffn_down", "model.embed_tokens": "token_embd"}
    for ours, theirs in pairs.items():
        tensor = tensors[f"{theirs}.weight"]
        exact = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(weights[f"{ours}.weight"], exact)
        assert exact.dtype == torch.float32
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert messages
    assert not leftovers(assets)

    stamp = (folder / "model.safetensors").stat().st_mtime_ns
    messages.clear()
    moved = shutil.copy(tiny_gguf, assets)
    assert convert_gguf(Path(moved), messages.append) == folder  # by content, wherever the file lies
    assert not messages
    assert (folder / "model.safetensors").stat().st_mtime_ns == stamp


def test_conversion_follows_the_file_where_transformers_does_not(tiny_gguf: Path, assets: Path) -> None:
    member = load_member(tiny_gguf, backend="transformers")
    assert member.name == "tiny"
    assert member.vocabulary.prefix_ids == [1]  # add_bos_token
    assert member.eos_ids == (2, 3)  # eos and end of turn
    assert member.context_length == 128
    pieces = [member.vocabulary.bytes_of(i) for i in member.vocabulary.encode("ab  12")]
    assert pieces == [b"ab", b"  ", b"1", b"2"]  # digits apart, before the spaces are cut


def test_embedded_tokenizers_are_the_original_ones(smollm2: Member, gemma: Member) -> None:
    def pieces(member: Member, text: str) -> list[bytes]:
        return [member.vocabulary.bytes_of(i) for i in member.vocabulary.encode(text)]

    assert smollm2.vocabulary.prefix_ids == []
    assert smollm2.eos_ids == (smollm2.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert pieces(smollm2, "  12 apples") == [b"  ", b"1", b"2", b" apples"]
    assert gemma.vocabulary.prefix_ids == [gemma.tokenizer.convert_tokens_to_ids("<bos>")] == [2]
    assert gemma.eos_ids == (1,)
    assert pieces(gemma, "Hello world") == [b"Hello", b" world"]  # no dummy space in front
    assert pieces(gemma, "a\n\n\n    b") == [b"a", b"\n\n\n", b"    ", b"b"]
    assert (smollm2.context_length, gemma.context_length) == (8192, 32768)


def test_a_gguf_is_parsed_once_and_to_the_same(tiny_gguf: Path) -> None:
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    plain = gguf.GGUFReader(tiny_gguf)
    with pytest.raises(RuntimeError, match="stop"), read_once():  # noqa: PT012
        quick = gguf.GGUFReader(str(tiny_gguf))
        assert gguf.GGUFReader(str(tiny_gguf)) is quick
        assert type(quick.data) is np.ndarray
        assert not quick.data.flags.writeable
        assert list(quick.fields) == list(plain.fields)
        assert all(quick.fields[name].contents() == field.contents() for name, field in plain.fields.items())
        assert [one.name for one in quick.tensors] == [one.name for one in plain.tensors]
        pairs = zip(quick.tensors, plain.tensors, strict=True)
        assert all(np.array_equal(one.data, other.data) for one, other in pairs)
        raise RuntimeError("stop")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


CONVERT = """
import sys, time
from pathlib import Path
from deepen_ext.members.hf.gguf_conversion import convert_gguf

def progress(message):
    print(message, flush=True)
    if sys.argv[2:] == ["stop"] and message.endswith("saving the weights"):
        time.sleep(600)

print(convert_gguf(Path(sys.argv[1]), progress), flush=True)
"""


@pytest.mark.slow
def test_a_killed_conversion_is_never_taken_for_whole(tiny_gguf: Path, tmp_path: Path) -> None:
    """One process is killed in the middle of the conversion while a second waits for it."""
    environment = {**os.environ, "HF_ASSETS_CACHE": str(tmp_path)}

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", CONVERT, str(tiny_gguf), *arguments]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True)

    with start("stop") as first:
        assert first.stdout is not None
        assert any("saving the weights" in line for line in first.stdout)
        (half,) = leftovers(tmp_path)
        assert (half / "tokenizer.json").is_file()  # it is in the middle
        assert not (half / "model.safetensors").exists()
        with start() as second:
            assert second.stdout is not None
            assert second.stdout.readline().startswith("Waiting for another process")
            assert not list(tmp_path.glob("deepen_ext/models/*/tiny"))
            first.send_signal(signal.SIGKILL)
            *_, last = second.stdout
    assert (first.returncode, second.returncode) == (-signal.SIGKILL, 0)
    folder = Path(last.strip())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not leftovers(tmp_path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "map"
    target.write_text("old")
    for name in ("map", "another"):  # of a killed process, with what its library left there
        old_rest = tmp_path / f".{name}.tmp-{'0f' * 16}"
        old_rest.mkdir()
        (old_rest / ".tmpAb12cD").write_text("half")
        os.utime(old_rest, (0, 0))
    with pytest.raises(RuntimeError, match="disk"), atomic_write(target) as temporary:  # noqa: PT012
        temporary.write_text("ne")
        raise RuntimeError("disk")
    assert [path.name for path in tmp_path.iterdir()] == ["map"]
    assert target.read_text() == "old"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text() == "new"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.99])
def test_a_truncated_gguf_is_refused(tiny_gguf: Path, assets: Path, tmp_path: Path, share: float) -> None:
    cut = tmp_path / "cut.gguf"
    content = tiny_gguf.read_bytes()
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ModelError, match=r"cut\.gguf: cannot read this GGUF file.*truncated"):
        load_member(cut, backend="transformers")
    assert not leftovers(assets)
    assert not list(assets.rglob("config.json"))


def test_a_gguf_that_lacks_weights_is_refused(assets: Path, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "lacks.gguf", without="blk.0.ffn_down")
    with pytest.raises(ModelError, match=r"lacks\.gguf: the checkpoint lacks .*layers\.0\.mlp\.down_proj"):
        load_member(path, backend="transformers")
    assert not list(assets.rglob("config.json"))


def test_the_head_of_a_gguf_is_tied_only_where_it_has_none(
    tiny_gguf: Path, assets: Path, tmp_path: Path
) -> None:
    file = write_gguf(tmp_path / "OWN.GGUF", output=(4 + len(ALPHABET) + len(MERGES), 64))
    own, tied = (load_member(one, backend="transformers").model for one in (file, tiny_gguf))
    assert tied.get_output_embeddings().weight is tied.get_input_embeddings().weight
    head, embedding = own.get_output_embeddings().weight, own.get_input_embeddings().weight
    assert head.shape == embedding.shape
    assert not torch.equal(head, embedding)


def test_unknown_paths_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder, and not a hub name"):
        find_source(tmp_path / "missing")
    for name in ("missing.gguf", "missing.GGUF"):
        with pytest.raises(InputError, match="no such file or folder"):
            find_source(name)
    with pytest.raises(InputError, match=r"no config\.json"):
        find_source(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError, match="not a model"):
        find_source(tmp_path / "notes.txt")
    assert find_source("some-org/some-model") == Source(hub="some-org/some-model")


def test_a_model_the_hub_does_not_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # no minute of retries
    with pytest.raises(InputError, match=r"deepen-ext-no/such-model: neither a local file or folder nor"):
        load_member("deepen-ext-no/such-model")


def test_a_folder_without_tokenizer_or_weights(smollm2_dir: Path, tmp_path: Path) -> None:
    shutil.copy(smollm2_dir / "config.json", tmp_path)
    with pytest.raises(InputError, match="no tokenizer"):
        load_member(tmp_path)
    shutil.copy(smollm2_dir / "tokenizer.json", tmp_path)
    with pytest.raises(ModelError, match="cannot load this model"):
        load_member(tmp_path)


def test_bad_dtype_and_device(smollm2_dir: Path) -> None:
    with pytest.raises(InputError, match="dtype must be one of"):
        load_member(smollm2_dir, dtype="int8")
    with pytest.raises(InputError, match="dtype must be one of"):
        load_member(smollm2_dir, dtype=torch.float64)
    with pytest.raises(InputError, match="device must be like"):
        load_member(smollm2_dir, device="gpu")
    with pytest.raises(InputError, match="CUDA devices"):
        load_member(smollm2_dir, device="cuda:99")


def test_loads_in_half_precision(smollm2_dir: Path) -> None:
    messages: list[str] = []
    member = load_member(smollm2_dir, dtype="bfloat16", progress=messages.append)
    assert member.backend.dtype == member.embedding.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in member.model.parameters())
    assert not member.model.training
    assert messages == ["Loading SmolLM2-135M-Instruct"]
