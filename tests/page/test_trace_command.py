"""`deepen-ext trace`, and the page as a file: without a browser."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from command_line import run

from deepen_ext import Ensemble, InputError
from deepen_ext.fusers.make import FUSERS
from deepen_ext.serving.page import page_html, trace_html

ROOT = Path(__file__).resolve().parents[2]
STATIC = ROOT / "deepen_ext" / "serving" / "page" / "static"
RECORD = {
    "row": 0,
    "position": 0,
    "token": {"id": 5, "text": "a"},
    "main_choice": {"id": 6, "text": "b"},
    "text": "a",
    "not_asked": None,
    "draft": None,
    "members": [
        {"name": "one", "weight": 0.5, "top": [{"id": 6, "text": "b", "probability": 0.5}]},
        {"name": "two", "weight": 0.5, "top": [{"id": 1, "text": "a", "probability": 0.9}]},
    ],
    "lost": [],
    "fused": [{"id": 5, "text": "a", "probability": 0.6}],
    "ms": {"members": {"one": 1.5, "two": 2}, "fusion": 0.1, "sampling": 0.1, "handoff": 0.1},
}


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.jsonl"
    file.write_text(json.dumps(RECORD) + "\n", encoding="utf-8")
    return file


def embedded(page: str) -> Any:
    (data,) = re.findall(r'<script type="application/json" id="trace">(.*?)</script>', page, re.DOTALL)
    return json.loads(data)


def test_a_trace_becomes_a_page(pair: Ensemble, tmp_path: Path) -> None:
    file, page = tmp_path / "trace.jsonl", tmp_path / "made" / "page.html"
    pair.generate(["The ", "Once "], max_new_tokens=6, trace=file)
    done = run("trace", str(file), "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    html = page.read_text(encoding="utf-8")
    assert f"{page.stat().st_size:,} bytes" in done.stderr
    assert embedded(html) == [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert "<form" not in html
    assert "connect-src 'none'" in html
    assert [one.name for one in page.parent.iterdir()] == ["page.html"]  # nothing temporary is left


def test_parts_of_a_character_have_their_bytes(pair: Ensemble) -> None:
    records: list[dict[str, Any]] = []
    first, *_ = pair.members[0].vocabulary.encode("🙂")
    pair.generate("The ", max_new_tokens=1, sequence_bias={(first,): 90.0}, trace=records.append)
    assert records[0]["token"] == {"id": first, "text": "\ufffd", "bytes": "f0"}
    assert records[0]["main_choice"].keys() == {"id", "text"}


def test_a_record_has_the_text_that_its_token_completed(pair: Ensemble) -> None:
    records: list[dict[str, Any]] = []
    written = pair.generate("The 🙂", max_new_tokens=24, draft=3, trace=records.append)
    assert "".join(one["text"] for one in records) == written.text


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"line 2, column 2: this is no JSON"),
        ("{}", "line 2: it has no row; this is no line that --trace has written"),
        ("[1]", "line 2 is no JSON object"),
        (json.dumps(RECORD | {"row": -1}), "line 2: row is -1, not a whole number"),
        (json.dumps(RECORD | {"token": 5}), "line 2: token is no JSON object"),
        (json.dumps(RECORD | {"members": []}), "line 2: it has no members"),
        (json.dumps(RECORD | {"members": "x" * 99}), r"line 2: members is 'x{39}\.\.\., not a list"),
        (json.dumps(RECORD | {"draft": "won"}), "line 2: its draft is 'won'"),
        (json.dumps(RECORD | {"draft": "w" * 99}), r"line 2: its draft is 'w{39}\.\.\.;"),
        (json.dumps(RECORD | {"lost": [1]}), "line 2: its lost is no list of names"),
        (json.dumps(RECORD | {"lost": 1}), "line 2: its lost is no list of names"),
        (json.dumps(RECORD | {"lost": "one"}), "line 2: its lost is no list of names"),
        (
            json.dumps(RECORD | {"token": {"id": 5, "text": "\ufffd", "bytes": 9}}),
            "token: bytes is 9, not a text",
        ),
        (json.dumps(RECORD | {"ms": {"members": {}, "fusion": None}}), "ms: fusion is None, not a finite"),
        (
            json.dumps(RECORD | {"ms": {"members": {"\x1b[2J": ""}}}),
            r"members: '\\x1b\[2J' is '', not a finite",
        ),
        (json.dumps(RECORD).replace("0.9", "9" * 400), r"probability is 9{40}\.\.\., not a finite number"),
        (json.dumps(RECORD).replace("0.9", "NaN"), "members, number 2: top, number 1: probability is nan"),
        (json.dumps(RECORD).replace("0.9", '"<b>"'), "probability is '<b>', not a finite number"),
        (json.dumps({k: v for k, v in RECORD.items() if k != "not_asked"}), "line 2: it has no not_asked"),
        ("[" * 100_000, "line 2: this is no JSON: nested too deeply"),
        ('{"step": ' + "9" * 5000 + "}", "line 2: this is no JSON: a number of too many digits"),
        (b"\xff", "line 2 is not UTF-8 text"),
    ],
)
def test_a_bad_line_is_named(trace: Path, line: str | bytes, said: str) -> None:
    with trace.open("ab") as opened:
        opened.write((line if isinstance(line, bytes) else line.encode()) + b"\n")
    page = trace.with_name("page.html")
    done = run("trace", str(trace), "--html", str(page))
    assert done.returncode == 2
    assert re.search(rf"error: .*trace\.jsonl: .*{said}", done.stderr), done.stderr
    assert not page.exists()


def test_a_last_line_that_is_cut_off(trace: Path) -> None:
    """Of a killed run: the page has the whole lines, and a warning names the line."""
    pages = [trace.with_name("whole.html"), trace.with_name("page.html")]
    run("trace", str(trace), "--html", str(pages[0]))
    with trace.open("a") as opened:
        opened.write('{"row": 0, "posi')
    done = run("trace", str(trace), "--html", str(pages[1]))
    assert done.returncode == 0
    assert "trace.jsonl: line 2, the last, is cut off (the run was killed?); it is left out" in done.stderr
    assert pages[1].read_bytes() == pages[0].read_bytes()
    trace.write_text('{"row": 0, "posi')
    done = run("trace", str(trace), "--html", str(pages[1]))
    assert done.returncode == 2
    assert "has no record" in done.stderr


@pytest.mark.parametrize(
    ("file", "page", "said"),
    [
        ("none.jsonl", "page.html", "none.jsonl: No such file or directory; name a file that --trace"),
        ("empty.jsonl", "page.html", "empty.jsonl has no record"),
        ("trace.jsonl", "trace.jsonl", "is the trace itself"),
        ("trace.jsonl", ".", "is a folder; name a file"),
        ("trace.jsonl", "trace.jsonl/page.html", "page.html: cannot be written: "),
    ],
)
def test_a_file_that_cannot_be(trace: Path, file: str, page: str, said: str) -> None:
    trace.with_name("empty.jsonl").write_text("\n")
    before = trace.read_bytes()
    done = run("trace", str(trace.with_name(file)), "--html", str(trace.parent / page))
    assert done.returncode == 2
    assert said in done.stderr
    assert trace.read_bytes() == before


def test_a_failure_leaves_the_last_page(trace: Path) -> None:
    page = trace.with_name("page.html")
    page.write_text("the last one")
    trace.write_text("no JSON\n")
    assert run("trace", str(trace), "--html", str(page)).returncode == 2
    assert page.read_text() == "the last one"


def test_records_from_a_program(trace: Path) -> None:
    """A generator will do; half a character, and what ends a script, are no harm."""
    hostile = RECORD | {"text": "\ud800</script><!--\u2028"}
    page = trace_html(iter([RECORD, hostile]), title="\udcff<b>")
    assert page.encode()
    assert embedded(page) == [RECORD, hostile]
    assert page.count("</script>") == 2
    assert "<!--" not in page
    with pytest.raises(InputError, match="record 2: it has no row"):
        trace_html([RECORD, {}])
    for more in (math.nan, object()):  # in a part that the page does not look at
        with pytest.raises(InputError, match=r"record 2 has what JSON cannot: .*; leave it out"):
            trace_html([RECORD, RECORD | {"more": more}])


def test_the_command_loads_no_torch(trace: Path) -> None:
    program = (
        "import sys; from deepen_ext.commands.cli import app\n"
        f"app(['trace', {str(trace)!r}, '--html', {str(trace)!r} + '.html'], standalone_mode=False)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, timeout=60)


def test_the_page_is_light_and_asks_nobody_else() -> None:
    page = page_html()
    assert len(page.encode()) < 60_000
    assert not re.findall(r"(?:src|href|action)=(?!\"data:,\")|url\(|https?:|@import", page)
    assert "innerHTML" not in page
    assert re.search(r"script-src 'sha256-[\w+/]+=*'; connect-src 'self'", page)


def test_every_fuser_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FUSERS, "of-tomorrow", FUSERS["product"])
    (offered,) = re.findall(r'<datalist id="fusers">(.*?)</datalist>', page_html())
    assert set(offered.split("<option>")[1:]) == {"auto", *FUSERS} - {"single"}


def test_words_can_be_read_on_their_ground() -> None:
    """WCAG's contrast of 4.5 for all text colours, in light and in dark."""
    schemes = re.findall(r":root \{(.*?)\}", (STATIC / "style.css").read_text(), re.DOTALL)
    light = dict(re.findall(r"--([\w-]+): (#\w+)", schemes[0]))
    dark = light | dict(re.findall(r"--([\w-]+): (#\w+)", schemes[1]))
    for colours in (light, dark):
        pairs = [(f"m{i}", "sheet") for i in range(8)]
        pairs += [("ink", "sheet"), ("soft", "sheet"), ("soft", "paper"), ("accent", "sheet")]
        pairs += [("on-accent", "accent"), ("bad", "bad-paper"), ("ink", "track"), ("soft", "track")]
        for one, ground in pairs:
            assert contrast(colours[one], colours[ground]) >= 4.5, (one, ground, colours[one])


def contrast(one: str, other: str) -> float:
    dim, bright = sorted(map(luminance, (one, other)))
    return (bright + 0.05) / (dim + 0.05)


def luminance(colour: str) -> float:
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
