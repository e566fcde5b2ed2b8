"""lm-evaluation-harness's own `local-completions` as a client of the server."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

os.environ["HF_DATASETS_OFFLINE"] = "1"  # read when `datasets` is imported

import lm_eval
import pytest
from command_line import ROOT
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from running import MAIN, Running

from deepen_ext import Ensemble
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.members.member import Member

TASKS = ROOT / "tests" / "lm_eval_task"


def evaluated(served: Running, model: str, task: str, folder: Path, tokenizer: Path) -> list[dict[str, Any]]:
    """The samples of a task."""
    client = LocalCompletionsAPI(
        base_url=f"{served.url}/v1/completions",
        model=model,
        tokenizer=str(tokenizer),
        tokenizer_backend="huggingface",
        num_concurrent=4,
        max_length=400,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # the tasks name their data from here
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        found = lm_eval.simple_evaluate(
            model=client,
            tasks=[task],
            task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
            bootstrap_iters=0,
        )
    assert found is not None
    samples = found["samples"][task]
    assert len(samples) == 3
    return list(samples)


def test_texts_are_the_ensembles(
    served: Running, pair: Ensemble, tiny_smollm2_dir: Path, tmp_path: Path
) -> None:
    for sample in evaluated(served, "deepen", "deepen_write", tmp_path, tiny_smollm2_dir):
        context, settings = sample["arguments"][0]
        alone = pair.generate(context, max_new_tokens=8, stop_strings=settings["until"], draft=0)
        assert sample["resps"] == [[re.split(r"[\n.]", alone.text)[0]]]


def test_choices_of_a_member_alone_score_as_in_process(
    served: Running, tiny_smollm2: Member, tiny_smollm2_dir: Path, tmp_path: Path
) -> None:
    """By echo and logprobs."""
    alone = Ensemble([tiny_smollm2], fuser="single")
    for sample in evaluated(served, MAIN, "deepen_choice", tmp_path, tiny_smollm2_dir):
        for (context, text), found in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            expected = TextReading([tiny_smollm2], context, text).fused(alone)
            assert found[0] == pytest.approx(expected.total, abs=1e-2)
            assert found[1] == all(expected.greedy)
