"""lm-evaluation-harness itself, on tasks of tests/lm_eval_task/, with an ensemble as its model: the demo pair
where answers must be right, tiny models elsewhere."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when `datasets` is imported

import lm_eval
import pytest
import torch
from backend_stand_in import Asked, recorded
from command_line import ROOT, run, run_process
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM, hash_args
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import simple_parse_args_string
from sessions import changed
from tiny_models import one_byte_tokens, save_model

from deepen_ext import Ensemble, InputError
from deepen_ext.adapters.lm_eval import DeepenLM
from deepen_ext.measure.likelihood.scoring import score_texts
from deepen_ext.measure.likelihood.text_pieces import pieces
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.members.load_options import LOAD_OPTIONS
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.members.source import Source

TASKS = ROOT / "tests" / "lm_eval_task"
TEXTS = [json.loads(line)["text"] for line in (TASKS / "texts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def demo_pair(smollm2: Member, gemma: Member) -> Ensemble:
    return Ensemble([smollm2, gemma])


@pytest.fixture(scope="module")
def ensemble(tiny_smollm2: Member, tiny_gemma: Member) -> Ensemble:
    return Ensemble([tiny_smollm2, tiny_gemma], fuser="deepen")


@pytest.fixture(scope="module")
def model(ensemble: Ensemble) -> DeepenLM:
    return DeepenLM(ensemble, batch_size=2)


@pytest.fixture(scope="module")
def evaluated(demo_pair: Ensemble, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the harness makes of the three tasks and the demo pair, in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the tasks name their data from here
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        return lm_eval.simple_evaluate(
            model=DeepenLM(demo_pair, batch_size=2),
            tasks=["deepen_text", "deepen_choice", "deepen_write"],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            bootstrap_iters=0,
        )


def scored(ensemble: Ensemble, context: str, text: str) -> tuple[float, bool]:
    found = TextReading(ensemble.members, context, text).fused(ensemble)
    return found.total, all(found.greedy)


def test_whole_texts_score_as_in_nll(evaluated: dict[str, Any], demo_pair: Ensemble) -> None:
    """Acceptance 6 of issue 5: bits a byte as `deepen-ext nll` computes them, to 1e-3."""
    scores = score_texts([piece for text in TEXTS for piece in pieces(text)], {"fused": demo_pair})
    fused, nbytes = sum(one.total for one in scores.fused["fused"]), scores.score("fused").nbytes
    bits = scores.score("fused").bits_per_byte.value
    results = evaluated["results"]["deepen_text"]
    assert results["sample_len"] == len(TEXTS) == 3
    assert nbytes == sum(len(text.encode()) for text in TEXTS)
    assert results["bits_per_byte,none"] == pytest.approx(bits, abs=1e-3)
    assert results["byte_perplexity,none"] == pytest.approx(2**bits, rel=1e-3)
    words = sum(len(re.split(r"\s+", text)) for text in TEXTS)
    assert results["word_perplexity,none"] == pytest.approx(math.exp(-fused / words), rel=0.01)
    for name in scores.alone:  # it is the fused distribution, and no member's
        assert abs(scores.score(name).bits_per_byte.value - bits) > 0.02


def test_a_long_text_is_read_in_pieces(ensemble: Ensemble) -> None:
    text = " ".join(f"Line {i} of a text." for i in range(5))
    model = DeepenLM(ensemble, piece=60, context="20")
    cut = pieces(text, length=60, context=20)
    assert len(cut) > 1
    expected = sum(scored(ensemble, *piece)[0] for piece in cut)
    assert model.loglikelihood_rolling([asked(text)], disable_tqdm=True) == pytest.approx(
        [expected], abs=1e-3
    )
    assert abs(expected - scored(ensemble, "", text)[0]) > 0.1


def test_choices_score_as_in_nll(evaluated: dict[str, Any], demo_pair: Ensemble) -> None:
    samples = evaluated["samples"]["deepen_choice"]
    assert len(samples) == 3
    for sample in samples[1:2]:
        expected = [scored(demo_pair, *pair) for pair in sample["arguments"]]
        found = sample["filtered_resps"]
        assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
        assert [one[1] for one in found] == [one[1] for one in expected]
    flags = [one[1] for sample in samples for one in sample["filtered_resps"]]
    assert any(flags)
    assert not all(flags)
    assert evaluated["results"]["deepen_choice"]["acc,none"] >= 2 / 3


def test_written_texts_are_the_ensembles(evaluated: dict[str, Any], demo_pair: Ensemble) -> None:
    """They end before the stop string, in batches as alone."""
    samples = evaluated["samples"]["deepen_write"]
    assert len(samples) == 3
    stopped = 0
    for sample in samples:
        context, settings = sample["arguments"][0]
        alone = demo_pair.generate(context, max_new_tokens=8, stop_strings=settings["until"])
        stopped += alone.finish_reason == "stop_string"
        assert sample["resps"] == [[re.split(r"[\n.]", alone.text)[0]]]
        assert sample["resps"][0][0].strip()
    assert stopped
    assert evaluated["results"]["deepen_write"]["exact_match,last-word"] >= 2 / 3
    assert evaluated["config"]["method"] == demo_pair.method
    assert [one["name"] for one in evaluated["config"]["members"]] == demo_pair.names


def asked(*arguments: Any) -> Instance:
    return Instance(request_type="", doc={}, arguments=arguments, idx=0)


def test_answers_come_in_order_and_are_cached(model: DeepenLM, tmp_path: Path) -> None:
    """Doubled requests are answered twice; the harness's cache has each answer as soon as it is there."""
    pairs = [("One, two,", " three"), ("The capital of France is", " Paris"), ("One, two,", " three")]
    first = model.ensemble.generate("One, two,", max_new_tokens=4).text
    settings = {"until": [first[-3:]], "max_gen_toks": 4}
    texts = [("One, two,", settings), ("The capital of France is", settings), ("One, two,", settings)]
    try:
        cache = CachingLM(model, str(tmp_path / "answers.db"))
        answers = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
        written = model.generate_until([asked(*text) for text in texts], disable_tqdm=True)
        (rolled,) = model.loglikelihood_rolling([asked("One, two,")], disable_tqdm=True)
    finally:
        model.set_cache_hook(type(model.cache_hook)(None))
    expected = [scored(model.ensemble, *pair) for pair in pairs]
    assert [one[0] for one in answers] == pytest.approx([one[0] for one in expected], abs=1e-4)
    assert [one[1] for one in answers] == [one[1] for one in expected]
    assert answers[0] == answers[2] != answers[1]
    assert written[0] == written[2] == first[:-3]
    assert written[1] != written[0]
    assert rolled == pytest.approx(scored(model.ensemble, "", "One, two,")[0], abs=1e-4)
    assert model.loglikelihood_rolling([asked("")], disable_tqdm=True) == [0.0]
    kept = cache.dbdict
    for kind, arguments, answer in (
        *(("loglikelihood", pair, answer) for pair, answer in zip(pairs, answers, strict=True)),
        *(("generate_until", text, answer) for text, answer in zip(texts, written, strict=True)),
        ("loglikelihood_rolling", ("One, two,",), rolled),
    ):
        assert kept[hash_args(kind, arguments)] == answer


