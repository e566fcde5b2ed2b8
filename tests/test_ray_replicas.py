"""Whole ensembles in actors of a real Ray: evaluation and many prompts, and replicas that are killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import actors_alive, processes_of, until
from test_evaluation import item_lines
from typer.testing import CliRunner

from deepen_ext import Ensemble, InputError, Replicas, evaluate
from deepen_ext.cluster.pool import ReplicasLost
from deepen_ext.commands.cli import app
from deepen_ext.measure.evaluation.jobs import Progress

SMALL = {"num_cpus": 0}
PROMPTS = [f"{number} sheep, {number + 1} sheep, " for number in range(10)]


pytestmark = pytest.mark.usefixtures("real_ray")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PIQA, 24 items: with a batch of one item, six batches of four."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "piqa").mkdir()
    lines = [
        {"question": f"To dry {n} wet hands", "A": f"use towel {n}", "B": "use oil", "answer": "AB"[n % 2]}
        for n in range(24)
    ]
    (folder / "piqa" / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def make(one_byte_folders: list[Path]) -> dict[str, Ensemble]:
    fused = Ensemble.from_pretrained(one_byte_folders, fuser="average")
    singles = {member.name: Ensemble([member], fuser="single") for member in fused.members}
    return {**singles, "average": fused}


@pytest.fixture(scope="module")
def run(one_byte_folders: list[Path], data: Path) -> Callable[..., Any]:
    made = partial(make, one_byte_folders)

    def run(out: Path, **options: Any) -> None:
        given = {"scoring": "likelihood", "batch_size": 1, **options}
        if given.get("replicas"):
            evaluate(made, "piqa", data, out=out, placement=SMALL, **given)
        else:
            evaluate(made(), "piqa", data, out=out, **given)

    return run


@pytest.fixture(scope="module")
def alone(run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one process, by likelihood."""
    out = tmp_path_factory.mktemp("alone")
    run(out)
    lines = item_lines(out)
    assert len(lines) == 3
    assert all(len(own) == 24 for own in lines.values())
    assert len({str(own) for own in lines.values()}) == 3
    return out


def headers(folder: Path) -> list[str]:
    return [path.read_text().splitlines()[0] for path in sorted(folder.glob("*.jsonl"))]


@pytest.fixture(autouse=True)
def none_of_earlier_tests(real_ray: None) -> None:
    """Or a test could kill a dying actor of the test before it."""
    until(lambda: not processes_of("ReplicaActor"))


def kill_replica() -> None:
    """kill -9 of the process of one of them; afterwards Ray knows it."""
    process = processes_of("ReplicaActor")[0]
    os.kill(process, signal.SIGKILL)
    until(lambda: process not in processes_of("ReplicaActor"))


