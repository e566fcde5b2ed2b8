"""Members that a server runs: llama.cpp's server, vLLM and others of OpenAI's style, SGLang."""

from importlib.util import find_spec

from deepen_ext.errors import InputError

if find_spec("httpcore") is None:
    raise InputError(
        "a member in a server needs httpcore, which is not there: pip install 'deepen-ext[http]'"
    )