def test_what_contexts_share_is_read_once(model: DeepenLM) -> None:
    examples = "".join(f"{i} and {i} is {2 * i}.\n" for i in range(2, 9))
    pairs = [
        (f"{examples}{i} and {i} is", f" {answer}") for i in (3, 4) for answer in ("six", "eight", "ten")
    ]
    fed = [0, 0]

    def count(member: int) -> Callable[[Any, tuple[torch.Tensor]], None]:
        def add(_: Any, inputs: tuple[torch.Tensor]) -> None:
            fed[member] += inputs[0].numel()

        return add

    hooks = [
        member.model.get_input_embeddings().register_forward_pre_hook(count(i))
        for i, member in enumerate(model.ensemble.members)
    ]
    try:
        answers = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    finally:
        for hook in hooks:
            hook.remove()
    lengths = [len(member.vocabulary.encode(examples)) for member in model.ensemble.members]
    assert all(one > 60 for one in lengths)
    assert all(length < one < 2 * length for one, length in zip(fed, lengths, strict=True)), (fed, lengths)
    assert answers[0][0] == pytest.approx(scored(model.ensemble, *pairs[0])[0], abs=1e-4)


def test_sampling_follows_the_harness_seed(model: DeepenLM) -> None:
    def draw(**more: Any) -> list[str]:
        settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 3, **more}
        return model.generate_until([asked("Once upon a time", settings)] * 3, disable_tqdm=True)

    torch.manual_seed(7)  # what the harness does with --seed
    first = draw()
    torch.manual_seed(7)
    assert draw() == first
    assert len(set(first)) > 1  # a repeated request is another draw
    own = draw(seed=3)
    assert own == draw(seed=3) != first
    assert len(set(own)) > 1  # also over batches, of two here