class TestEvaluation:
    def test_line_by_line_as_in_one_process(
        self, run: Callable[..., Any], alone: Path, tmp_path: Path
    ) -> None:
        before = actors_alive()
        run(tmp_path, replicas=2)
        assert item_lines(tmp_path) == item_lines(alone)
        assert headers(tmp_path) == headers(alone)
        until(lambda: actors_alive() <= before)

    def test_texts_too(self, run: Callable[..., Any], tmp_path: Path) -> None:
        for name, options in (("one", {}), ("two", {"replicas": 2})):
            run(tmp_path / name, scoring="generation", limit=10, batch_size=2, **options)
        assert item_lines(tmp_path / "two") == item_lines(tmp_path / "one")

    def test_a_replica_killed_half_way(self, run: Callable[..., Any], alone: Path, tmp_path: Path) -> None:
        said: list[str] = []
        killed = 0

        def kill(progress: Progress) -> None:
            nonlocal killed
            if progress.done >= 12 and not killed:
                killed = progress.done
                kill_replica()

        run(tmp_path, replicas=2, on_progress=kill, on_line=said.append)
        assert 12 <= killed < 40
        assert [line for line in said if "was lost: its actor has died" in line and "Left: 1" in line]
        assert item_lines(tmp_path) == item_lines(alone)

    def test_all_killed_and_gone_on_with(self, run: Callable[..., Any], alone: Path, tmp_path: Path) -> None:
        """What is done is kept; the same call goes on, with replicas or without."""

        def kill(progress: Progress) -> None:
            if progress.done == 3 * 4:
                kill_replica()

        with pytest.raises(ReplicasLost, match=r"all 1 replicas were lost.*has died.*done is kept"):
            run(tmp_path, replicas=1, on_progress=kill)
        done = sum(map(len, item_lines(tmp_path).values()))
        assert 12 <= done < 3 * 24
        run(tmp_path)
        assert item_lines(tmp_path) == item_lines(alone)

    def test_from_the_command_line(
        self, one_byte_folders: list[Path], data: Path, alone: Path, tmp_path: Path
    ) -> None:
        arguments = ["eval", "--task", "piqa", "--data", str(data), "--json", str(tmp_path)]
        arguments += [option for folder in one_byte_folders for option in ("--model", str(folder))]
        arguments += ["--scoring", "likelihood", "--fuser", "average", "--batch-size", "1"]
        arguments += ["--replicas", "2", "--placement", json.dumps(SMALL)]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        assert item_lines(tmp_path) == item_lines(alone)
        assert "Loading 2 replicas" in result.stderr
        result = CliRunner().invoke(app, [*arguments, "--placement", json.dumps(SMALL)])
        assert result.exit_code == 2
        assert "--placement: with --replicas" in result.stderr

    def test_refused(self, one_byte_folders: list[Path], data: Path, tmp_path: Path) -> None:
        given: dict[str, Any] = {"out": tmp_path, "scoring": "likelihood"}
        with pytest.raises(InputError, match="give a function that makes the ensembles"):
            evaluate({}, "piqa", data, replicas=2, **given)
        with pytest.raises(InputError, match="placement is for replicas; give replicas=N"):
            evaluate({}, "piqa", data, placement={}, **given)
        with pytest.raises(InputError, match="replicas is 0; choose 1 or more"):
            evaluate(partial(make, one_byte_folders), "piqa", data, replicas=0, **given)
        with pytest.raises(InputError, match="replica 1 of 2: num_cpus 5000 fits nowhere"):
            evaluate(
                partial(make, one_byte_folders),
                "piqa",
                data,
                replicas=2,
                placement={"num_cpus": 5000},
                **given,
            )


class TestManyPrompts:
    def test_as_one_ensemble(self, one_byte_folders: list[Path]) -> None:
        alone = Ensemble.from_pretrained(one_byte_folders)
        seeds = list(range(10))
        settings: list[dict[str, Any]] = [{}, {"do_sample": True, "temperature": 1.3, "seed": seeds}]
        with Replicas(one_byte_folders, 2, placement=SMALL) as replicas:
            for one in settings:
                wanted = alone.generate(PROMPTS, max_new_tokens=12, **one)
                found = replicas.generate_many(PROMPTS, batch_size=3, max_new_tokens=12, **one)
                assert [text.token_ids for text in found] == [text.token_ids for text in wanted]
                assert [text.backends for text in found] == [text.backends for text in wanted]
            assert len({text.text for text in found}) > 3
            for wrong, message in (
                ({"seed": 3}, "seed must be a list of 10 numbers"),
                ({"trace": "file"}, "trace is for a text that is written in this process"),
                ({"max_new_tokens": 0}, "max_new_tokens"),
                ({"batch_size": 0}, "batch_size is 0"),
            ):
                with pytest.raises(InputError, match=message):
                    replicas.generate_many(PROMPTS, **wrong)
            for wrong_prompts in (PROMPTS[0], iter(PROMPTS), None):
                with pytest.raises(InputError, match="prompts must be a list"):
                    replicas.generate_many(wrong_prompts)  # type: ignore[arg-type]
            kill_replica()
            again = replicas.generate_many(PROMPTS, batch_size=3, max_new_tokens=12, **settings[1])
            assert [text.token_ids for text in again] == [text.token_ids for text in found]
            kill_replica()
            with pytest.raises(ReplicasLost) as caught:
                replicas.generate_many(PROMPTS, batch_size=3, max_new_tokens=12)
            assert caught.value.done == [None] * 10

    def test_a_model_that_cannot_be_loaded(self, one_byte_folders: list[Path]) -> None:
        before = actors_alive()
        with pytest.raises(InputError, match="no such file or folder"):
            Replicas([one_byte_folders[0], "/nowhere/at/all"], 2, placement=SMALL)
        with pytest.raises(InputError, match="there is no backend 'nowhere'"):
            Replicas(one_byte_folders, 1, placement=SMALL, backend="nowhere")
        until(lambda: actors_alive() <= before)
