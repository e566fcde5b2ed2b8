"""Members that llama.cpp's own server runs, in another process, with the embedded models' files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from command_line import run
from llama_server import LlamaServer, llama_server

from deepen_ext import Ensemble, demo
from deepen_ext.errors import MemberLost
from deepen_ext.members.loading import load_member
from deepen_ext.members.member import Member

SMOLLM2, GEMMA = "demo:smollm2-135m-instruct", "demo:gemma-3-270m"
PROMPTS = [
    "The capital of France is",
    "Water boils at a temperature of",
    "def fibonacci(n):\n",
    "L'été dernier,",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server() -> Iterator[LlamaServer]:
    with llama_server(demo.gguf_file("gemma-3-270m"), slots=4, context=512, key="our-key") as found:
        yield found


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVERS_KEY", "our-key")


@pytest.fixture(scope="module")
def served(server: LlamaServer) -> Iterator[Member]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVERS_KEY", "our-key")
        member = load_member(server.url, tokenizer=GEMMA, api_key="env:SERVERS_KEY")
    yield member
    member.backend.close()


def test_what_is_found(served: Member) -> None:
    found = {one.name: one for one in served.backend.describe().findings}
    assert served.name == "Gemma-3-270M"
    assert served.context_length == 511
    assert all(one.good for one in found.values()), found
    assert "before temperature" in found["log-probabilities"].text


def test_a_model_with_sliding_windows_without_swa_full() -> None:
    """Parts of the text are read again at each token, and the finding says what to do."""
    with llama_server(demo.gguf_file("gemma-3-270m"), whole_windows=False) as server:
        member = load_member(server.url, tokenizer=GEMMA)
        found = {one.name: one for one in member.backend.describe().findings}
        assert "--swa-full" in found["prefix cache"].text
        assert not found["prefix cache"].good
        member.backend.close()


def test_a_character_of_several_tokens(served: Member) -> None:
    """llama.cpp's server says nothing of a token that ends within a character, if it writes it by itself."""
    vocabulary = served.vocabulary
    ids = vocabulary.prefix_ids + vocabulary.encode("The emoji for a flag: 🇫🇷 🇩🇪 🏴󠁧󠁢󠁥󠁮󠁧󠁿 𝔘𝔫𝔦")
    session = served.backend.open()
    assert len(session.ask({0: ids}, 5, 24).wait()) == 24
    session.close()


def test_the_same_texts_as_in_process(served: Member, record_property: pytest.RecordProperty) -> None:
    """But for near-ties: weights are quantised, and how a text is fed changes the last digits."""
    main, local = load_member(SMOLLM2), load_member(GEMMA)
    with_server, without = (Ensemble([main, one], fuser="deepen") for one in (served, local))
    apart = 0
    for prompt in PROMPTS:
        for draft in (0, 3):
            lines: list[dict[str, Any]] = []
            ours = without.generate(prompt, max_new_tokens=16, draft=draft, trace=lines.append).token_ids
            theirs = with_server.generate(prompt, max_new_tokens=16, draft=draft).token_ids
            if ours != theirs:
                apart += 1
                at = next(i for i, (one, other) in enumerate(zip(ours, theirs, strict=True)) if one != other)
                probs = {one["id"]: one["probability"] for one in lines[at]["fused"]}
                assert probs[theirs[at]] > 0.7 * probs[ours[at]], (prompt, draft, at, probs)
    record_property("texts that fall apart at a near-tie, of 8", apart)
    assert apart < 8


def test_by_its_endpoint_of_openais_style(server: LlamaServer, served: Member) -> None:
    other = load_member(server.url, tokenizer=GEMMA, api_key="env:SERVERS_KEY", protocol="openai")
    ids = served.vocabulary.prefix_ids + served.vocabulary.encode(PROMPTS[0])
    said = []
    for member in (served, other):
        session = member.backend.open()
        said.append(session.ask({0: ids}, 20, 3).wait().topk)
        session.close()
    other.backend.close()
    assert said[0].ids[:, 0].tolist() == said[1].ids[:, 0].tolist()
    assert float((said[0].probs - said[1].probs).abs().max()) < 0.05


def test_without_its_key(server: LlamaServer) -> None:
    with pytest.raises(MemberLost, match=r"refuses requests .HTTP 401.*api_key="):
        load_member(server.url, tokenizer=GEMMA)


def test_the_others_go_on() -> None:
    """The server is killed in the middle of a text, with on_failure="continue"."""
    main = load_member(SMOLLM2)
    with llama_server(demo.gguf_file("gemma-3-270m")) as server:
        member = load_member(server.url, tokenizer=GEMMA)
        ensemble = Ensemble([main, member], fuser="deepen", on_failure="continue")
        whole = ensemble.generate(PROMPTS[0], max_new_tokens=8, min_new_tokens=8, draft=0).token_ids
        run = ensemble.start(PROMPTS[0], max_new_tokens=16, min_new_tokens=16, draft=0)
        for _ in range(5):
            next(iter(run))
        server.stop()
        with pytest.warns(UserWarning, match="Gemma-3-270M: .*; the others go on without it"):
            list(run)
        (found,) = run.results()
        at = found.lost["Gemma-3-270M"]
        assert at == 5
        assert found.token_ids[:at] == whole[:at]
        text = PROMPTS[0] + main.vocabulary.decode(found.token_ids[:at]).decode()
        rest = Ensemble([main], fuser="single").generate(text, max_new_tokens=16 - at, min_new_tokens=16 - at)
        assert found.token_ids[at:] == rest.token_ids
        member.backend.close()


def test_started_again_with_another_model(served: Member) -> None:
    """The same address, another file."""
    files = {name: demo.gguf_file(name) for name in ("gemma-3-270m", "smollm2-135m-instruct")}
    server = LlamaServer(files["smollm2-135m-instruct"], context=256)
    member = load_member(server.url, tokenizer=SMOLLM2, timeout=20)
    ids = member.vocabulary.encode(PROMPTS[0])
    session = member.backend.open()
    session.ask({0: ids}, 5).wait()
    server.stop()
    server = LlamaServer(files["gemma-3-270m"], context=256, port=server.port)
    with pytest.raises(MemberLost, match=r"another model.*Gemma-3-270M.gguf in the place of.*SmolLM2"):
        session.ask({0: [*ids, 5]}, 5).wait()
    member.backend.close()
    server.stop()


def test_on_the_command_line(server: LlamaServer) -> None:
    of_server = ["--api-key", "env:SERVERS_KEY", "--tokenizer", GEMMA]
    found = run("doctor", "--model", server.url, *of_server)
    assert found.returncode == 0, found.stderr
    for text in ("Gemma-3-270M, llama.cpp server", "tokenizer: the server gives our ids", "prefix cache: "):
        assert text in found.stdout
    assert "our-key" not in found.stdout + found.stderr
    found = run("doctor", "--json", "--model", server.url, *of_server)
    said = json.loads(found.stdout)
    assert said["servers"][0]["member"] == "Gemma-3-270M"
    assert said["not_measured"]
    both = ["--model", SMOLLM2, "--model", server.url, "--tokenizer", "-", "--tokenizer", GEMMA]
    both += ["--api-key", "-", "--api-key", "env:SERVERS_KEY"]
    found = run("generate", *both, "--max-new-tokens", "6", "--prompt", PROMPTS[0])
    assert found.returncode == 0, found.stderr
    assert "Paris" in found.stdout
