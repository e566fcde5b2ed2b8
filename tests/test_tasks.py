from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deepen_ext.errors import InputError
from deepen_ext.measure.evaluation.answers import first_letter, last_number, normalised, up_to_stop
from deepen_ext.measure.evaluation.choices import CHOICE_TASKS
from deepen_ext.measure.evaluation.tasks import TASKS, Item

DATA = Path(__file__).parents[2] / "shared" / "data"
with_data = pytest.mark.skipif(not DATA.is_dir(), reason="the benchmark data is not at ../shared/data")

# One item of each task and its demos, and the prompt as the data's README has it, written out by hand.
MOON = {"question": "when was the last time anyone was on the moon", "answer": ["14 December 1972 UTC"]}
ICE = {
    "question": "ice box",
    "A": "will turn into a cooler if you add water to it ",
    "B": "will turn into a cooler if you add soda to it",
    "answer": "A",
}
FOLD = {
    "question": "A fold observed in layers of sedimentary rock most likely resulted from the",
    "A": "cooling of flowing magma.",
    "B": "converging of crustal plates.",
    "C": "deposition of river sediments.",
    "D": "solution of carbonate minerals.",
    "answer": "B",
}
RING = {
    "question": "Find the characteristic of the ring 2Z.",
    "A": "0",
    "B": "3",
    "C": "12",
    "D": "30",
    "answer": "A",
    "domain": "abstract algebra",
}
DEGREE = {
    "question": "Find all zeros of {x}\nin Z_5",
    "A": "0",
    "B": "1",
    "C": "0,1",
    "D": "0,4",
    "answer": "D",
    "domain": "abstract algebra",
}
BONE = {
    "question": "What is the origin of the hyoid bone?",
    "A": "One",
    "B": "Two",
    "C": "Three",
    "D": "Four",
    "answer": "D",
    "domain": "anatomy",
}
FRUIT = {
    "question": "How many fruits are there?",
    "answer": "There are 32+114=146 fruits.\nThe answer is 146\n",
}
GOALS = {"question": "How many points?", "answer": "That is 84+117=201 points\nThe answer is 201\n"}
DUCKS = {
    "question": "How much does she make?",
    "answer": "She makes 9 * 2 = $18.\nTherefore, the answer is 18",
}
HORSE = {"question": "What was the name of Ernie's horse?", "answer": "Triggers"}
KING = {"question": "Which British king married Mary of Teck?", "answer": "George V"}

CASES: dict[str, tuple[list[dict[str, Any]], dict[str, Any], str, str]] = {
    "gsm8k": (
        [FRUIT, GOALS],
        DUCKS,
        "Question: How many fruits are there?\nLet's think step by step\n"
        "Answer:There are 32+114=146 fruits.\nThe answer is 146\n\n"
        "Question: How many points?\nLet's think step by step\n"
        "Answer:That is 84+117=201 points\nThe answer is 201\n\n"
        "Question: How much does she make?\nLet's think step by step\nAnswer:",
        "She makes 9 * 2 = $18.\nTherefore, the answer is 18\n\n",
    ),
    "arc_challenge": (
        [],
        FOLD,
        "Question: A fold observed in layers of sedimentary rock most likely resulted from the\n"
        "A. cooling of flowing magma.\nB. converging of crustal plates.\nC. deposition of river sediments.\n"
        "D. solution of carbonate minerals.\nAnswer:",
        " B",
    ),
    "piqa": (
        [],
        ICE,
        "ice box\nA. will turn into a cooler if you add water to it \n"
        "B. will turn into a cooler if you add soda to it\nAnswer:",
        " A",
    ),
    "mmlu": (
        [BONE, RING],
        DEGREE,
        "There is a single choice question about abstract algebra. "
        "Answer the question by replying A, B, C or D.\n"
        "Question: Find the characteristic of the ring 2Z.\nA. 0\nB. 3\nC. 12\nD. 30\nAnswer: A\n"
        "There is a single choice question about abstract algebra. "
        "Answer the question by replying A, B, C or D.\n"
        "Question: Find all zeros of {x}\nin Z_5\nA. 0\nB. 1\nC. 0,1\nD. 0,4\nAnswer:",
        " D",
    ),
    "triviaqa": (
        [HORSE, KING],
        {"question": "Of which country is Niamey the capital?", "answer": ["Niger Republic", "Niger"]},
        "Answer this questions:\n"
        "Question:What was the name of Ernie's horse?\nAnswer:Triggers\n"
        "Question:Which British king married Mary of Teck?\nAnswer:George V\n"
        "Question:Of which country is Niamey the capital?\nAnswer:",
        "Niger Republic\n",
    ),
    "nq": (
        [HORSE],
        MOON,
        "Answer this questions:\n"
        "Question:What was the name of Ernie's horse?\nAnswer:Triggers\n"
        "Question:when was the last time anyone was on the moon\nAnswer:",
        "14 December 1972 UTC\n",
    ),
}


