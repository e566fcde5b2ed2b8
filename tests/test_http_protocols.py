"""Members that servers of three kinds run: what they say is what the model says in this process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from http_servers import MOST_LOGPROBS, Handler, ModelServer

from deepen_ext import Ensemble
from deepen_ext.errors import InputError, MemberLost, ModelError
from deepen_ext.members.backend import Session
from deepen_ext.members.distribution import Distribution
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member
from deepen_ext.members.probes import COMPARED, first_difference
from deepen_ext.members.top_k_only import TopKOnly
from deepen_ext.text.vocabulary import PROBES

KINDS = ("openai", "sglang", "llama.cpp")
TEXT = "The Eiffel Tower is in the city of"


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest, tiny_smollm2: Member) -> Iterator[ModelServer]:
    with ModelServer(tiny_smollm2, request.param) as found:
        yield found


@pytest.fixture(scope="module")
def served(server: ModelServer, tiny_smollm2_dir: Path) -> Iterator[Member]:
    member = load_member(server.url, tokenizer=tiny_smollm2_dir, timeout=20)
    yield member
    member.backend.close()


def findings(member: Member) -> dict[str, tuple[str, bool]]:
    return {one.name: (one.text, one.good) for one in member.backend.describe().findings}


def assert_close(found: Distribution, wanted: Distribution) -> None:
    assert found.topk.ids.tolist() == wanted.topk.ids.tolist()
    torch.testing.assert_close(found.topk.probs, wanted.topk.probs, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.topk.tail, wanted.topk.tail, atol=1e-4, rtol=0)


class TestAtStart:
    def test_the_kind_is_found_out(self, server: ModelServer, served: Member) -> None:
        found = findings(served)
        assert f"at {server.url}, protocol {server.kind}" in found["server"][0]
        assert found["model"] == ("org/tiny-model", True)
        assert served.name == "tiny-model"
        assert served.context_length == 199

    def test_what_is_found(self, server: ModelServer, served: Member) -> None:
        found = findings(served)
        assert "our ids for all 15 probe texts" in found["tokenizer"][0]
        most = MOST_LOGPROBS if server.kind == "openai" else None
        assert served.backend.capabilities.max_topk == most
        assert found["top-k"] == (("20 tokens at most", False) if most else ("any number of tokens", True))
        after = server.kind == "sglang"  # by default
        assert ("after" if after else "before") in found["log-probabilities"][0]
        assert "several in one request" in found["positions"][0]
        for name in ("prefix cache", "prefix cache, back"):
            assert " ids came from it" in found[name][0]
            assert found[name][1]
        assert "nothing is put before" in found["BOS"][0] or server.kind == "openai"

    def test_another_tokenizer(self, server: ModelServer) -> None:
        with pytest.raises(ModelError, match=r"^tiny-model: .*not the server's: 'Hello world' is"):
            load_member(server.url, tokenizer="demo:gemma-3-270m", timeout=20)

    def test_no_tokenizer(self, server: ModelServer) -> None:
        with pytest.raises(InputError, match=rf"^{server.url}: it serves org/tiny-model.*--tokenizer"):
            load_member(server.url)

    def test_a_tokenizer_without_a_model_beside_it(
        self, server: ModelServer, tiny_smollm2: Member, tmp_path: Path
    ) -> None:
        tiny_smollm2.tokenizer.save_pretrained(tmp_path)
        assert not (tmp_path / "config.json").exists()
        member = load_member(server.url, tokenizer=tmp_path, timeout=20)
        member.backend.close()
        assert member.vocabulary.encode(TEXT) == tiny_smollm2.vocabulary.encode(TEXT)
        settings = tmp_path / "tokenizer_config.json"
        named = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "code.Own"]}}
        settings.write_text(json.dumps(json.loads(settings.read_text()) | named))
        with pytest.raises(ModelError, match=r"tokenizer_config.json names code\.Own"):
            load_member(server.url, tokenizer=tmp_path, timeout=20)

    def test_not_of_this_kind(self, server: ModelServer, tiny_smollm2_dir: Path) -> None:
        other = next(kind for kind in ("sglang", "llama.cpp") if kind != server.kind)
        with pytest.raises(ModelError, match=rf"^{server.url}: .*not as a server of the kind {other}"):
            load_member(server.url, tokenizer=tiny_smollm2_dir, protocol=other)

    def test_probability_1_throughout(self, server: ModelServer, tiny_smollm2_dir: Path) -> None:
        """As a server's own drafts have it."""

        def sure(answer: Any) -> Any:
            return _with_logprobs(answer, lambda rank: 0.0 if rank == 0 else -1000.0)

        server.change = sure
        try:
            with pytest.raises(ModelError, match=r"probability 1 everywhere.*without speculative"):
                load_member(server.url, tokenizer=tiny_smollm2_dir)
        finally:
            server.change = None

    def test_tokens_as_texts(self, tiny_smollm2: Member, tiny_smollm2_dir: Path) -> None:
        """Of a server of OpenAI's style that does not know vLLM's options."""

        def texts(answer: Any) -> Any:
            for choice in answer["choices"]:
                top = choice["logprobs"]["top_logprobs"]
                named = {f" {one}": logprob for one, logprob in top[0].items()}
                choice["logprobs"]["top_logprobs"] = [named]
            return answer

        with ModelServer(tiny_smollm2, "openai") as server:
            server.change = texts
            with pytest.raises(MemberLost, match=r"tokens as texts, not as ids .*cannot be a member"):
                load_member(server.url, tokenizer=tiny_smollm2_dir)


