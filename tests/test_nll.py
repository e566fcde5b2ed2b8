"""Scores with their standard errors, and `deepen-ext nll`."""

from __future__ import annotations

import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
from command_line import run
from tiny_models import one_byte_tokens, save_model

from deepen_ext.commands.nll import show
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.measure.likelihood.scoring import score_texts
from deepen_ext.measure.likelihood.text_reading import TextReading, TokenLikelihoods, pieces
from deepen_ext.measure.likelihood.token_likelihoods import BLOCK, Difference, Estimate, Score, ratio
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

TEXT = (
    "The naïve café in Zürich sells strawberries 🍓 and ice from Antarctica; a kilo costs 1,250 €.\n"
    "def area(r):\n    # π·r²\n    return 3.14159 * r**2\n"
)


def likelihoods(nats: list[float], size: int = BLOCK) -> TokenLikelihoods:
    """One token a block."""
    ends = [size * (i + 1) for i in range(len(nats))]
    return TokenLikelihoods([-one for one in nats], ends, [one < 1 for one in nats], size * len(nats))


def test_ratio_of_equal_blocks_is_the_mean() -> None:
    amounts = [3.0, 5.0, 1.0, 8.0]
    found = ratio(amounts, [2.0] * 4)
    assert found.value == pytest.approx(statistics.fmean(amounts) / 2)
    assert found.error == pytest.approx(statistics.stdev(amounts) / math.sqrt(4) / 2)
    assert ratio([3.0], [2.0]) == Estimate(1.5, None)
    assert ratio([math.inf, 1.0], [1.0, 1.0]) == Estimate(math.inf, None)


def test_standard_error_of_unequal_blocks_is_what_samples_scatter_by() -> None:
    """Over many samples, the estimate scatters by the error that each sample gives itself."""
    rng = random.Random(0)
    values, errors = [], []
    for _ in range(400):
        sizes = [rng.uniform(20, 128) for _ in range(60)]
        found = ratio([size * rng.gauss(1.2, 0.4) for size in sizes], sizes)
        assert found.error is not None
        values.append(found.value)
        errors.append(found.error)
    assert statistics.fmean(errors) == pytest.approx(statistics.stdev(values), rel=0.1)


def test_score_and_difference() -> None:
    first = [likelihoods([3.0, 1.5, 0.5]), likelihoods([2.0])]
    second = [likelihoods([2.0, 1.0, 1.0]), likelihoods([1.0])]
    score = Score.of(first)
    assert (score.tokens, score.nbytes, score.impossible, score.greedy) == (4, 4 * BLOCK, 0, 0.25)
    assert score.nats_per_token.value == pytest.approx(7 / 4)
    assert score.bits_per_byte.value == pytest.approx(7 / math.log(2) / 4 / BLOCK)
    less = Difference.of(first, second)
    assert less.nats_per_token.value == pytest.approx((7 - 5) / 4)
    assert less.nats_per_token.error == pytest.approx(statistics.stdev([1, 0.5, -0.5, 1]) / 2)
    assert Difference.of(first, first).bits_per_byte == Estimate(0, 0)
    never = Score.of([likelihoods([3.0, math.inf])])
    assert never.impossible == 1
    assert never.bits_per_byte == Estimate(math.inf, None)
    with pytest.raises(InputError, match="not of the same texts"):
        Difference.of(first, first[:1])


def test_score_texts(smollm2: Member, gemma: Member, capsys: pytest.CaptureFixture[str]) -> None:
    base = Ensemble([smollm2, gemma], recipe="bytes", cache=False)
    ensembles = {"deepen": base, "more of one": base.variant(weights=[0.9, 0.1])}
    texts = pieces(TEXT, length=90, context=30)
    assert len(texts) > 1
    seen: list[str] = []
    scores = score_texts(texts, ensembles, progress=seen.append)
    assert len(seen) == len(texts)
    assert scores.main == smollm2.name
    for i, text in enumerate(texts):
        reading = TextReading([smollm2, gemma], *text)
        assert scores.alone[gemma.name][i] == reading.member(gemma)
        for name, ensemble in ensembles.items():
            assert scores.fused[name][i].logprobs == pytest.approx(reading.fused(ensemble).logprobs, abs=1e-5)
    bits = {name: scores.score(name).bits_per_byte.value for name in (smollm2.name, gemma.name, "deepen")}
    assert scores.best_single == min((smollm2.name, gemma.name), key=lambda name: bits[name])
    found = scores.against("deepen", scores.best_single).bits_per_byte.value
    assert found == pytest.approx(bits["deepen"] - bits[scores.best_single])
    show(scores, list(ensembles))
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 80
    for name, value in bits.items():
        assert re.search(rf"^{re.escape(name)} .* {value:.4f} ± ", shown, re.MULTILINE)
    assert f"{found:+.4f} ± " in shown
    with pytest.raises(InputError, match="swapped has other members, or another main model"):
        score_texts(texts, {**ensembles, "swapped": Ensemble([gemma, smollm2], fuser="union-topk")})
    with pytest.raises(InputError, match=f"{gemma.name} is a member's name and an ensemble's"):
        score_texts(texts, {gemma.name: base})
    with pytest.raises(InputError, match="nothing to measure"):
        score_texts([], ensembles)


