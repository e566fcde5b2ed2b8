"""The default: no text ends at its first token, unless every member that has a say would end it there.

In these tests a member's end of text is the token that it finds most probable after the prompt."""

from __future__ import annotations

from copy import copy, deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from sessions import changed
from tiny_models import PROSE

from deepen_ext import Ensemble
from deepen_ext.adapters import DeepenLogitsProcessor
from deepen_ext.decoding.drafts.draft_settings import MAIN, DraftSettings
from deepen_ext.decoding.open_run import OpenRun
from deepen_ext.decoding.prompts import read_prompts
from deepen_ext.decoding.settings import Settings
from deepen_ext.members.member import Member

PROMPT = PROSE[1300:1340]  # both have read it
TOKENS = 4


def written(member: Member, count: int) -> list[int]:
    """What the member writes alone."""
    return Ensemble([member], fuser="single").generate(PROMPT, max_new_tokens=count).token_ids


@pytest.fixture(scope="module")
def ends(tiny_smollm2: Member, tiny_gemma: Member) -> list[Member]:
    """Both members, each of which would end the text at once."""
    return [replace(one, eos_ids=tuple(written(one, 1))) for one in (tiny_smollm2, tiny_gemma)]


@pytest.fixture(scope="module")
def torn(ends: list[Member], tiny_gemma: Member) -> Ensemble:
    """The main model would end the text at once, the assistant would not."""
    return Ensemble([ends[0], tiny_gemma], fuser="follow", weights=[0.6, 0.4], cache=False)


@pytest.mark.parametrize("weights", ["prompt", [0.9, 0.1], [0.1, 0.9]])
def test_one_that_would_write_is_enough(torn: Ensemble, weights: Any) -> None:
    ensemble = torn.variant(fuser="follow", weights=weights)
    given = ensemble.generate(PROMPT, max_new_tokens=TOKENS)
    kept = ensemble.generate(PROMPT, max_new_tokens=TOKENS, min_new_tokens=1)
    assert given.token_ids == kept.token_ids
    assert given.token_ids[0] not in ensemble.members[0].eos_ids
    assert given.text


def test_all_of_them_end_it(ends: list[Member]) -> None:
    given = Ensemble(ends, fuser="follow", weights=[0.9, 0.1], cache=False).generate(PROMPT)
    assert (given.text, given.token_ids, given.finish_reason) == ("", list(ends[0].eos_ids), "eos")


def test_who_has_no_say_does_not_count(torn: Ensemble) -> None:
    given = torn.variant(fuser="follow", weights=[1.0, 0.0]).generate(PROMPT)
    assert (given.token_ids, given.finish_reason) == (list(torn.members[0].eos_ids), "eos")