def _with_logprobs(answer: Any, logprob: Any) -> Any:
    """An answer of any kind with other log-probabilities by rank."""
    for part in answer if isinstance(answer, list) else [answer]:
        for said in part.get("completion_probabilities", ()):
            for rank, one in enumerate(said["top_logprobs"]):
                one["logprob"] = logprob(rank)
        for choice in part.get("choices", ()):
            (top,) = choice["logprobs"]["top_logprobs"]
            ranked = sorted(top, key=lambda one: -top[one])
            top.update({one: logprob(rank) for rank, one in enumerate(ranked)})
        for side in ("input_top_logprobs", "output_top_logprobs"):
            for row in part.get("meta_info", {}).get(side) or ():
                for rank, entry in enumerate(row or ()):
                    entry[0] = logprob(rank)
    return answer


def joined_read(session: Session, ids: list[int]) -> list[Distribution]:
    """What is said after each of the ids."""
    return [block.at([i]) for block in session.read(0, ids, 0, 10) for i in range(len(block))]


class TestWhatIsSaid:
    def test_several_lanes_and_positions(self, served: Member, tiny_smollm2: Member) -> None:
        ids = served.vocabulary.encode(TEXT)
        with_own = TopKOnly(tiny_smollm2.backend, 10).open(3)
        session = served.backend.open(3)
        try:
            for more in ([5], [6, 7], [8, 9, 10]):
                targets = {2: [*ids, *more], 0: [*more, *ids], 1: ids[: len(more) + 2]}
                counts = {2: len(more), 0: 3, 1: 1}
                assert_close(
                    session.ask(targets, 10, counts).wait(), with_own.ask(targets, 10, counts).wait().clone()
                )
        finally:
            session.close()
            with_own.close()

    def test_a_text_that_is_read_through_one_position_a_request(
        self, server: ModelServer, tiny_smollm2: Member, tiny_smollm2_dir: Path
    ) -> None:
        """Of a server that refuses several prompts in one request."""

        def several(handler: Handler) -> bool:
            prompts = server.requests[-1][1].get("prompt")
            if refused := isinstance(prompts, list) and isinstance(prompts[0], list) and len(prompts) > 1:
                handler.answer(400, {"error": {"message": "one prompt a request"}})
            return refused

        server.fault = several
        try:
            member = load_member(server.url, tokenizer=tiny_smollm2_dir)
            ids = member.vocabulary.encode(TEXT)
            session, own = member.backend.open(), TopKOnly(tiny_smollm2.backend, 10).open()
            for one, other in zip(joined_read(session, ids), joined_read(own, ids), strict=True):
                assert_close(one, other)
            own.close()
            member.backend.close()
        finally:
            server.fault = None

    def test_a_text_that_is_read_through(
        self, server: ModelServer, served: Member, tiny_smollm2: Member
    ) -> None:
        ids = served.vocabulary.encode(" ".join([TEXT] * 5))
        assert len(ids) > 40
        asked = len(server.requests)
        session, own = served.backend.open(), TopKOnly(tiny_smollm2.backend, 10).open()
        try:
            for start in (0, 30, len(ids) - 1):
                found = [
                    block.at([i]) for block in session.read(0, ids, start, 10) for i in range(len(block))
                ]
                wanted = [one.at([i]) for one in own.read(0, ids, start, 10) for i in range(len(one))]
                assert len(found) == len(wanted) == len(ids) - start
                for one, other in zip(found, wanted, strict=True):
                    assert_close(one, other)
        finally:
            session.close()
            own.close()
        texts = len(server.requests) - asked
        assert texts == 3 or server.kind == "llama.cpp"  # one request a text

    def test_a_draft_is_one_request(self, server: ModelServer, served: Member) -> None:
        ids = served.vocabulary.encode(TEXT)
        session = served.backend.open(2)
        asked = len(server.requests)
        session.ask({0: ids, 1: ids[:-1]}, 10, {0: 4, 1: 2}).wait()
        session.close()
        assert len(server.requests) - asked == 2


def test_where_two_lists_of_ids_part() -> None:
    assert first_difference([1, 2, 3], [1, 4, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == first_difference([1, 2, 3], [1, 2]) == 2
    assert first_difference([], [1]) == 0


def test_texts_with_the_mark_of_a_space_are_not_compared() -> None:
    assert set(PROBES) - set(COMPARED) == {"a\u2581b\u2581"}


@pytest.mark.parametrize("fuser", ["deepen", "average", "union-topk"])
def test_the_same_text_as_in_process(
    server: ModelServer, served: Member, tiny_smollm2: Member, tiny_gemma: Member, fuser: str
) -> None:
    """An assistant in a server, and the same with its logits hidden; with drafts and without."""
    if fuser == "union-topk":
        with pytest.raises(InputError, match=rf"^{served.name}: .*logits"):
            Ensemble([tiny_gemma, served], fuser=fuser)
        return
    hidden = replace(tiny_smollm2, backend=TopKOnly(tiny_smollm2.backend, served.backend.most(1000)))
    remote, local = (Ensemble([tiny_gemma, one], fuser=fuser) for one in (served, hidden))
    for draft in (0, 3):
        settings = {"max_new_tokens": 12, "draft": draft}
        texts = [own.generate([TEXT, "Water boils"], **settings).texts for own in (remote, local)]
        assert texts[0] == texts[1]
