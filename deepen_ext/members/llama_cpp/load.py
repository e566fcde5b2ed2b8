"""Members in llama.cpp."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from deepen_ext.ground.progress import Progress
from deepen_ext.members import embedded
from deepen_ext.members.devices import find_device
from deepen_ext.members.gguf.facts import read_facts
from deepen_ext.members.gguf.tokenizer import load_gguf_tokenizer
from deepen_ext.members.llama_cpp.backend import LlamaBackend
from deepen_ext.members.llama_cpp.checks import check_for_llama_cpp
from deepen_ext.members.llama_cpp.library import load_library
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.threads import Threads
from deepen_ext.members.llama_cpp.tokens import check_tokenizer
from deepen_ext.members.load_options import LoadOptions
from deepen_ext.members.member import Member
from deepen_ext.members.source import Source
from deepen_ext.text.vocabulary import Vocabulary


def load(source: Source, options: LoadOptions, progress: Progress | None = None) -> Member:
    """A member that llama.cpp computes, from its GGUF file.

    EOS ids, context length and chat template are those of the file's metadata. The tokenizer is made from
    there too, and must agree with llama.cpp's own.

    Raises:
        InputError: the file cannot be read.
        ModelError: llama.cpp is not installed or in an unsupported version, or it does not know the file's
            architecture; the file is damaged or has no tokenizer; the tokenizers do not agree.
    """
    if source.embedded is not None:
        path, name = embedded.gguf_file(source.embedded, progress), embedded.find(source.embedded).name
    else:
        assert source.path is not None  # `loading` sends nothing but GGUF files here
        path, name = source.path, source.path.stem
    library = load_library()
    if progress is not None:
        progress(f"Loading {name}")
    facts = read_facts(path)
    if source.embedded is None:  # those files are known by their hash
        check_for_llama_cpp(path)
    with ThreadPoolExecutor(1) as pool:  # a large vocabulary takes as long as the weights
        loading = pool.submit(LlamaModel, library, path, name, find_device(options.device))
        tokenizer = load_gguf_tokenizer(path, name)
        model = loading.result()
    vocabulary = Vocabulary.from_tokenizer(tokenizer, model.vocab_size, name=name)
    check_tokenizer(model, vocabulary)
    # torch and llama.cpp share one pool of OpenMP's threads where both use the same library of it, as they do
    # on Linux: neither keeps the other from a processor.
    threads = Threads(options.threads or torch.get_num_threads(), fixed=options.threads is not None)
    return Member(name, LlamaBackend(name, model, path, facts, threads), tokenizer, vocabulary, facts.eos_ids)