class TestCommand:
    """`deepen-ext nll`."""

    def test_json_and_table(self, tiny_smollm2_dir: Path, tmp_path: Path) -> None:
        bytes_dir = save_model(tmp_path / "bytes", one_byte_tokens(), seed=1)
        options = (
            *("--model", str(tiny_smollm2_dir), "--model", str(bytes_dir), "--text", "-", "--weight", "0.7"),
            *("--weight", "0.3", "--fuser", "deepen:bytes", "--fuser", "average"),
        )
        done = run("nll", *options, "--piece", "90", "--context", "30", "--json", stdin=TEXT.encode())
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        members = [load_member(tiny_smollm2_dir), load_member(bytes_dir)]
        base = Ensemble(members, recipe="bytes", weights=[0.7, 0.3], cache=False)
        cut = pieces(TEXT, length=90, context=30)
        scores = score_texts(cut, {"deepen:bytes": base, "average": base.variant(fuser="average")})
        assert report["text"] == {"file": "-", "pieces": len(cut), "piece": 90, "context": 30}
        assert [one["name"] for one in report["members"]] == list(scores.alone)
        assert [one["backend"] for one in report["members"]] == base.backends
        assert [one["method"] for one in report["fused"]] == list(scores.fused)
        assert (report["main"], report["best_single"]) == (scores.main, scores.best_single)
        for one in report["members"] + report["fused"]:
            score = scores.score(one.get("name") or one["method"])
            assert (one["tokens"], one["bytes"]) == (score.tokens, len(TEXT.encode()))
            for field in ("nats_per_token", "bits_per_byte"):
                estimate = getattr(score, field)
                assert one[field]["value"] == pytest.approx(estimate.value, abs=1e-4)
                assert one[field]["standard_error"] == pytest.approx(estimate.error, abs=1e-4)
        for one in report["fused"]:
            assert one["weights"] == [0.7, 0.3]
            for key, single in (("against_main", scores.main), ("against_best_single", scores.best_single)):
                against = scores.against(one["method"], single).bits_per_byte
                assert one[key]["bits_per_byte"]["value"] == pytest.approx(against.value, abs=1e-4)

    def test_short_text(self, tiny_smollm2_dir: Path, tmp_path: Path) -> None:
        """One block has no standard error, and the footnote says so."""
        bytes_dir = save_model(tmp_path / "bytes", one_byte_tokens(), seed=1)
        options = ("--model", str(tiny_smollm2_dir), "--model", str(bytes_dir), "--fuser", "average")
        for text, has in ((TEXT[:100], False), (TEXT, True)):
            done = run("nll", *options, "--text", "-", stdin=text.encode())
            assert done.returncode == 0, done.stderr
            shown = " ".join(done.stdout.split())
            assert ("±: standard error between blocks" in shown, "±" in shown) == (has, has)
            assert ("No standard errors: they take two blocks of 128 bytes" in shown) == (not has)

    def test_wrong_input(self, tmp_path: Path) -> None:
        """Said before a model is loaded."""
        latin = tmp_path / "latin.txt"
        latin.write_bytes("Zürich".encode("latin-1"))
        empty = tmp_path / "empty.txt"
        empty.write_bytes(b"")
        preset, text = tmp_path / "single.yaml", tmp_path / "text.txt"
        preset.write_text("members: [/no/such, /no/other]\nfuser: single\n")
        text.write_text("some text")
        for options, message in (
            (["--preset", str(preset), "--text", str(text)], "the preset's fuser is single"),
            (["--demo", "--text", str(tmp_path / "nowhere")], "No such file or directory; name a text file"),
            (["--demo", "--text", str(latin)], "is not UTF-8 text"),
            (["--demo", "--text", str(empty)], "the text is empty"),
            (["--text", "-"], "name the models with --model"),
            (["--demo", "--text", "-", "--fuser", "single"], "leave --fuser single out"),
        ):
            done = run("nll", *options)
            assert done.returncode == 2
            assert message in done.stderr

    def test_two_fusers_of_one_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The second would be measured under the name of both; said before a model is loaded."""
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("first_of_two", "second_of_two"):
            (tmp_path / f"{name}.py").write_text("def fuse(logits, said, weights):\n    return logits\n")
        text = tmp_path / "text"
        text.write_text("some text")
        models = ["--model", "/no/such", "--model", "/no/other", "--text", str(text)]
        for one, other, called in (
            ("first_of_two:fuse", "second_of_two:fuse", "fuse"),
            ("deepen", "deepen:bytes", "deepen:bytes"),
        ):
            done = run("nll", *models, "--fuser", one, "--fuser", other)
            assert done.returncode == 2
            assert f"two of the fusers, or a fuser and a model, are called {called}; name each" in done.stderr

    def test_a_model_with_the_name_of_a_fuser(self, tiny_smollm2_dir: Path, tmp_path: Path) -> None:
        """The fused figures were shown as the model's own."""
        (tmp_path / "average").symlink_to(tiny_smollm2_dir)
        (tmp_path / "vote").symlink_to(tiny_smollm2_dir)
        (tmp_path / "text").write_text("some text")
        (tmp_path / "nq").mkdir()
        line = '{"question": "who wrote hamlet", "answer": ["Shakespeare"]}\n'
        (tmp_path / "nq" / "test.jsonl").write_text(line)
        (tmp_path / "nq" / "demos.jsonl").write_text(line.replace("[", "").replace("]", ""))
        evaluation = ["--task", "nq", "--data", str(tmp_path), "--json", str(tmp_path / "out")]
        for command, name, options in (
            ("nll", "average", ["--text", str(tmp_path / "text")]),
            ("eval", "average", evaluation),
            ("eval", "vote", evaluation),
        ):
            models = ["--model", str(tmp_path / name), "--model", str(tiny_smollm2_dir)]
            done = run(command, *models, *options, "--fuser", name)
            assert done.returncode == 2
            assert f"or a fuser and a model, are called {name}; name each once" in done.stderr
