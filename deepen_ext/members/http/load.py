"""Members that a server runs."""

from __future__ import annotations

import re

from deepen_ext.errors import InputError
from deepen_ext.ground.progress import Progress
from deepen_ext.members.devices import find_device
from deepen_ext.members.http.address import read_address, read_key
from deepen_ext.members.http.backend import HttpBackend
from deepen_ext.members.http.checks import check_server, check_tokenizer
from deepen_ext.members.http.client import Client, Refusal
from deepen_ext.members.http.protocols import find_protocol
from deepen_ext.members.http.tokenizer import load_named_tokenizer
from deepen_ext.members.load_options import LoadOptions
from deepen_ext.members.member import Member
from deepen_ext.members.source import Source
from deepen_ext.text.vocabulary import Vocabulary

_TIMEOUT = 60.0  # seconds
_MOST_CONNECTIONS = 64


def load(source: Source, options: LoadOptions, progress: Progress | None = None) -> Member:
    """A member that a server computes. Its tokenizer is the one that the user names, and is checked.

    Raises:
        InputError: no tokenizer is named or it is not there, or the key cannot be read.
        MemberLost: the server cannot be reached, or gives no usable answer.
        ModelError: it is of no known kind, its tokenizer is another one, or what it gives is no distribution
            of the model.
    """
    assert source.url is not None  # `loading` sends nothing else here
    address = read_address(source.url)
    if progress is not None:
        progress(f"Asking {address}")
    timeout = options.timeout or _TIMEOUT
    client = Client(address, read_key(options.api_key), timeout, _MOST_CONNECTIONS)
    try:
        protocol = find_protocol(client, options.protocol)
        served = protocol.served
        name = short_name(served.model)
        client.member = name
        if options.tokenizer is None:
            raise InputError(
                f"{address}: it serves {served.model}, but no tokenizer is named; give tokenizer= "
                "(--tokenizer): the model's folder, hub name or .gguf file, or demo:NAME"
            )
        named = load_named_tokenizer(
            options.tokenizer, name, trust_remote_code=options.trust_remote_code, progress=progress
        )
        rows = served.vocab_size or named.vocab_size
        # A tokenizer with more tokens than the model is another model's: the check says where they differ.
        fits = rows if rows is not None and len(named.tokenizer) <= rows else None
        vocabulary = Vocabulary.from_tokenizer(named.tokenizer, fits, name=name)
        finding = check_tokenizer(client, protocol, vocabulary, named.tokenizer)
        if fits != rows:
            vocabulary = Vocabulary.from_tokenizer(named.tokenizer, rows, name=name)
        size = vocabulary.vocab_size
        # A server of slots has a thread for each, and a connection that is kept holds one.
        connections = min(served.slots or _MOST_CONNECTIONS, _MOST_CONNECTIONS)
        # A whole character in every tokenizer that has bytes or letters.
        protocol.written = next((i for i, text in enumerate(vocabulary.tokens) if text == b"a"), None)
        backend = HttpBackend(name, client, protocol, size, find_device(options.device), connections)
        check_server(backend, vocabulary, finding)
    except Refusal as refusal:
        client.close()
        raise client.lost(f"refuses requests ({refusal}); check its address, and api_key=") from None
    except BaseException:
        client.close()
        raise
    eos_ids = tuple(one for one in named.eos_ids if 0 <= one < size)
    return Member(name, backend, named.tokenizer, vocabulary, eos_ids)


def short_name(model: str) -> str:
    """The last part of a model's name or path, without the ending of a file."""
    last = re.split(r"[/\\]", model.rstrip("/\\"))[-1]
    return last.removesuffix(".gguf") or model