def test_what_is_drawn_does_not_depend_on_the_batch_size(ensemble: Ensemble) -> None:
    contexts = ["Once upon a time", "The sea was calm", "One morning", "One morning", "She said"]

    def draw(batch_size: int, **more: Any) -> list[str]:
        settings = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 4, **more}
        torch.manual_seed(7)
        model = DeepenLM(ensemble, batch_size=batch_size)
        return model.generate_until([asked(one, settings) for one in contexts], disable_tqdm=True)

    by_seed, by_state = draw(1, seed=3), draw(1)
    assert by_seed[2] != by_seed[3]  # a repeated request is another draw
    for batch_size in (2, 5):
        assert draw(batch_size, seed=3) == by_seed
        assert draw(batch_size) == by_state
    assert len({tuple(one) for one in (by_seed, by_state, draw(5, seed=4))}) == 3
    with pytest.raises(InputError, match=r"seed is 1\.5; give a whole number"):
        draw(1, seed=1.5)


def test_settings_of_generation_are_honoured_or_refused(model: DeepenLM) -> None:
    def write(context: str = "One, two, three,", **settings: Any) -> str:
        return model.generate_until([asked(context, settings)], disable_tqdm=True)[0]

    tokens = model.ensemble.members[0].vocabulary.encode
    assert len(tokens(write(max_new_tokens=3))) == 3  # the harness's other names for it
    assert (
        len(tokens(DeepenLM(model.ensemble, max_gen_toks=5).generate_until([asked("One, two,", {})])[0])) == 5
    )
    assert write(until=[], max_gen_toks=4) == write(until=["", "@@"], max_gen_toks=4)
    with pytest.raises(InputError, match="no setting 'top_q'; did you mean top_p"):
        write(top_q=0.5)
    with pytest.raises(InputError, match="num_beams is 2, which is not supported"):
        write(num_beams=2)
    with pytest.raises(InputError, match="max_new_tokens is 0"):
        write(max_gen_toks=0)
    with pytest.raises(InputError, match="prompt 0 is empty"):
        write("")


def test_a_context_that_begins_with_bos_gets_no_second(tiny_gemma: Member, tiny_smollm2: Member) -> None:
    """As in the harness's own models; each member has its own BOS."""
    own = HFLM(pretrained=tiny_gemma.model, tokenizer=tiny_gemma.tokenizer, batch_size=1)
    model = DeepenLM(Ensemble([tiny_gemma], fuser="single"))
    pairs = [("<bos>The sky is", " blue"), ("The sky is", " blue"), ("", "<bos>The sky is")]
    expected = own.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    found = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in expected], abs=1e-3)
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    settings = {"max_gen_toks": 4, "until": ["@@"], "do_sample": False}
    texts = [asked(context, settings) for context in ("<bos>The sky is", "The sky is")]
    written = model.generate_until(texts, disable_tqdm=True)
    assert written == own.generate_until(texts, disable_tqdm=True)
    assert written[0] == written[1]
    assisted = DeepenLM(
        Ensemble([tiny_smollm2, tiny_gemma])
    )  # for SmolLM2 `<bos>` is text, which Gemma then reads
    (answer,) = assisted.loglikelihood([asked("", "<bos>The sky")], disable_tqdm=True)
    assert math.isfinite(answer[0])


