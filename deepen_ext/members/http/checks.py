"""What is found out of a server before it is a member. What would spoil distributions refuses it."""

from __future__ import annotations

import random
import re
import time
from typing import Any

from deepen_ext.errors import ModelError
from deepen_ext.members.backend import Finding
from deepen_ext.members.http.backend import HttpBackend
from deepen_ext.members.http.client import Client, Refusal
from deepen_ext.members.http.protocols.base import Protocol, Question
from deepen_ext.members.probes import COMPARED, first_difference
from deepen_ext.text.vocabulary import PROBES, Vocabulary

_MOST_ASKED = 1000  # a server that gives as many is taken to give any number
_FEWER = (256, 128, 100, 64, 50, 40, 32, 20, 10, 5, 1)
_LONG = 128  # ids of a prompt that shows whether the prefix cache works
_AGAIN = 5  # of a prompt's last ids that may be read again: pages of caches are not filled
_SAME = 0.05  # nats


def check_server(backend: HttpBackend, vocabulary: Vocabulary, tokenizer: Finding) -> None:
    """Look at the server, and set the backend's `findings` and `max_topk`.

    Args:
        backend: asked for nothing yet.
        vocabulary: the model's.
        tokenizer: what `check_tokenizer` found.

    Raises:
        ModelError: what the server gives is no distribution of the model.
        MemberLost: no usable answer.
    """
    served = backend.protocol.served
    ids = vocabulary.prefix_ids + vocabulary.encode(PROBES[1])
    found = [
        Finding("server", f"{served.server} at {backend.client.address}, protocol {backend.protocol.name}"),
        Finding("model", served.model),
        tokenizer,
    ]
    backend.max_topk = _find_max_topk(backend, ids)
    most = backend.max_topk
    found.append(
        Finding("top-k", "any number of tokens" if most is None else f"{most} tokens at most", most is None)
    )
    found += [look(backend, ids) for look in (_begins, _temperature, _positions, _sure)]
    pool = sorted({one for text in COMPARED for one in vocabulary.encode(text)})
    backend.findings = (*found, *_prefix_cache(backend, vocabulary.prefix_ids, pool))


def check_tokenizer(client: Client, protocol: Protocol, vocabulary: Vocabulary, tokenizer: Any) -> Finding:
    """That the server's ids are ours: over whole texts, or else how many ids they have.

    Our vocabulary leaves Unicode composition out, which the server's tokenizer may do: either is right.

    Args:
        client: of the server.
        protocol: of the server.
        vocabulary: of the tokenizer that the user named.
        tokenizer: the same as transformers has it.

    Raises:
        ModelError: they are other ids; the message has the first difference.
    """
    for text in COMPARED:
        ours = vocabulary.encode(text)
        plain = list(tokenizer.encode(text, add_special_tokens=False))
        theirs = protocol.tokenize(client, text)
        if theirs is None:
            return _token_counts(client, protocol, vocabulary, tokenizer)
        if theirs not in (ours, plain):
            at = first_difference(ours, theirs)
            raise ModelError(
                f"{client.member}: the tokenizer is not the server's: {text!r} is {ours[at : at + 5]} from "
                f"token {at} on by tokenizer= and {theirs[at : at + 5]} by {client.address}; name the "
                f"tokenizer of {protocol.served.model}"
            )
    return Finding("tokenizer", f"the server gives our ids for all {len(COMPARED)} probe texts")


def _token_counts(client: Client, protocol: Protocol, vocabulary: Vocabulary, tokenizer: Any) -> Finding:
    size = protocol.served.vocab_size
    for text in COMPARED:
        count = protocol.count(client, text)
        if count is None:
            return Finding(
                "tokenizer", "not compared: the server has no endpoint that tells its ids of a text", False
            )
        plain = tokenizer.encode(text, add_special_tokens=False)
        # Some servers put BOS before a text whatever they are told.
        begun = {len(vocabulary.encode(text)) + one for one in (0, len(vocabulary.prefix_ids))}
        if count not in begun | {len(plain)}:
            raise ModelError(
                f"{client.member}: the tokenizer is not the server's: {text!r} is {len(plain)} tokens by "
                f"tokenizer= and {count} by {client.address}; name the tokenizer of {protocol.served.model}"
            )
    sizes = "" if size is None else f", and its vocabulary has our {size:,} tokens"
    return Finding("tokenizer", f"the server counts our tokens in all {len(COMPARED)} probe texts{sizes}")


