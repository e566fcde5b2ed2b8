"""Pictures: what the commands draw of tiny models, what is refused early, files that can be read."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from command_line import ROOT, run
from tiny_models import PROSE, one_byte_tokens, save_model

from deepen_ext.errors import InputError
from deepen_ext.measure.doctor.diagnosis import Fused
from deepen_ext.measure.likelihood.scoring import Scores
from deepen_ext.measure.likelihood.token_likelihoods import BLOCK, TokenLikelihoods
from deepen_ext.measure.tuning.configurations import Configuration, Space
from deepen_ext.measure.tuning.tune import Tuning
from deepen_ext.plots import output_file
from deepen_ext.plots.chart import Bar, Column, Dot, Group, Row, bar_plot, bounds, dot_plot, run_plot
from deepen_ext.plots.doctor import doctor_plots
from deepen_ext.plots.likelihood import likelihood_plot
from deepen_ext.plots.picture import text_width
from deepen_ext.plots.tuning import tuning_plot

SVG = "{http://www.w3.org/2000/svg}"
ENDLESS = Dot(math.inf, math.inf, math.inf, "none")
AWKWARD = 'a <b> & "c" $x$ \x00 عربي 🙂'


SHORT = ("--piece", "150", "--context", "40")  # for the tiny models' context


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    one = save_model(folder / "one", one_byte_tokens(), seed=1)
    other = save_model(folder / "<b>other&", one_byte_tokens(), seed=2)
    return ["--model", str(one), "--model", str(other)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text(PROSE[:300])
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four items of ARC-Challenge."""
    item = {"question": "Which is wet?", "A": "rain", "B": "sand", "C": "fire", "D": "dust"}
    folder = tmp_path_factory.mktemp("data") / "arc_challenge"
    folder.mkdir()
    lines = [json.dumps({**item, "answer": letter}) for letter in "ABCD"]
    for name in ("test.jsonl", "dev.jsonl"):
        (folder / name).write_text("\n".join(lines) + "\n")
    return folder.parent


def read(picture: str | Path) -> tuple[list[str], list[str]]:
    """Its texts, and the verdict of each dot or bar."""
    content = picture.read_text("utf-8") if isinstance(picture, Path) else picture
    root = ElementTree.fromstring(content)
    assert root.tag == f"{SVG}svg"
    ids = [one.attrib["id"] for one in root.iter() if "id" in one.attrib]
    assert len(ids) == len(set(ids))
    assert "http" not in re.sub(r'xmlns(:\w+)?="[^"]*"|rdf:\w+="[^"]*"', "", content)
    texts = ["".join(one.itertext()) for one in root.iter(f"{SVG}text")]
    return texts, [one.split("-")[-1] for one in ids if one.startswith(("dot-", "bar-"))]


# ---------------------------------------------------------------- the commands