HALF = "\ud83d"  # of a surrogate pair: JSON can name it, and UTF-8 cannot


def write(data: Path, task: str, **files: list[dict[str, Any]]) -> Path:
    (data / task).mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii="half" in str(row)) + "\n" for row in rows)
        (data / task / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return data


def the_item(data: Path, task: str, demos: list[dict[str, Any]], fields: dict[str, Any]) -> Item:
    """The item of a split of one, read from files."""
    (item,) = TASKS[task].items(write(data, task, dev=[fields], **({"demos": demos} if demos else {})), "dev")
    return item


def item_of(task: str, *references: str) -> Item:
    return Item(0, "", references, {"answer": references})


def test_the_cases_are_the_tasks():
    assert list(CASES) == list(TASKS) == ["gsm8k", "arc_challenge", "piqa", "mmlu", "triviaqa", "nq"]
    assert all(task.name == name for name, task in TASKS.items())


@pytest.mark.parametrize("task", CASES)
def test_prompt_and_gold_are_those_of_the_readme(task, tmp_path):
    demos, fields, prompt, gold = CASES[task]
    item = the_item(tmp_path, task, demos, fields)
    assert item.prompt == prompt
    assert TASKS[task].gold(item) == gold
    assert item.index == 0
    assert item.fields == fields


@pytest.mark.parametrize("task", CASES)
def test_right_output_is_right_and_the_prompt_does_not_know_it(task, tmp_path):
    demos, fields, prompt, gold = CASES[task]
    other = {"gsm8k": "It is 77", "piqa": "B", "triviaqa": ["Chad"], "nq": ["1969"]}.get(task, "C")
    right = the_item(tmp_path / "right", task, demos, fields)
    wrong = the_item(tmp_path / "wrong", task, demos, {**fields, "answer": other})
    assert TASKS[task].has_gold(right)
    assert TASKS[task].correct(gold, right)
    assert wrong.prompt == right.prompt == prompt
    assert not TASKS[task].correct(gold, wrong)


@pytest.mark.parametrize("task", ["gsm8k", "mmlu", "triviaqa", "nq"])
def test_gold_continues_the_prompt_as_the_demos_do(task, tmp_path):
    """A question that is its own demo: prompt and gold are the demo twice."""
    demo = {"gsm8k": FRUIT, "mmlu": RING}.get(task, HORSE)
    fields = {**demo, "answer": [demo["answer"]]} if demo is HORSE else demo
    item = the_item(tmp_path, task, [demo], fields)
    text = item.prompt.removeprefix("Answer this questions:\n") + TASKS[task].gold(item)
    text += "\n" if task == "mmlu" else ""  # one new token: the line end after the letter is not asked for
    half = len(text) // 2
    assert text[:half] == text[half:]
    assert demo["question"] in text[:half]


def test_settings_are_the_paper_s():
    settings = {name: (task.max_new_tokens, task.stop_strings) for name, task in TASKS.items()}
    assert settings == {
        "gsm8k": (512, ("\n\n",)),
        "arc_challenge": (1, ()),
        "piqa": (1, ()),
        "mmlu": (1, ()),
        "triviaqa": (10, ("\n",)),
        "nq": (10, ("\n",)),
    }


@pytest.mark.parametrize(
    ("limit", "places"),
    [(None, range(7)), (7, range(7)), (50, range(7)), (3, [0, 2, 4]), (1, [0]), (6, [0, 1, 2, 3, 4, 5])],
)
def test_limit_spreads_the_items_evenly(limit, places, tmp_path):
    rows = [{**FOLD, "question": f"question {i}"} for i in range(7)]
    items = TASKS["arc_challenge"].items(write(tmp_path, "arc_challenge", test=rows), "test", limit)
    assert [item.index for item in items] == list(places)
    assert [item.fields["question"] for item in items] == [f"question {i}" for i in places]


def test_line_ends_inside_texts_do_not_end_the_line(tmp_path):
    fields = {**FOLD, "question": "one\u2028two\x85three\x0bfour"}
    item = the_item(tmp_path, "arc_challenge", [], fields)
    assert item.prompt.startswith("Question: one\u2028two\x85three\x0bfour\nA. ")


def test_files_that_are_not_there_are_named(tmp_path):
    write(tmp_path, "piqa", test=[ICE])
    with pytest.raises(InputError, match=r"no .*piqa/dev\.jsonl; that folder has test\.jsonl"):
        TASKS["piqa"].items(tmp_path, "dev")
    with pytest.raises(InputError, match=r"no .*nq/test\.jsonl; give the folder that holds"):
        TASKS["nq"].items(tmp_path, "test")
    write(tmp_path, "nq", test=[MOON])
    with pytest.raises(InputError, match=r"no .*nq/demos\.jsonl"):
        TASKS["nq"].items(tmp_path, "test")


def test_wrong_arguments(tmp_path):
    write(tmp_path, "piqa", test=[ICE], demos=[ICE])
    with pytest.raises(InputError, match="split is 'demos'; give one of: dev, test"):
        TASKS["piqa"].items(tmp_path, "demos")
    for limit in (0, -1):
        with pytest.raises(InputError, match=f"limit is {limit}"):
            TASKS["piqa"].items(tmp_path, "test", limit)


@pytest.mark.parametrize(
    ("task", "fields", "message"),
    [
        ("piqa", {"question": "q", "A": "a", "answer": "A"}, r"line 2: there is no field 'B'"),
        ("piqa", {**ICE, "answer": "C"}, r"line 2: answer is 'C'; piqa needs one of A, B"),
        ("piqa", {**ICE, "answer": "3"}, r"answer is '3'"),
        ("piqa", {"question": "q", "A": "a", "B": "b"}, r"answer is None"),
        ("gsm8k", {"question": "q", "answer": "many"}, r"needs a text with a number"),
        ("nq", {"question": "q", "answer": "one"}, r"needs a list of one text or more"),
        ("nq", {"question": "q", "answer": []}, r"needs a list"),
        ("mmlu", {**DEGREE, "domain": "law"}, r"no demos for it in .*demos\.jsonl \(none has domain 'law'\)"),
    ],
)
def test_items_of_another_shape_are_refused(task, fields, message, tmp_path):
    demos, right, _, _ = CASES[task]
    write(tmp_path, task, dev=[right, fields], demos=demos)
    with pytest.raises(InputError, match=message):
        TASKS[task].items(tmp_path, "dev")


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("nq", {"answer": ["Bob", "Robert"]}, r"answer is \['Bob', 'Robert'\]; give a text"),
        ("nq", {"question": None}, "question is None; give a text"),
        ("gsm8k", {"answer": 18}, "answer is 18; give a text"),
        ("mmlu", {"A": 0}, "A is 0; give a text"),
        ("mmlu", {"domain": ["law"]}, r"domain is \['law'\]; give a text"),
    ],
)
def test_a_prompt_holds_texts_alone(task, change, message, tmp_path):
    """Anything else stood there as Python writes it: "Answer:['Bob', 'Robert']"."""
    demos, right, _, _ = CASES[task]
    write(tmp_path, task, dev=[right], demos=[*demos, {**demos[0], **change}])
    with pytest.raises(InputError, match=rf"demos\.jsonl, line {len(demos) + 1}: {message}"):
        TASKS[task].items(tmp_path, "dev")
    if "answer" not in change:  # an item's own is no part of its prompt
        write(tmp_path, task, dev=[right, {**right, **change}], demos=demos)
        with pytest.raises(InputError, match=rf"dev\.jsonl, line 2: {message}"):
            TASKS[task].items(tmp_path, "dev")


