"""What each kind of server is asked, and how its answers are read. One small class each."""

from __future__ import annotations

from deepen_ext.errors import ModelError
from deepen_ext.members.http.client import Client, Refusal
from deepen_ext.members.http.protocols.base import WRONG_SHAPE, Protocol
from deepen_ext.members.http.protocols.llama_cpp import LlamaCppProtocol
from deepen_ext.members.http.protocols.openai import MODELS, OpenAIProtocol
from deepen_ext.members.http.protocols.sglang import SGLangProtocol

# In the order in which they are tried: the first two have endpoints of OpenAI's style too.
_PROTOCOLS: tuple[type[Protocol], ...] = (LlamaCppProtocol, SGLangProtocol, OpenAIProtocol)


def find_protocol(client: Client, name: str | None) -> Protocol:
    """The protocol of this name; without a name that of the first kind of server that this is.

    Raises:
        ModelError: the server is of no kind that is known, or not of the kind named.
    """
    for kind in _PROTOCOLS:
        if name in (None, kind.name) and (found := look_for(kind, client)) is not None:
            return found
    kinds = " or ".join(kind.name for kind in _PROTOCOLS)
    raise ModelError(
        f"{client.address}: this answers, but not as a server of the kind {name or kinds}{_refusal(client)}; "
        "check the address, or give another protocol="
    )


def _refusal(client: Client) -> str:
    """What the server says where it refuses to tell its models: a server of ours names its members there."""
    try:
        client.get(MODELS)
    except Refusal as refusal:
        return f" ({MODELS}: {refusal})"
    return ""


def look_for(kind: type[Protocol], client: Client) -> Protocol | None:
    """The protocol, with what the server says of itself; None where it answers as another kind of server."""
    try:
        return kind.found_at(client)
    except WRONG_SHAPE:
        return None
