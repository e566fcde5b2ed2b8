"""What a folder may hold: code that must not run, weights that are not the model's, another tokenizer."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import Environment
from safetensors.torch import load_file, save_file
from tiny_models import one_byte_tokens, save_model
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

from deepen_ext.adapters.lm_eval_args import ensemble_from
from deepen_ext.commands.cli import app
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError, ModelError
from deepen_ext.members.chat import chat_texts
from deepen_ext.members.hf.tokenizer_file import load_tokenizer
from deepen_ext.members.loading import load_member, load_members

ROOT = Path(__file__).parent.parent
SMALL = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 200,
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, not tied, with all of its weights."""
    return save_model(tmp_path_factory.mktemp("checkpoint") / "whole", one_byte_tokens(), seed=1)


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return Path(shutil.copytree(whole, tmp_path / "model"))


def change(file: Path, **values: Any) -> None:
    content = json.loads(file.read_text())
    content.update(values)
    file.write_text(json.dumps(content))


def change_weights(folder: Path, remove: tuple[str, ...] = (), **add: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    for name in remove:
        del weights[name]
    save_file({**weights, **add}, folder / "model.safetensors", {"format": "pt"})


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_member(folder).model(torch.tensor([[1, 2, 3]])).logits


# ---------------------------------------------------------------- code

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
def generate(model, **_):
    return None
"""
LOAD = """
import sys
from pathlib import Path
from deepen_ext.errors import ModelError
from deepen_ext.members.loading import load_member
for trust in (False, True):
    for folder in sys.argv[1:]:
        try:
            load_member(folder, trust_remote_code=trust)
            print("loaded")
        except ModelError as error:
            print(error)
    print(sum((Path(folder).parent / "ran").exists() for folder in sys.argv[1:]), "ran")
    print(*(file.name for file in Path(sys.argv[1]).parents[1].rglob("modules/**/*.py")))
print("left on standard input:", *sys.stdin.read().split())
"""


def bring_code(folder: Path, where: str) -> Path:
    """Put a file into the folder that leaves a marker when it runs, and name it in a config."""
    marker = folder.parent / "ran"
    code = CODE.format(marker=str(marker))
    if where == "generation":
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(code)
        return marker
    (folder / "own.py").write_text(code)
    if where == "model":
        names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
        change(folder / "config.json", model_type="own", auto_map=names)
    else:
        change(
            folder / "tokenizer_config.json",
            tokenizer_class="OwnTokenizer",
            auto_map={"AutoTokenizer": [None, "own.OwnTokenizer"]},
        )
    return marker


@pytest.mark.slow
def test_code_of_a_folder_runs_only_where_the_caller_trusts_it(whole: Path, tmp_path: Path) -> None:
    folders = [
        shutil.copytree(whole, tmp_path / where / where) for where in ("model", "tokenizer", "generation")
    ]
    markers = [bring_code(folder, folder.name) for folder in folders]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, folders)],
        input="y\n" * 5,  # consent, should anything ask for it
        env={**os.environ, "HF_MODULES_CACHE": str(folders[0].parent / "modules"), "HF_HUB_OFFLINE": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    *refused, ran, copied = done.stdout.splitlines()[:5]
    *trusted, all_ran, all_copied, left = done.stdout.splitlines()[5:]
    of_model, of_tokenizer, of_generation = refused
    for message, named in (
        (of_model, "model: .*own.OwnModel"),
        (of_tokenizer, "tokenizer: .*own.OwnTokenizer"),
    ):
        assert re.match(named, message)
        assert "needs code that is no part of transformers and is not run" in message
        assert "trust_remote_code=True" in message
    assert of_generation == "loaded"  # it needs no code: its generate.py is left alone
    assert (ran, copied) == ("0 ran", "")

    assert trusted == ["loaded"] * 3
    # So the files would have run, and been copied.
    assert all_ran == "3 ran"
    assert all(marker.exists() for marker in markers)
    assert "own.py" in all_copied
    assert left == "left on standard input: y y y y y"


def test_the_class_of_transformers_comes_before_code_of_the_folder(folder: Path, whole: Path) -> None:
    marker = bring_code(folder, "model")
    change(folder / "config.json", model_type="llama")
    assert torch.equal(logits(folder), logits(whole))
    assert not marker.exists()


@pytest.mark.parametrize(
    "named",
    [
        {"attn_implementation": "somebody/some-kernel"},
        {"model_type": "gemma3", "attn_implementation": {"text_config": "somebody/some-kernel"}},
    ],
    ids=["the model's", "its text model's"],
)
def test_attention_from_the_hub_is_code(folder: Path, named: dict[str, Any]) -> None:
    change(folder / "config.json", **named)
    with pytest.raises(ModelError, match=r"attention from the hub \(somebody/some-kernel\)"):
        load_member(folder)


def test_a_chat_template_reaches_nothing_of_python(folder: Path) -> None:
    marker = folder.parent / "ran"
    reach = "cycler.__init__.__globals__.os.mknod"
    template = f"{{{{ {reach}('{marker}') }}}}" + "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    member = load_member(folder)
    assert member.tokenizer.chat_template
    with pytest.raises(InputError, match=r"chat template refuses these messages: .*unsafe"):
        chat_texts([member], [{"role": "user", "content": "Hello"}], without_template="error")
    assert not marker.exists()
    Environment().from_string(member.tokenizer.chat_template).render(messages=[{"content": "Hello"}])
    assert marker.exists()  # outside the sandbox it does reach it


class Touch:
    """Pickled, it makes a file where it is unpickled."""

    def __init__(self, file: str) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path(self.file),)


def test_a_pickle_of_weights_holds_weights_alone(folder: Path, whole: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    assert torch.equal(logits(folder), logits(whole))

    marker = folder.parent / "ran"
    torch.save({**weights, "bad": Touch(str(marker))}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="cannot load this model"):
        load_member(folder, trust_remote_code=True)
    assert not marker.exists()
    pickle.loads(pickle.dumps(Touch(str(marker))))
    assert marker.exists()


@pytest.mark.parametrize("whole_model_beside", [False, True])
def test_an_adapter_without_its_base(folder: Path, whole_model_beside: bool) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somebody/base"}')
    if not whole_model_beside:
        (folder / "config.json").unlink()
    with pytest.raises(ModelError, match=rf"PEFT adapter .*'base@{folder}', .* adapter='{folder}'"):
        load_member(folder)


@pytest.mark.parametrize("load", [load_member, lambda name, **k: load_members([name], **k)])
@pytest.mark.parametrize("value", ["no", None, 1])
def test_trust_is_true_or_false(whole: Path, load: Any, value: Any) -> None:
    with pytest.raises(InputError, match=r"trust_remote_code is .*give True or False"):
        load(whole, trust_remote_code=value)


def test_trust_reaches_the_members_of_an_ensemble(folder: Path) -> None:
    with pytest.raises(InputError, match="trust_remote_code is 'yes'"):
        Ensemble.from_pretrained([folder, folder], trust_remote_code="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize("command", ["generate", "nll", "tune", "doctor"])
def test_the_command_line_refuses_code_too(folder: Path, tmp_path: Path, command: str) -> None:
    marker = bring_code(folder, "model")
    text = tmp_path / "text.txt"
    text.write_text("so it goes. " * 40)
    options = {"generate": ["--prompt", "a"], "doctor": []}.get(command, ["--text", str(text)])
    if command == "tune":
        options += ["--out", str(tmp_path / "preset.yaml")]
    models = ["--model", str(folder), "--model", str(folder)]
    refused = CliRunner().invoke(app, [command, *models, *options], input="y\n" * 5)
    assert refused.exit_code == 1
    assert "is not run" in refused.stderr
    assert not marker.exists()
    trusted = CliRunner().invoke(app, [command, "--trust-remote-code", *models, *options])
    assert "is not run" not in trusted.stderr
    assert marker.exists()


def test_the_harness_hands_trust_on(folder: Path) -> None:
    bring_code(folder, "model")
    with pytest.raises(ModelError, match="is not run"):
        ensemble_from(f"{folder}|{folder}", {})
    ensemble = ensemble_from(f"{folder}|{folder}", {"trust_remote_code": True})
    assert {type(member.model).__name__ for member in ensemble.members} == {"OwnModel"}


# ---------------------------------------------------------------- weights


def test_two_loads_give_the_same_logits(whole: Path) -> None:
    assert torch.equal(logits(whole), logits(whole))


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_missing_weights_are_named(folder: Path, lost: str) -> None:
    change_weights(folder, remove=(lost,))
    with pytest.raises(ModelError, match=f"lacks weights that this model .*: {lost}. They would be random"):
        load_member(folder)


def test_a_tied_head_is_not_missing(folder: Path) -> None:
    change(folder / "config.json", tie_word_embeddings=True)
    change_weights(folder, remove=("lm_head.weight",))
    member = load_member(folder)
    assert member.model.lm_head.weight is member.model.model.embed_tokens.weight


def test_many_missing_weights_are_counted(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"layers\.2\..* and 4 more\. They would be random"):
        load_member(folder)


def test_shapes_that_do_not_fit_are_named(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=48)
    with pytest.raises(ModelError, match=r"0\.mlp\.down_proj\.weight is \[32, 32\], not \[32, 48\]"):
        load_member(folder)


@pytest.mark.parametrize(
    "extra",
    ["model.layers.0.self_attn.q_norm.weight", "model.layers.0.self_attn.q_proj.bias", "model.norm.bias",
     "model.layers.2.mlp.up_proj.weight", "lm_head.bias", "layers.0.self_attn.k_norm.weight",
     "model.layers.shared.weight"],
)  # fmt: skip
def test_weights_of_another_architecture_are_named(folder: Path, extra: str) -> None:
    change_weights(folder, **{extra: torch.ones(32)})
    with pytest.raises(ModelError, match=f"has no place: .*{extra}.*another architecture"):
        load_member(folder)


@pytest.mark.parametrize("extra", ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.position_ids"])
def test_what_a_model_computes_may_be_there(folder: Path, extra: str) -> None:
    change_weights(folder, **{extra: torch.ones(8)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_member(folder)


@pytest.mark.parametrize("extra", ["vision_tower.layers.0.mlp.weight", "mtp.layers.0.mlp.up_proj.weight"])
def test_parts_that_the_model_has_not_are_left_out_with_a_warning(folder: Path, extra: str) -> None:
    change_weights(folder, **{extra: torch.ones(8)})
    with pytest.warns(UserWarning, match=f"left out of the checkpoint.*{extra}"):
        load_member(folder)


def test_layers_that_predict_further_tokens_are_no_fault(folder: Path) -> None:
    change(folder / "config.json", num_nextn_predict_layers=1)
    change_weights(folder, **{"model.layers.2.mlp.up_proj.weight": torch.ones(8)})
    with pytest.warns(UserWarning, match=r"left out of the checkpoint.*layers\.2"):
        load_member(folder)


def test_a_missing_shard_is_named(folder: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    load_member(folder)
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        load_member(folder)


@pytest.mark.parametrize("change_one", [lambda weight: None, lambda weight: weight[:5].clone()])
def test_weights_that_are_put_together_are_named(folder: Path, change_one: Any, capfd: Any) -> None:
    """transformers joins the experts of a layer; one of them is missing or too small."""
    config = MixtralConfig(num_local_experts=4, num_key_value_heads=2, **SMALL)
    MixtralForCausalLM(config).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    load_member(folder)
    one = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    changed = {**weights, one: change_one(weights[one])}
    kept = {key: weight for key, weight in changed.items() if weight is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    capfd.readouterr()
    with pytest.raises(
        ModelError, match=r"that make up model\.layers\.0\.mlp\.experts\.gate_up_proj are missing"
    ):
        load_member(folder)
    assert "CONVERSION" not in "".join(capfd.readouterr())


# ---------------------------------------------------------------- the tokenizer's class and its file


def pairs_of_digits() -> Tokenizer:
    """Byte-level BPE that takes digits apart, as no class of transformers does by itself; "44" is a token."""
    names = ["<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "44"]
    tokenizer = Tokenizer(BPE(vocab={name: i for i, name in enumerate(names)}, merges=[("4", "4")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "WhisperTokenizer"])
def test_the_file_comes_before_the_class(tmp_path: Path, name: str) -> None:
    tokenizer = pairs_of_digits()
    folder = save_model(tmp_path / "digits", tokenizer, seed=1)
    change(folder / "tokenizer_config.json", tokenizer_class=name, chat_template="{{ messages }}")
    wanted = tokenizer.encode("441").ids
    of_class = AutoTokenizer.from_pretrained(folder)
    assert of_class.encode("441", add_special_tokens=False) != wanted  # or there is nothing to find
    with pytest.warns(UserWarning, match=rf"digits: the config names {name}.*tokenizer\.json"):
        member = load_member(folder)
    assert member.vocabulary.encode("441") == wanted
    assert member.tokenizer.encode("441", add_special_tokens=False) == wanted
    assert member.tokenizer.eos_token == "<eos>"
    assert member.tokenizer.chat_template == "{{ messages }}"


def test_a_class_that_follows_its_file_is_kept(qwen_tokenizer_dir: Path, folder: Path) -> None:
    """Qwen 2's class normalises to NFC whether its file does or not; its ids are the file's."""
    shutil.copy(qwen_tokenizer_dir / "tokenizer.json", folder)
    change(folder / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer", eos_token="<|endoftext|>")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tokenizer = load_tokenizer(folder, "qwen")
    assert type(tokenizer).__name__ == "Qwen2Tokenizer"