def test_a_special_token_among_the_stop_strings_ends_the_text(model: DeepenLM, monkeypatch: Any) -> None:
    """It has no text, so that no stop string could be found: of SmolLM2's chats the token before a turn. The
    main model wants it most here; where it does not end the text it is never written."""
    written, generate = [], model.ensemble.generate

    def listened(*arguments: Any, **settings: Any) -> Any:
        written.append(generate(*arguments, **settings))
        return written[-1]

    monkeypatch.setattr(model.ensemble, "generate", listened)
    chat = "<|im_start|>system\nYou are helpful.<|im_end|>\n"
    start = model.ensemble.members[0].tokenizer.convert_tokens_to_ids("<|im_start|>")
    wanted = torch.zeros(model.ensemble.members[0].vocab_size).index_fill_(0, torch.tensor(start), 50.0)
    hook = model.ensemble.members[0].model.register_forward_hook(
        lambda _, inputs, output: replace(output, logits=output.logits + wanted)
    )
    try:
        settings = {"max_gen_toks": 3, "until": ["<|im_start|>"]}
        assert model.generate_until([asked(chat, settings)], disable_tqdm=True) == [""]
        settings["until"] = ["@@"]
        model.generate_until([asked(chat, settings)], disable_tqdm=True)
    finally:
        hook.remove()
    (stopped,), (other,) = written
    assert stopped.token_ids == [start]
    assert start not in other.token_ids
    assert other.token_ids


def test_a_context_too_long_for_a_member_loses_its_beginning(ensemble: Ensemble) -> None:
    long = "".join(f"Line {i} of a long text.\n" for i in range(12)) + "One, two,"
    members = ensemble.members
    short = [changed(one, context_length=40) for one in members]
    model = DeepenLM(Ensemble(short, fuser="deepen"), batch_size=2)
    with pytest.warns(UserWarning, match="1 of 1 contexts were too long"):
        found = model.loglikelihood([asked(long, " three")], disable_tqdm=True)
    with pytest.warns(UserWarning, match="1 of 2 contexts were too long"):
        written = model.generate_until([asked(one, {"max_gen_toks": 4}) for one in (long, "One, two,")])

    # The longest end of the text that has no more tokens than that for any member.
    def kept(room: int, text: str) -> str:
        def most(start: int) -> int:
            counts = [
                len(m.vocabulary.prefix_ids) + len(m.vocabulary.encode(long[start:] + text)) for m in members
            ]
            return max(counts)

        return next(long[start:] for start in range(len(long)) if most(start) <= room)

    assert len(kept(40, " three")) < len(long) - 100
    assert found == [scored(ensemble, kept(40, " three"), " three")]
    assert written[0] == ensemble.generate(kept(36, ""), max_new_tokens=4).text
    model = DeepenLM(Ensemble([members[0], changed(members[1], context_length=10)], fuser="deepen"))
    with pytest.raises(InputError, match=r"tiny-gemma.*context of 10 tokens is too short for the text"):
        model.loglikelihood([asked("One", " two" * 12)], disable_tqdm=True)


MESSAGES = [{"role": "user", "content": "What is the capital of Australia?"}]


def test_chats_reach_each_member_in_its_own_template(ensemble: Ensemble, model: DeepenLM) -> None:
    with pytest.raises(InputError, match=r"tiny-gemma.*no chat template"):
        model.apply_chat_template(MESSAGES)
    plain = DeepenLM(ensemble, without_template="plain", max_gen_toks=4)
    context = plain.apply_chat_template(MESSAGES)
    expected = ensemble.generate(MESSAGES, max_new_tokens=4, without_template="plain").text
    assert plain.generate_until([asked(context, {})], disable_tqdm=True) == [expected]
    begun = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    context = plain.apply_chat_template(begun, add_generation_prompt=False)
    expected = ensemble.generate(begun, max_new_tokens=4, without_template="plain").text
    assert plain.generate_until([asked(context, {})], disable_tqdm=True) == [expected]
    with pytest.raises(InputError, match="ends with the assistant's words"):
        plain.apply_chat_template(begun)
    with pytest.raises(InputError, match="something after it"):
        plain.generate_until([asked(context + " Sure:", {})], disable_tqdm=True)
    with pytest.raises(InputError, match="log-likelihoods after a chat are not supported"):
        plain.loglikelihood([asked(context, " Canberra")], disable_tqdm=True)
    with pytest.raises(InputError, match="no choice of chat templates"):
        plain.chat_template("tool_use")