def test_nll(models: list[str], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "nll.svg"
    done = run(
        "nll", *models, "--text", str(text), *SHORT, "--fuser", "average", "--json", "--plot", str(out)
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    texts, verdicts = read(out)
    assert {"one", "<b>other&", "average", "bits a byte", "less the best member's"} <= set(texts)
    assert verdicts.count("single") == 3
    against = report["fused"][0]["against_best_single"]["bits_per_byte"]
    sure = abs(against["value"]) > 2 * against["standard_error"]
    verdict = ("gain" if against["value"] < 0 else "harm") if sure else "none"
    assert next(one for one in verdicts if one != "single") == verdict


def test_who_needs_fewer_bits() -> None:
    """Two pieces of text of two blocks each; "worse" gives one token probability 0."""

    def read_as(*nats: float) -> list[TokenLikelihoods]:
        return [TokenLikelihoods([-one for one in nats], [BLOCK, 2 * BLOCK], [], 2 * BLOCK)] * 2

    scores = Scores(
        {"main": read_as(90.0, 95.0), "best": read_as(80.0, 81.0)},
        {"better": read_as(70.0, 70.5), "same": read_as(79.0, 82.0), "worse": read_as(90.0, math.inf)},
    )
    picture = likelihood_plot(scores, list(scores.fused)).svg()
    texts, verdicts = read(picture)
    assert {"less the best member's", "less the main model's"} <= set(texts)
    assert sorted(verdicts) == sorted(["single"] * 5 + ["gain"] * 3 + ["none"] + ["harm"] * 2)


def test_eval(models: list[str], data: Path, tmp_path: Path) -> None:
    for place, scoring in enumerate(("likelihood", "generation")):
        out = tmp_path / f"{scoring}.svg"
        task = ("--task", "arc_challenge", "--data", str(data), "--scoring", scoring)
        fusers = ("--fuser", "average", "--fuser", "union-topk")
        done = run("eval", *models, *task, *fusers, "--json", str(tmp_path / scoring), "--plot", str(out))
        assert done.returncode == 0, done.stderr
        texts, verdicts = read(out)
        assert {"average", "union-topk"} <= set(texts)
        assert ("arc_challenge, acc_norm" in texts) == (place == 0)
        assert len(verdicts) == (4 if place == 0 else 2)


def test_tune(models: list[str], data: Path, tmp_path: Path) -> None:
    out = tmp_path / "tune.svg"
    done = run(
        *("tune", *models, "--task", "arc_challenge", "--data", str(data), "--fuser", "average"),
        *("--out", str(tmp_path / "preset.yaml"), "--plot", str(out)),
    )
    assert done.returncode == 0, done.stderr
    texts, verdicts = read(out)
    assert {"one alone", "<b>other& alone", "configurations, in the order they were tried"} <= set(texts)
    assert verdicts.count("gain") == 1  # the chosen one
    assert len(verdicts) > 2


class Page(HTMLParser):
    """What a page of HTML holds."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.pictures: list[str] = []
        self.words: list[str] = []
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        given = dict(attrs)
        assert not {"href", "onload", "onerror"} & given.keys()
        if tag == "img":
            kind, _, content = (given["src"] or "").partition(",")
            assert kind == "data:image/svg+xml;base64"
            self.pictures.append(base64.b64decode(content).decode())

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_doctor(models: list[str], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "doctor.html"
    done = run("doctor", *models, "--text", str(text), "--html", str(out))
    assert done.returncode == 0, done.stderr
    assert f"Written to {out}" in done.stdout
    page = Page(out.read_text("utf-8"))
    assert not {"script", "link", "iframe", "b"} & set(page.tags)
    shown = " ".join(" ".join(page.words).split())
    printed = " ".join(done.stdout.split())
    for part in ("Members, main model first", "probability on anchors", "Forward passes in milliseconds"):
        assert part in shown
        assert part in printed
    assert "<b>other&" in shown
    texts = [read(one)[0] for one in page.pictures]
    titles = ("Bits a byte fewer than ", "Where each member's probability lies", "Milliseconds a token")
    for title, one in zip(titles, texts, strict=True):
        assert any(shown.startswith(title) for shown in one)


# ---------------------------------------------------------------- what is refused before any model is read


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("picture.jpeg", "a name that ends in .svg or .png or .pdf is needed"),
        ("nowhere/a.svg", "there is no folder"),
        ("folder.svg", "is a folder; name a file in it"),
        ("pipe.svg", "is a pipe or a device, which would be replaced; name a file"),
        ("link.svg", "is a pipe or a device, which would be replaced; name a file"),
        ("a" * 300 + ".svg", "File name too long; name another file"),
    ],
)
@pytest.mark.parametrize("command", ["nll", "eval", "tune"])
def test_a_place_that_cannot_be_written(command: str, file: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.svg").mkdir()
    os.mkfifo(tmp_path / "pipe.svg")
    (tmp_path / "link.svg").symlink_to("pipe.svg")
    (tmp_path / "text.txt").write_text("some text")
    arguments = {
        "nll": ["--text", str(tmp_path / "text.txt")],
        "eval": ["--task", "nq", "--data", str(tmp_path), "--json", str(tmp_path / "out")],
        "tune": ["--text", str(tmp_path / "text.txt")],
    }[command]
    done = run(
        command, "--model", "no/such", "--model", "no/where", *arguments, "--plot", str(tmp_path / file)
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"error: --plot {tmp_path / file}" in done.stderr
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_the_place_of_doctors_page() -> None:
    done = run("doctor", "--model", "no/such", "--model", "no/where", "--html", "page.pdf")
    assert done.returncode == 2
    assert "error: --html page.pdf: a name that ends in .html is needed" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--demo", "--no-singles"], "--plot: gains are over the models alone; leave out --no-singles"),
        (["--model", "no/such"], "--plot: a model alone has no gain to show"),
        (["--preset", "ONE"], "--plot: a model alone has no gain to show"),
    ],
)
def test_no_gain_to_plot(arguments: list[str], message: str, data: Path, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text("members: [no/such]\n")
    arguments = [str(tmp_path / "one.yaml") if one == "ONE" else one for one in arguments]
    task = ("--task", "arc_challenge", "--data", str(data), "--json", str(tmp_path / "out"))
    done = run("eval", *arguments, *task, "--plot", str(tmp_path / "a.svg"))
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the models are looked for; the commands themselves never import it unasked."""
    found = importlib.util.find_spec
    monkeypatch.setattr(output_file, "find_spec", lambda name: None if name == "matplotlib" else found(name))
    (tmp_path / "text.txt").write_text("some text")
    arguments = (
        "--model",
        "no/such",
        "--text",
        str(tmp_path / "text.txt"),
        "--plot",
        str(tmp_path / "a.svg"),
    )
    done = run("nll", *arguments)
    assert done.returncode == 2
    assert "--plot needs matplotlib, which is not installed: pip install 'deepen-ext[plot]'" in done.stderr


def test_matplotlib_is_imported_when_asked_for_alone() -> None:
    code = "import sys, deepen_ext.commands.cli; print({'matplotlib', 'jinja2'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "set()\n"


# ---------------------------------------------------------------- the pictures themselves


def dots() -> tuple[list[Column], list[Group]]:
    values = [
        Dot(1.0, 0.5, 1.5, "gain"),
        Dot(-9.0, -9.5, -8.0, "harm"),
        ENDLESS,
    ]
    rows = [Row(f"{AWKWARD} {i}", [one, None], strong=i == 0) for i, one in enumerate(values)]
    return [Column(AWKWARD, -2, 2), Column("empty", 0, 1, signed=False)], [Group("group", rows)]


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.svg", "a.png", "a.pdf"):
        first, again = tmp_path / name, tmp_path / f"again-{name}"
        for file in (first, again):
            dot_plot("title", AWKWARD, *dots()).save(file)
        assert first.read_bytes() == again.read_bytes()
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "a.pdf").read_bytes().startswith(b"%PDF")


def test_dots_bars_and_hostile_names() -> None:
    picture = dot_plot("title", "explanation", *dots()).svg()
    texts, verdicts = read(picture)
    assert f"{AWKWARD} 0".replace("\x00", "\ufffd") in texts
    assert verdicts == ["gain", "harm", "none"]
    assert "@media (prefers-color-scheme: dark)" in picture
    root = ElementTree.fromstring(picture)
    assert [root.find(f"{SVG}{one}").text for one in ("title", "desc")] == ["title", "explanation"]  # type: ignore[union-attr]
    bars = [Bar("a", 0.0), Bar("b" * 200, 20.0, "gain", 10.0, 30.0)]
    texts, verdicts = read(bar_plot("bars", "", "source", [("group", bars)], unit="ms").svg())
    assert verdicts == ["single", "gain"]
    assert {"0.00 ms", "20 ms", "source"} <= set(texts)
    assert max(map(len, texts)) < 70
    run_of = [
        Dot(1.0, 0.9, 1.1, "none"),
        ENDLESS,
        Dot(0.5, 0.5, 0.5, "gain"),
    ]
    texts, verdicts = read(run_plot("run", "", "tries", run_of, [("alone", 0.8)]).svg())
    assert verdicts == ["none", "none", "gain"]
    assert "alone" in texts


def test_long_names_end_before_the_panel() -> None:
    names = ["QWEN-MMLU-WWW/" * 20, "a" * 45, "通义千问" * 12, "short"]
    rows = [Row(name, [Dot(1.0, 0.5, 1.5, "gain")], strong=True) for name in names]
    bars = [Bar(name, 1.0, "gain") for name in names]
    for title in ("title", "通义千问 ".join(names[:3])):
        for picture in (
            dot_plot(title, "", [Column("points", -2, 2)], [Group("group", rows)]),
            bar_plot(title, "", "", [("group", bars)], unit="ms"),
        ):
            left = picture.figure.axes[0].get_position().x0 * picture.width
            shown = {one.get_text(): one for one in picture.figure.texts}
            labels = [
                text
                for text, one in shown.items()
                if one.get_position()[0] * picture.width == pytest.approx(22)
            ]
            assert "short" in labels
            assert len(labels) == 4
            assert labels[0].startswith("…")
            for text in labels:
                assert 22 + text_width(text, strong=True) < left
            assert 12 + text_width(title, strong=True, size=14) < picture.width


def test_a_run_with_infinite_and_near_values() -> None:
    run_of = [Dot(0.80001, 0.80001, 0.80001, "gain"), ENDLESS, Dot(0.80002, 0.80002, 0.80002, "none")]
    lines = [("high", 0.80002), ("endless", math.inf), ("low", 0.8), ("too", math.inf), ("near", 0.800019)]
    picture = run_plot("run", "", "tries", run_of, lines)
    texts, _ = read(picture.svg())
    assert {"endless ↑", "too ↑", "0.8000100"} <= set(texts)  # no factor or offset beside the scale
    panel = picture.figure.axes[0]
    places = {one.get_text(): one.xy[1] for one in panel.texts}
    assert sorted(places, key=places.__getitem__) == ["low", "near", "high", "endless ↑", "too ↑"]
    heights = sorted(360 * panel.get_position().height * place for place in places.values())
    assert heights[-1] <= 360 * panel.get_position().height + 1e-6
    assert all(above - below > 13.9 for below, above in pairwise(heights))
    (arrow,) = [one for one in panel.lines if one.get_marker() == "^"]
    assert arrow.get_transform() == panel.get_xaxis_transform()


def test_tuning_where_uniform_weights_give_probability_0() -> None:
    space = Space(2, ())
    one, other = space.default(0), space.default(1)
    worse, best = Configuration(0, (0.4, 0.6)), Configuration(0, (0.3, 0.7))
    tried = {
        one: (math.inf, 10.0),
        other: (math.inf, 12.0),
        worse: (10.0, math.inf),
        best: (10.0, 11.0),
    }
    alone = ((20.0, 30.0), (math.inf, 10.0))
    found = Tuning(space, ("one", "two"), ("", ""), (10, 10), alone, (), 0, tried, best, True)
    texts, verdicts = read(tuning_plot(found).svg())
    assert verdicts == ["none", "none", "none", "gain"]
    assert {"one alone", "two alone ↑"} <= set(texts)
    assert any(one.endswith("Arrows: an item has probability 0.") for one in texts)


def test_no_dot_where_all_give_the_sample_probability_0() -> None:
    both = [
        Fused("one", (0.5, 0.5), None, True, math.inf, gain, error, False)
        for gain, error in ((math.nan, None), (0.2, 0.01), (-math.inf, None))
    ]
    found: Any = SimpleNamespace(fused=both, best_single=SimpleNamespace(name="two"))
    _, verdicts = read(next(doctor_plots(found)).svg())
    assert verdicts == ["gain", "harm"]


def test_bounds_hold_what_is_finite() -> None:
    shown = [Dot(1.0, -3.0, 2.0, "none"), ENDLESS, None]
    assert bounds(shown, 0.5) == pytest.approx((-3.15, 2.1))
    assert bounds([], 0.5) == (-0.5, 0.5)


def test_a_disk_that_does_not_take_it(tmp_path: Path) -> None:
    (tmp_path / "a.svg").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        output_file.write_file(tmp_path / "a.svg", "")
    assert [path.name for path in tmp_path.iterdir()] == ["a.svg"]