def test_an_item_without_the_field_that_its_demos_go_by_is_refused(tmp_path):
    """By likelihood the question of MMLU does not name it."""
    demos, right, _, _ = CASES["mmlu"]
    write(tmp_path, "mmlu", dev=[{key: right[key] for key in right if key != "domain"}], demos=demos)
    with pytest.raises(InputError, match=r"dev\.jsonl, line 1: there is no field 'domain'"):
        CHOICE_TASKS["mmlu"].items(tmp_path, "dev")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"question": "q"\n', r"dev\.jsonl, line 1 is no JSON"),
        (b'{}\n\n{"a": 1}\n', r"dev\.jsonl, line 2 is no JSON"),
        (b"[1]\n", r"dev\.jsonl, line 1: '\[1\]' is no JSON object"),
        (b"", r"dev\.jsonl is empty; docs/evaluation\.md says what its lines hold"),
        (b'{"question": "\xff"}\n', r"dev\.jsonl is not UTF-8"),
    ],
)
def test_files_that_are_not_json_lines_are_refused(content, message, tmp_path):
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "dev.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        TASKS["piqa"].items(tmp_path, "dev")


@pytest.mark.parametrize(
    ("tasks", "task", "field"),
    [
        (TASKS, "nq", "question"),
        (TASKS, "nq", "answer"),
        (TASKS, "piqa", "B"),
        (CHOICE_TASKS, "piqa", "question"),
        (CHOICE_TASKS, "piqa", "B"),
    ],
    ids=lambda value: value if isinstance(value, str) else "written" if value is TASKS else "by likelihood",
)
def test_half_a_surrogate_pair_is_told_before_a_model_is_loaded(tasks, task, field, tmp_path):
    """JSON can name one; it was an UnicodeEncodeError, or an error without the line, after the models."""
    demos, right, _, _ = CASES[task]
    text = f"half {HALF} of a llama"
    value = [text] if field == "answer" else text
    says = rf"line 2: {field} has half of a surrogate pair at character 5"
    write(tmp_path, task, dev=[right, {**right, field: value}], demos=demos)
    with pytest.raises(InputError, match=rf"dev\.jsonl, {says}"):
        tasks[task].items(tmp_path, "dev")
    if demos:
        write(tmp_path, task, dev=[right], demos=[demos[0], {**demos[0], field: text}])
        with pytest.raises(InputError, match=rf"demos\.jsonl, {says}"):
            tasks[task].items(tmp_path, "dev")