def by_the_harness(arguments: str) -> list[dict[str, Any]]:
    """As its command line reads model_args, and as `simple_evaluate` does."""
    return [key_val_to_dict(arguments), simple_parse_args_string(arguments)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "name the members with pretrained=A.B"),
        ("demo=True,pretrained=A|B", "one of these"),
        ("demo=1", "demo is 1; give True or False"),
        ("pretrained=A|", "pretrained is"),
        ("pretrained=A", "two or more members"),
        ("pretrained=A|B,weights=0.5", "there are 1 weights for 2 members"),
        ("pretrained=A|B,weights=0.5|x", "'x' is no weight; .* size or prompt"),
        ("pretrained=A|B,on_failure=continue", "on_failure='continue' cannot be used here: answers"),
        ("pretrained=A|B,fuser=median", "fuser 'median': use one of"),
        ("pretrained=A|B,colour=red", "there is no colour; there are pretrained, "),
        ("pretrained=A|B,quantization=-|int2", "B: there is no quantization 'int2'; there are int8, int4"),
        ("pretrained=A|B,threads=two", "threads is 'two'; give a whole number"),
        ("pretrained=A|B,backend=llama.cpp", "A: llama.cpp reads .gguf files, and this is none"),
        ("pretrained=A|B,dtype=int8", "dtype must be one of"),
        ("pretrained=/no/such/folder|B", "/no/such/folder: no such file or folder"),
        ("preset=/no/such.yaml", "/no/such.yaml: cannot be read"),
        ("demo=True,batch_size=auto", "batch_size is 'auto'; give a whole number, 1 or more"),
        ("demo=True,max_gen_toks=0", "max_gen_toks is 0"),
        ("demo=True,piece=0", "piece is 0; give a whole number, 1 or more"),
        ("demo=True,context=-1", "context is -1"),
        ("demo=True,max_batch_size=8", "max_batch_size has no use here"),
        ("demo=True,without_template=transcript", "without_template is 'transcript'"),
    ],
)
def test_model_args_are_refused_before_a_model_is_loaded(arguments: str, message: str) -> None:
    for read in by_the_harness(arguments):
        with pytest.raises(InputError, match=message):
            DeepenLM.create_from_arg_obj(read)


def test_model_args_come_before_the_harness_defaults(ensemble: Ensemble) -> None:
    """Its command line always gives a batch size and a device: CUDA, unless it is told otherwise."""
    defaults = {"batch_size": 1, "max_batch_size": None, "device": "cuda:0"}
    with pytest.raises(InputError, match=r"the ensemble is made; leave out device$"):
        DeepenLM.create_from_arg_obj({"pretrained": ensemble, "device": "cpu"}, defaults)
    made = DeepenLM.create_from_arg_obj(
        {"pretrained": ensemble, "batch_size": 4}, {**defaults, "device": None}
    )
    assert made.batch_size == 4
    if not torch.cuda.is_available():
        assert DeepenLM.create_from_arg_obj({"pretrained": ensemble}, defaults).batch_size == 1
        with pytest.raises(InputError, match="torch sees 0 CUDA devices"):
            DeepenLM.create_from_arg_string("demo=True,device=cuda:0", defaults)


def test_model_args_say_how_members_are_loaded(tmp_path: Path) -> None:
    def loaded(arguments: str | dict[str, Any], **defaults: Any) -> list[tuple[Source, dict[str, Any]]]:
        read = simple_parse_args_string(arguments) if isinstance(arguments, str) else arguments
        with recorded(2) as asked, pytest.raises(Asked):
            DeepenLM.create_from_arg_obj(read, defaults)
        return [(source, one.given()) for _, source, one in asked]

    text = "pretrained=org/a|org/b@org/tuned,quantization=-|int8,backend=transformers,revision=v1|-"
    assert loaded(text) == [
        (Source(hub="org/a"), {"backend": "transformers", "revision": "v1"}),
        (Source(hub="org/b"), {"backend": "transformers", "quantization": "int8", "adapter": "org/tuned"}),
    ]
    spread = {"device_map": {"": "disk"}, "offload_folder": "spare", "max_memory": {"cpu": 5}}
    read = {"pretrained": ["org/a", "org/b"], **spread, "attn_implementation": ["eager", None]}
    # The harness's own default is no device beside a device map.
    own = [one for _, one in loaded(read, device="cuda:0")]
    assert own == [{**spread, "attn_implementation": "eager"}, spread]
    pair = [Source(embedded="smollm2-135m-instruct"), Source(embedded="gemma-3-270m")]
    assert [source for source, _ in loaded("demo=True,backend=transformers")] == pair
    preset = tmp_path / "preset.yaml"
    preset.write_text("members: [org/a, org/b]\ndevice_map: auto\ndtype: bfloat16\n", encoding="utf-8")
    found = [one for _, one in loaded(f"preset={preset},dtype=-|float16", device="cuda:0")]
    assert found == [{"device_map": "auto"}, {"device_map": "auto", "dtype": "float16"}]