def test_the_second_token_may_be_an_end(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    weights = {"fuser": "follow", "weights": [0.99, 0.01], "cache": False}
    first, second = (
        Ensemble([tiny_smollm2, tiny_gemma], **weights).generate(PROMPT, max_new_tokens=2).token_ids
    )
    assert first != second
    given = Ensemble([replace(tiny_smollm2, eos_ids=(second,)), tiny_gemma], **weights).generate(PROMPT)
    assert (given.token_ids, given.finish_reason) == ([first, second], "eos")


def test_other_fusers_take_an_end_for_a_token_like_any_other(torn: Ensemble) -> None:
    """As the paper has it."""
    given = torn.variant(fuser="deepen", weights=[0.9, 0.1]).generate(PROMPT)
    assert (given.token_ids, given.finish_reason) == (list(torn.members[0].eos_ids), "eos")


def test_a_caller_that_allows_nothing_else_gets_the_end(torn: Ensemble) -> None:
    end = list(torn.members[0].eos_ids)
    given = torn.generate(PROMPT, prefix_allowed_tokens_fn=lambda text, ids: end)
    assert (given.token_ids, given.finish_reason) == (end, "eos")


@pytest.mark.parametrize("weights", [[0.6, 0.4], [0.4, 0.6]])
def test_a_caller_of_transformers_loop_that_allows_nothing_else_gets_the_end(
    torn: Ensemble, weights: list[float]
) -> None:
    """There processors act before the fusion."""
    ensemble, end = torn.variant(weights=weights), list(torn.members[0].eos_ids)
    assert by_transformers(ensemble, max_new_tokens=1, forced_eos_token_id=end[0]) == end
    assert by_transformers(ensemble, prefix_allowed_tokens_fn=lambda _, ids: end) == end


def test_an_end_that_is_forbidden_stays_so(torn: Ensemble) -> None:
    main = torn.members[0]
    given = main.tokenizer(PROMPT, return_tensors="pt")
    scores = main.model(**given).logits[:, -1]
    scores[:, main.eos_ids] = -torch.inf
    with DeepenLogitsProcessor(torn) as fuse:
        fused = fuse(given["input_ids"], scores)
    assert bool((fused[:, main.eos_ids] == -torch.inf).all())


def test_whoever_says_what_ends_a_text_is_taken_at_his_word(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    end = written(tiny_smollm2, 1)
    pair = Ensemble([tiny_smollm2, tiny_gemma], fuser="follow", weights=[0.9, 0.1], cache=False)
    given = pair.generate(PROMPT, eos_token_id=end)
    assert (given.token_ids, given.finish_reason) == (end, "eos")


def test_a_token_that_nobody_writes_is_no_going_on(ends: list[Member]) -> None:
    """Of a chat model whose configuration does not name its end of turn."""
    vocabulary = copy(ends[1].vocabulary)
    vocabulary.tokens = [None if i in ends[1].eos_ids else text for i, text in enumerate(vocabulary.tokens)]
    assistant = replace(ends[1], eos_ids=(), vocabulary=vocabulary)
    given = Ensemble([ends[0], assistant], fuser="follow", weights=[0.9, 0.1], cache=False).generate(PROMPT)
    assert (given.token_ids, given.finish_reason) == (list(ends[0].eos_ids), "eos")


def test_a_sampled_text_has_a_first_token_too(torn: Ensemble) -> None:
    texts = torn.generate([PROMPT] * 40, max_new_tokens=1, do_sample=True, seed=1)
    assert len({tuple(one.token_ids) for one in texts}) > 1
    assert not {one.token_ids[0] for one in texts} & set(torn.members[0].eos_ids)


@pytest.mark.parametrize(
    "settings",
    [
        {"draft": 4},
        {"draft": 4, "drafter": "lookup"},
        {"certified_skip": True},
        {"certified_skip": True, "repetition_penalty": 1.2},
        {"draft": 2, "confidence_gate": 1.0},
        {"batch_size": 1},
    ],
    ids=str,
)
def test_every_way_gives_the_same_text(torn: Ensemble, settings: dict[str, Any]) -> None:
    prompts = [PROMPT, PROSE[100:160]]
    plain = {name: settings[name] for name in settings.keys() & {"repetition_penalty"}}
    want = torn.generate(prompts, max_new_tokens=TOKENS, **plain)
    given = torn.generate(prompts, max_new_tokens=TOKENS, **settings)
    assert [one.token_ids for one in given] == [one.token_ids for one in want]
    assert want[0].text


def test_a_certified_skip_asks_about_the_first_token(torn: Ensemble) -> None:
    """Here the search alone could not change it."""
    cautious = torn.variant(learning_rate=0.001)
    skipping = {"max_new_tokens": 1, "certified_skip": True}
    assert cautious.variant(fuser="deepen").generate(PROMPT, **skipping).timings.settled == 1
    text = cautious.generate(PROMPT, max_new_tokens=1).text
    assert cautious.generate(PROMPT, **skipping).text == text != ""


def test_a_gate_leaves_the_first_token_to_all(torn: Ensemble) -> None:
    given = torn.generate(PROMPT, max_new_tokens=TOKENS, confidence_gate=1e-6)
    assert given.token_ids[:1] == torn.generate(PROMPT, max_new_tokens=1).token_ids
    assert given.timings.gated == given.timings.tokens - 1
    # Of a sampled text nobody knows what the main model alone would draw, but only its first token counts.
    sampled = torn.generate(PROMPT, max_new_tokens=TOKENS, do_sample=True, seed=3, confidence_gate=1e-6)
    assert sampled.timings.gated == sampled.timings.tokens - 1 > 0


@pytest.mark.parametrize("skip", [{"certified_skip": True}, {"confidence_gate": 1e-6}], ids=str)
def test_a_first_token_that_is_no_end_may_be_spared(
    tiny_smollm2: Member, tiny_gemma: Member, skip: dict[str, Any]
) -> None:
    pair = Ensemble(
        [tiny_smollm2, tiny_gemma], fuser="follow", weights=[0.6, 0.4], learning_rate=0.001, cache=False
    )
    given = pair.generate(PROMPT, max_new_tokens=1, **skip)
    assert (given.token_ids, given.timings.skipped_share) == (written(tiny_smollm2, 1), 1.0)


def test_a_processor_that_leaves_an_end_first(tiny_smollm2: Member, tiny_gemma: Member) -> None:
    """The main model's first choice is no end, but it is forbidden, and the next one is."""
    only = {"max_new_tokens": 1, "suppress_tokens": written(tiny_smollm2, 1)}
    end = Ensemble([tiny_smollm2], fuser="single").generate(PROMPT, **only).token_ids
    main = replace(tiny_smollm2, eos_ids=tuple(end))
    cautious = {"weights": [0.6, 0.4], "learning_rate": 0.001, "cache": False}
    pair = Ensemble([main, tiny_gemma], fuser="follow", **cautious)
    assert pair.variant(fuser="deepen").generate(PROMPT, **only, certified_skip=True).timings.settled == 1
    given = pair.generate(PROMPT, **only, certified_skip=True)
    assert given.token_ids == pair.generate(PROMPT, **only).token_ids != end


def test_transformers_own_loop(torn: Ensemble) -> None:
    want = torn.generate(PROMPT, max_new_tokens=TOKENS).token_ids
    assert by_transformers(torn) == want


def by_transformers(ensemble: Ensemble, **settings: Any) -> list[int]:
    """What `generate` of the main model writes after the prompt."""
    main = ensemble.members[0]
    given = main.tokenizer(PROMPT, return_tensors="pt")
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": list(main.eos_ids), **settings}
    with DeepenLogitsProcessor(ensemble, eos_token_id=main.eos_ids) as fuse:
        output = main.model.generate(**given, logits_processor=[fuse], **settings)
    ids: list[int] = output[0, given["input_ids"].shape[1] :].tolist()
    return ids


def test_a_text_that_joins_others(torn: Ensemble) -> None:
    settings = Settings.read(torn.members[0], max_new_tokens=TOKENS)
    run = OpenRun(torn.team, settings, 2, chunk=16, drafts=DraftSettings(2, (MAIN,)))
    ids: dict[int, list[int]] = {}
    try:
        for _ in range(2):
            run.add(read_prompts(torn.members, [PROMPT], "error")[0], settings)
            for written in run.step():
                ids.setdefault(written.number, []).append(written.token)
        while run.busy:
            for written in run.step():
                ids.setdefault(written.number, []).append(written.token)
            run.ended()
    finally:
        run.close()
    assert list(ids.values()) == [torn.generate(PROMPT, max_new_tokens=TOKENS).token_ids] * 2


@pytest.mark.parametrize("constant", [-20_000.0, 20_000.0])
def test_a_constant_in_the_main_models_logits_changes_nothing(torn: Ensemble, constant: float) -> None:
    main = torn.members[0]
    model = deepcopy(main.model)
    model.lm_head.register_forward_hook(lambda _module, _given, logits: logits + constant)
    given = torn.generate(PROMPT, max_new_tokens=1).token_ids
    shifted = Ensemble([changed(main, model=model), torn.members[1]], fuser="follow", weights=[0.6, 0.4])
    assert shifted.generate(PROMPT, max_new_tokens=1).token_ids == given