@with_data
@pytest.mark.parametrize(
    ("task", "split", "total", "without_gold"),
    [
        ("gsm8k", "dev", 300, 0),
        ("gsm8k", "test", 660, 2),
        ("arc_challenge", "dev", 1119, 23),
        ("arc_challenge", "test", 586, 9),
        ("piqa", "test", 919, 0),
        ("mmlu", "dev", 1531, 0),
        ("mmlu", "test", 7021, 0),
        ("triviaqa", "dev", 475, 0),
        ("triviaqa", "test", 2050, 0),
        ("nq", "dev", 1600, 0),
        ("nq", "test", 1805, 0),
    ],
)
def test_the_data_is_read_whole(task, split, total, without_gold):
    benchmark = TASKS[task]
    items = benchmark.items(DATA, split)
    assert [item.index for item in items] == list(range(total))
    assert sum(not benchmark.has_gold(item) for item in items) == without_gold
    assert not any(benchmark.correct(silence, item) for item in items for silence in ("", "\n", " the", "…"))
    shots = {"gsm8k": 4, "arc_challenge": 0, "piqa": 0, "mmlu": 5, "triviaqa": 5, "nq": 5}[task]
    assert {item.prompt.count("\nAnswer:") for item in items} == {shots + 1}
    assert all(item.prompt.endswith("\nAnswer:") for item in items)