def test_weights_from_the_prompt(ensemble: Ensemble) -> None:
    ensemble = ensemble.variant(learning_rate=0.25)
    model = DeepenLM(ensemble.variant(weights="prompt"), max_gen_toks=3)
    assert model.get_model_info()["weights"] == "prompt"
    context = "The capital of France is the city of"
    expected = model.ensemble.generate(context, max_new_tokens=3).text
    assert model.generate_until([asked(context, {})], disable_tqdm=True) == [expected]
    pairs = [(context, " Paris"), (context[:-3], " of")]  # the second goes on in the caches of the first
    answers = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
    own, even = (scored(one, *pairs[0])[0] for one in (model.ensemble, ensemble))
    assert answers[0][0] == pytest.approx(own, abs=1e-4)
    assert answers[1][0] == pytest.approx(scored(model.ensemble, *pairs[1])[0], abs=1e-4)
    assert abs(own - even) > 1e-3


def test_a_ready_ensemble_takes_no_settings(ensemble: Ensemble) -> None:
    with pytest.raises(InputError, match="the ensemble is made; leave out recipe"):
        DeepenLM(ensemble, recipe="bytes")


def test_the_harness_finds_the_model() -> None:
    """By the registry here; by the entry point in versions that read it. Its own models stay."""
    (entry,) = entry_points(group="lm_eval.models", name="deepen")
    assert entry.load() is DeepenLM is get_model("deepen")
    assert get_model("dummy").__module__.startswith("lm_eval.")


@pytest.mark.slow
def test_help_of_the_command_needs_no_model() -> None:
    done = run_process("lm-eval", "--help", env={**os.environ, "HF_HUB_CACHE": "/nowhere"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("deepen-ext lm-eval: ")
    assert "usage: lm-eval" in done.stdout
    for option in LOAD_OPTIONS:
        assert f" {option}=" in done.stdout
    assert "--model_args" in run("lm-eval", "run", "--help").stdout


@pytest.mark.slow
def test_exit_codes_are_the_harnesss() -> None:
    assert run_process("lm-eval", "run", "--no-such-option", "1").returncode == 2


@pytest.mark.slow
def test_the_command_agrees_with_the_library(
    tiny_smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the command line to the results file, with members, weights and fuser of its own."""
    other_dir = save_model(tmp_path / "bytes", one_byte_tokens(), seed=1)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    # Its own tasks, some ten thousand files, are not looked through.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    done = run(
        *("lm-eval", "run", "--model", "deepen", "--tasks", "deepen_text", "--include_path", str(TASKS)),
        *("--model_args", f"pretrained={tiny_smollm2_dir}|{other_dir},weights=0.7|0.3,recipe=calibrated"),
        *("--limit", "1", "--output_path", str(tmp_path)),
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("**/results_*.json")
    results = json.loads(file.read_text())
    assert results["config"]["method"] == "deepen:calibrated"
    assert results["config"]["weights"] == [0.7, 0.3]
    members = [load_member(tiny_smollm2_dir), load_member(other_dir)]
    same = Ensemble(members, weights=[0.7, 0.3], recipe="calibrated")
    bits = TextReading(members, "", TEXTS[0]).fused(same).bits_per_byte
    assert results["results"]["deepen_text"]["bits_per_byte,none"] == pytest.approx(bits, abs=1e-3)
