"""What a GGUF file's header says about its model, and which headers are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from test_models import TEMPLATE, tiny_gguf, write_gguf  # noqa: F401  (a fixture)

from deepen_ext import demo
from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.hf.gguf_conversion import convert_gguf

ROOT = Path(__file__).parent.parent


def test_facts_are_those_that_were_written(tiny_gguf: Path) -> None:  # noqa: F811
    facts = read_facts(tiny_gguf)
    reader = gguf.GGUFReader(tiny_gguf)
    assert (facts.architecture, facts.name, facts.context_length) == ("llama", "tiny", 128)
    assert facts.tokens == len(reader.fields["tokenizer.ggml.tokens"].data)
    assert (facts.tokenizer_model, facts.tokenizer_pre) == ("gpt2", "smollm")
    assert (facts.bos_id, facts.add_bos, facts.eos_ids) == (1, True, (2, 3))
    assert (facts.chat_template, facts.chat_templates) == (TEMPLATE, {})
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    assert facts.parameters == sum(sizes.values())
    tables = sizes["token_embd.weight"] + sizes.get("output.weight", 0)
    assert facts.non_embedding_parameters == facts.parameters - tables
    assert facts.tensor_types == {"Q8_0": 8, "float32": 3}
    assert (facts.dtype, facts.all_float32) == ("Q8_0", False)
    assert sum(tensor.n_bytes for tensor in reader.tensors) <= facts.weight_bytes
    assert facts.weight_bytes == tiny_gguf.stat().st_size - reader.data_offset


def test_every_end_and_every_template(tmp_path: Path) -> None:
    def more(writer: Any) -> None:
        writer.add_eom_token_id(9)
        writer.add_uint32("tokenizer.ggml.fim_pad_token_id", 8)
        writer.add_uint32("tokenizer.ggml.fim_sep_token_id", 1 << 20)  # beyond the vocabulary
        writer.add_chat_template([{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}])

    facts = read_facts(write_gguf(tmp_path / "more.gguf", more=more))
    assert facts.eos_ids == (2, 3, 8, 9)
    assert facts.chat_templates == {"tool_use": "T", "rag": "R"}


def test_what_a_file_does_not_say(tmp_path: Path) -> None:
    path = tmp_path / "little.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 8), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    facts = read_facts(path)
    assert (facts.name, facts.context_length, facts.tokens, facts.eos_ids) == (None, None, 0, ())
    assert (facts.bos_id, facts.add_bos, facts.chat_template) == (None, None, None)
    assert (facts.parameters, facts.dtype, facts.all_float32) == (32, "float32", True)
    assert facts.non_embedding_parameters == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "context", "tokens", "dtype", "parameters", "width"),
    [
        ("smollm2-135m-instruct", 8192, 49152, "Q4_1, Q8_0", 134_515_008, 576),
        ("gemma-3-270m", 32768, 262144, "Q5_0, Q4_K, Q8_0, Q6_K", 268_098_176, 640),
    ],
)
def test_embedded_models(
    name: str, context: int, tokens: int, dtype: str, parameters: int, width: int
) -> None:
    facts = read_facts(demo.gguf_file(name))
    assert (facts.context_length, facts.tokens, facts.dtype) == (context, tokens, dtype)
    assert (facts.parameters, facts.all_float32) == (parameters, False)
    assert facts.non_embedding_parameters == parameters - tokens * width


def test_facts_need_neither_torch_nor_transformers(tiny_gguf: Path) -> None:  # noqa: F811
    code = (
        "import sys; from pathlib import Path; from deepen_ext.members.gguf.facts import read_facts; "
        "read_facts(Path(sys.argv[1])); print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, str(tiny_gguf)]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == "False\n"


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("tokenizer.ggml.eos_token_id", "two", "is 'two', not a whole number"),
        ("tokenizer.chat_template", 7, "is 7, not text"),
        ("llama.context_length", "long", "is 'long', not a whole number"),
    ],
)
def test_a_setting_of_another_type_is_refused(tmp_path: Path, key: str, value: Any, what: str) -> None:
    def more(writer: Any) -> None:
        writer.kv_data[0].pop(key)
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)

    path = write_gguf(tmp_path / "odd.gguf", more=more)
    with pytest.raises(ModelError, match=rf"odd\.gguf: cannot read this GGUF file, Damaged: {key} {what}"):
        read_facts(path)


@pytest.mark.parametrize(
    ("key", "value", "what"),
    [
        ("block_count", [1 << 30], "is 1073741824, which its tensors do not have"),
        ("block_count", [0], "is 0, which its tensors do not have"),
        ("feed_forward_length", [96, 1 << 20], "is 1048576, which its tensors do not have"),
        ("attention.head_count_kv", [2] * 4097, "has 4097 values, more than any model has layers"),
        ("ssm.conv_kernel", 1 << 30, "is 1073741824, which its tensors do not have"),
        ("shortconv.l_cache", [1 << 30], "is 1073741824, which its tensors do not have"),
    ],
)
def test_sizes_that_the_tensors_do_not_have(tmp_path: Path, key: str, value: Any, what: str) -> None:
    """transformers takes a list of one for the number in it, and would build layers until memory ends."""

    def write(name: str, value: Any) -> Path:
        def more(writer: Any) -> None:
            writer.kv_data[0].pop(f"llama.{key}", None)
            (writer.add_array if isinstance(value, list) else writer.add_uint32)(f"llama.{key}", value)

        return write_gguf(tmp_path / name, more=more)

    with pytest.raises(ModelError, match=rf"odd\.gguf: .*Damaged: llama\.{key} {what}"):
        read_facts(write("odd.gguf", value))
    assert read_facts(write("right.gguf", [1] if isinstance(value, list) else 1)).parameters


def test_a_part_of_a_split_file_says_how_to_join(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a-00001-of-00003.gguf", more=lambda one: one.add_uint16("split.count", 3))
    for read in (read_facts, convert_gguf):
        with pytest.raises(ModelError, match=r"00003\.gguf: it is one of 3 parts .*llama-gguf-split --merge"):
            read(path)
    assert read_facts(write_gguf(tmp_path / "b.gguf", more=lambda one: one.add_uint16("split.count", 1)))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"missing\.gguf: cannot be read: No such file"):
        read_facts(tmp_path / "missing.gguf")