@with_data
def test_demos_of_the_data():
    lines = (DATA / "gsm8k" / "demos.jsonl").read_text(encoding="utf-8").splitlines()
    (item,) = TASKS["gsm8k"].items(DATA, "dev", 1)
    demos = "".join(
        "Question: " + one["question"] + "\nLet's think step by step\nAnswer:" + one["answer"] + "\n"
        for one in map(json.loads, lines)
    )
    own = item.fields["question"]
    assert item.prompt == demos + "Question: " + own + "\nLet's think step by step\nAnswer:"
    assert demos.count("\n\n") == 4  # the demos teach the stop
    assert item.references == ("12",)

    items = TASKS["mmlu"].items(DATA, "test", 300)
    assert len({item.fields["domain"] for item in items}) == 57
    for item in items:
        assert item.prompt.count(f"question about {item.fields['domain']}. Answer") == 6
        assert Counter(item.prompt.split("\n"))[item.prompt.split("\n")[0]] == 6

    nq = TASKS["nq"].items(DATA, "test", 1)[0].prompt
    assert nq == (
        "Answer this questions:\n"
        "Question:who sings that song nothing compares to you\nAnswer:Prince\n"
        "Question:real housewives of atlanta married to nfl player\nAnswer:Kim Zolciak\n"
        "Question:who played slim robinson in tour de pharmacy\nAnswer:Daveed Diggs\n"
        "Question:what city is 50 shades of grey set in\nAnswer:Vancouver , Washington\n"
        "Question:the first movie of planet of the apes\nAnswer:Planet of the Apes\n"
        "Question:when was the last time anyone was on the moon\nAnswer:"
    )


@with_data
def test_gold_numbers_of_the_data_are_whole_and_not_negative():
    """So neither signs nor decimals of wrong outputs can hide a right one."""
    numbers = [item.references[0] for split in ("dev", "test") for item in TASKS["gsm8k"].items(DATA, split)]
    assert len(numbers) == 960
    assert all(number.isdigit() for number in numbers)
    assert {"132000", "2125"} <= set(numbers)


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("The answer is 12.", "12"),
        (" 12", "12"),
        ("12.0", "12"),
        ("12.50%", "12.5"),
        ("1,234.50", "1234.5"),
        ("so $1,234,567.", "1234567"),
        ("**$18.00**", "18"),
        ("\\boxed{18}", "18"),
        ("18 dollars!", "18"),
        ("he pays 18.She left", "18"),
        ("007", "7"),
        ("0.0", "0"),
        (".5", "0.5"),
        ("$.50 each", "0.5"),
        ("wait...5", "5"),
        ("1.2.3", "3"),
        ("the sets 1,2,3", "3"),
        ("1, 234", "234"),
        ("12,34", "34"),
        ("1,2345", "2345"),
        ("16 - 3 - 4 = 9", "9"),
        ("3/4", "4"),
        ("5th of 10th", "10"),
        ("1" * 400, "1" * 400),
        ("٣", None),
        ("twelve", None),
        ("", None),
        ("-", None),
        ("$,.", None),
    ],
)
def test_last_number(output, number):
    assert last_number(output) == number