def _find_max_topk(backend: HttpBackend, ids: list[int]) -> int | None:
    """The largest k that the server gives; None for any."""
    first = min(_MOST_ASKED, backend.vocab_size)
    sizes = [first, *(k for k in _FEWER if k < first)]
    refused = None
    while sizes:
        k = sizes.pop(0)
        try:
            (row,) = backend.exchange(Question(ids, 1, k)).rows
        except Refusal as refusal:
            if refusal.status not in (400, 422):
                raise
            refused = refused or refusal
            named = {int(one) for one in re.findall(r"\d+", refusal.text)}  # "... max allowed: 20"
            sizes = sorted(named.intersection(range(1, k)) | set(sizes), reverse=True)
            continue
        if len(row.ids) >= k:
            return None if k == first else k
        if len(row.ids):
            return len(row.ids)
        break
    raise ModelError(
        f"{backend.name}: the server {backend.client.address} gives no log-probabilities"
        f"{'' if refused is None else f' ({refused})'}; start it so that it does"
    )


def _begins(backend: HttpBackend, ids: list[int]) -> Finding:
    counted = backend.exchange(Question(ids, 1, 1)).counted
    if counted is None:
        return Finding("BOS", "the server does not say how many ids it reads", False)
    return Finding("BOS", f"nothing is put before a text: of {len(ids)} ids it reads {counted}")


def _temperature(backend: HttpBackend, ids: list[int]) -> Finding:
    """Requests ask for temperature 1, where both are the same; so this only tells what the server does."""
    k = min(5, backend.most(5))
    cool, plain = (backend.distributions(Question(ids, 1, k, temperature=one)) for one in (0.5, 1.0))
    if float((cool.probs - plain.probs).abs().max()) < _SAME:
        return Finding("log-probabilities", "before temperature: the same at 0.5 and at 1")
    return Finding(
        "log-probabilities", "after temperature; requests ask for temperature 1, which changes none"
    )


def _positions(backend: HttpBackend, ids: list[int]) -> Finding:
    """Several positions in one request must be those of a request each."""
    several = 3
    k = min(5, backend.most(5))
    each = [backend.distributions(Question(ids[: len(ids) - n], 1, k)) for n in reversed(range(several))]
    try:
        together = backend.distributions(Question(ids, several, k))
    except Refusal:
        protocol = backend.protocol
        if protocol.read_block == protocol.most_positions:  # it reads a text through by the same requests
            protocol.read_block = 1
        protocol.most_positions = 1
        return Finding("positions", "one a request: a draft costs a request for each of its tokens", False)
    for at, one in enumerate(each):
        if abs(float(one.probs[0, 0] - together.probs[at, 0])) > 2 * _SAME:
            raise ModelError(
                f"{backend.name}: {backend.client.address} gives other log-probabilities for several "
                "positions of a text in one request than in a request each; update the server"
            )
    return Finding("positions", "several in one request: a draft costs one request")


def _sure(backend: HttpBackend, ids: list[int]) -> Finding:
    """A server that drafts by itself may give drafted tokens probability 1 in the place of theirs."""
    said = [backend.distributions(Question(ids[: len(ids) - n], 1, 1)) for n in range(min(4, len(ids)))]
    if all(float(one.probs[0, 0]) == 1.0 for one in said):
        raise ModelError(
            f"{backend.name}: {backend.client.address} gives its first token probability 1 everywhere, which "
            "is no distribution of a model; start it without speculative decoding"
        )
    return Finding("certainty", "no token has probability 1 throughout, as with a server's own drafts")


def _prefix_cache(backend: HttpBackend, before: list[int], pool: list[int]) -> list[Finding]:
    """A long prompt that no one has asked before, the same with an id more, and one that goes back."""
    length = min(_LONG, (backend.context_length or _LONG) - 8)
    if length < 4 * _AGAIN:
        return [Finding("prefix cache", "not looked at: the context is too short", False)]
    prompt = [*before, *random.Random().choices(pool, k=length)][:length]
    (slot,) = backend.take_slots(1)
    try:
        times = []
        for asked in (prompt, [*prompt, pool[0]], [*prompt[:-_AGAIN], pool[1], pool[2]]):
            began = time.perf_counter()
            said = backend.exchange(Question(asked, 1, 1, slot))
            times.append((time.perf_counter() - began, said.cached, len(asked)))
    finally:
        backend.give_slot(slot)
    page, advice = backend.protocol.page, backend.protocol.cache_advice
    return [
        _cached("prefix cache", "of a text that goes on", times[0][0], *times[1], 2 * page, advice),
        _cached(
            "prefix cache, back",
            "of a text that goes back",
            times[0][0],
            *times[2],
            2 * page + _AGAIN,
            advice,
        ),
    ]


def _cached(
    name: str, what: str, first: float, again: float, cached: int | None, length: int, most: int, advice: str
) -> Finding:
    """Good where at most `most` ids of the text were read again."""
    took = f"{1e3 * first:.0f} ms for a new prompt, {1e3 * again:.0f} ms {what}"
    if cached is None:
        return Finding(name, took, again < first / 2)
    works = length - cached <= most
    text = f"{cached} of {length} ids came from it {what}; {took}"
    return Finding(
        name, text if works else f"{text}. Each token reads a part of the text again{advice}", works
    )