@pytest.mark.parametrize(
    ("output", "number"),
    [
        ("-5", "-5"),
        ("is -5.", "-5"),
        ("is −5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("= -1,000.50", "-1000.5"),
        ("(-5)", "-5"),
        ("x=-5", "-5"),
        ("11 - -9", "-9"),
        ("It fell. -9", "-9"),
        ("10\n-5", "-5"),
        ("-0", "0"),
        ("-0.00", "0"),
        ("9-5", "5"),
        ("9 -5", "5"),
        ("9%-5", "5"),
        ("(4)-5", "5"),
        ("(4) -5", "5"),
        ("9 - 5", "5"),
        ("- 5", "5"),
        ("A-5", "5"),
        ("5–7 days", "7"),
        ("the answer--18", "18"),
        ("9-$5", "5"),
    ],
)
def test_sign_of_the_last_number(output, number):
    assert last_number(output) == number


@given(st.integers(-(10**30), 10**30), st.text("0123456789", max_size=6), st.text("xyz :*\n", max_size=5))
def test_numbers_written_in_any_way_are_the_same_number(whole, decimals, before):
    written = f"{whole}.{decimals}" if decimals else f"{whole}"
    grouped = f"{whole:,}.{decimals}" if decimals else f"{whole:,}"
    texts = [
        f"7{before} = {one}{end}" for one in (written, grouped) for end in ("", ".", "%", " eggs.", ",\n")
    ]
    (number,) = {last_number(text) for text in texts}
    sign = "-" if written.startswith("-") and (int(whole) or decimals.strip("0")) else ""
    assert number == sign + str(abs(whole)) + (f".{decimals.rstrip('0')}" if decimals.strip("0") else "")
    assert last_number(number) == number


@given(st.text(st.characters(exclude_characters="0123456789")))
def test_text_without_digits_has_no_number(text):
    assert last_number(text) is None


@pytest.mark.parametrize(
    ("output", "letter"),
    [
        (" A", "A"),
        ("A", "A"),
        ("(B", "B"),
        (" (B)", "B"),
        ("\nC", "C"),
        ("**D**", "D"),
        ("A.", "A"),
        ("B. The second", "B"),
        ("_C_", "C"),
        (" a", None),
        ("Answer", None),
        (" Apple", None),
        ("AB", None),
        ("A1", None),
        ("É", None),
        ("Bé", None),
        (" E", None),
        ("The answer is B", None),
        (" 1", None),
        ("", None),
        (" ", None),
        ("\n", None),
    ],
)
def test_first_letter(output, letter):
    assert first_letter(output, "ABCD") == letter
    assert TASKS["mmlu"].answer(output) == TASKS["arc_challenge"].answer(output) == letter


def test_letters_that_are_no_options_are_no_answers():
    assert TASKS["piqa"].answer(" B") == "B"
    assert TASKS["piqa"].answer(" C") is None
    assert TASKS["mmlu"].correct(" C", item_of("mmlu", "C"))
    assert not TASKS["mmlu"].correct(" C", item_of("mmlu", "A"))


def test_arc_items_without_options_are_never_right(tmp_path):
    fields = {**FOLD, "A": "", "B": "", "C": "", "D": "", "answer": "2"}
    item = the_item(tmp_path, "arc_challenge", [], fields)
    arc = TASKS["arc_challenge"]
    assert not any(arc.correct(output, item) for output in (" A", " B", " C", " D", " 2", "2", ""))
    assert not arc.has_gold(item)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Eiffel\tTower!", "eiffel tower"),
        ("An A-Team", "ateam"),
        ("Theatre", "theatre"),
        ("O'Neill, Ed", "oneill ed"),
        ("vancouver , washington", "vancouver washington"),
        ("U.S.A.", "usa"),
        ("République", "république"),
        ("O’Neill", "o’neill"),  # not ASCII, so no punctuation for SQuAD's script
        ("the", ""),
        ("A+", ""),
    ],
)
def test_normalised_is_squad_s(text, normal):
    assert normalised(text) == normal


@pytest.mark.parametrize(
    ("output", "right"),
    [
        ("Niger\n", True),
        (" the niger.\nQuestion:What", True),
        ("NIGER REPUBLIC", True),
        ("Niger Republic is the", False),
        ("Nigeria", False),
        ("Chad\nNiger", False),
        ("\nNiger", False),  # the stop comes first
        ("", False),
        ("the", False),
    ],
)
def test_short_answers_match_exactly(output, right):
    item = item_of("triviaqa", "Niger Republic", "The Niger")
    assert TASKS["triviaqa"].correct(output, item) is TASKS["nq"].correct(output, item) is right


@pytest.mark.parametrize(
    ("output", "right"),
    [("A+", True), (" a+ \n", True), ("A-", False), ("the", False), ("", False), ("B+", False)],
)
def test_references_that_normalising_empties_are_compared_as_they_are(output, right):
    assert TASKS["nq"].correct(output, item_of("nq", "A+")) is right


def test_answers_are_what_the_text_says():
    assert TASKS["nq"].answer(" Harry Patch \nQuestion") == "Harry Patch"
    assert TASKS["nq"].answer("  \nHarry") is None
    assert TASKS["gsm8k"].answer("It is 4.\nSo 5\n\nQuestion: 6 apples") == "5"
    assert TASKS["gsm8k"].answer("\n\n5") is None
    assert TASKS["gsm8k"].correct("so $1,800.00\n\n7", item_of("gsm8k", "1800"))
    assert not TASKS["gsm8k"].correct("1800, or 7\n", item_of("gsm8k", "1800"))
    assert not TASKS["gsm8k"].correct("18.5", item_of("gsm8k", "18"))
    assert not TASKS["gsm8k"].correct("none", item_of("gsm8k", "18"))


@given(st.text("ab\n", max_size=12))
def test_up_to_stop(text):
    kept = up_to_stop(text, ["\n\n", "ab"])
    assert text.startswith(kept)
    assert "\n\n" not in kept
    assert "ab" not in kept
    assert kept == text or text[len(kept) :].startswith(("\n\n", "ab"))
    assert up_to_stop(text, []) == text
