"""llama.cpp's own speed: a plain loop over its C API, with nothing of the package in the clock.

What runs is `llama_decode` and `llama_get_logits`, which waits for the result. The context is one as
`llama-bench` makes it: the library's defaults, and layers with a sliding window forget what has left it. The
next tokens are chosen outside the clock. So the times are the least that a program over this library can
reach.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from deepen_ext.members.llama_cpp import api

CALL = 2048  # most tokens of one llama_decode, the library's default; it computes them 512 at a time


class PlainLoop:
    """Texts of one model, each a sequence. The weights are the member's own: they are in memory once."""

    def __init__(self, member: Any, texts: int, length: int, threads: int) -> None:
        """Allocate the cache.

        Args:
            member: runs in llama.cpp.
            texts: how many at once.
            length: tokens that each may have.
            threads: of a forward pass.
        """
        self._model = member.backend._model
        self._call = self._model.library.call
        params = self._call.llama_context_default_params()
        params.n_ctx = -(-length // 256) * 256 * texts
        params.n_batch = CALL
        params.n_seq_max = texts
        params.n_threads = params.n_threads_batch = threads
        params.swa_full = False
        self._context = self._call.llama_init_from_model(self._model.handle, params)
        if not self._context:
            raise RuntimeError(
                f"{member.name}: llama.cpp makes no context: {self._model.library.complaint()}"
            )
        self._memory = self._call.llama_get_memory(self._context)
        self._lengths = np.zeros(texts, np.int32)
        self.next = np.zeros(texts, np.int32)  # each text's most probable next token

    def read(self, texts: Sequence[Sequence[int]]) -> float:
        """Read the texts from their beginning: milliseconds until the logits after each are there."""
        self._call.llama_memory_seq_rm(self._memory, -1, -1, -1)
        lengths = np.array([len(one) for one in texts], np.int32)
        ids = np.concatenate([np.asarray(one, np.int32) for one in texts])
        positions = np.concatenate([np.arange(length, dtype=np.int32) for length in lengths])
        sequences = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)
        wanted = np.zeros(len(ids), np.int8)
        ends = np.cumsum(lengths) - 1
        wanted[ends] = 1
        spent = 0.0
        for at in range(0, len(ids), CALL):
            piece = slice(at, at + CALL)
            spent += self._decode(ids[piece], positions[piece], sequences[piece], wanted[piece])
        self._lengths = lengths
        return spent

    def step(self) -> float:
        """One more token of every text: milliseconds."""
        count = len(self._lengths)
        sequences = np.arange(count, dtype=np.int32)
        spent = self._decode(self.next.copy(), self._lengths.copy(), sequences, np.ones(count, np.int8))
        self._lengths += 1
        return spent

    def close(self) -> None:
        self._call.llama_free(self._context)

    def _decode(self, ids: Any, positions: Any, sequences: Any, wanted: Any) -> float:
        total = len(ids)
        ids, positions, sequences, wanted = map(np.ascontiguousarray, (ids, positions, sequences, wanted))
        ones = np.ones(total, np.int32)
        lists = sequences.ctypes.data + sequences.itemsize * np.arange(total, dtype=np.uint64)
        parts = (ids, None, positions, ones, lists, wanted)
        batch = api.Batch(total, *(None if one is None else one.ctypes.data for one in parts))
        start = time.perf_counter()
        result = self._call.llama_decode(self._context, batch)
        address = self._call.llama_get_logits(self._context)
        spent = 1e3 * (time.perf_counter() - start)
        if result != 0:
            raise RuntimeError(f"llama_decode returned {result}: {self._model.library.complaint()}")
        if rows := int(wanted.sum()):
            size = self._model.vocab_size
            logits = np.ctypeslib.as_array((api.c.c_float * (rows * size)).from_address(address))
            self.next[sequences[wanted.astype(bool)]] = logits.reshape(rows, size).argmax(axis=1)
        return spent


def speed(loop: PlainLoop, texts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """The loop's greedy texts after these, each of so many tokens.

    Returns:
        "prompt": milliseconds of reading; "prompt_tokens": how many were read; "steps": milliseconds of each
        token after the first; "ids": the first text's new tokens.
    """
    prompt = loop.read(texts)
    ids = [int(loop.next[0])]
    steps = []
    for _ in range(tokens - 1):
        steps.append(loop.step())
        ids.append(int(loop.next[0]))
    return {"prompt": prompt, "prompt_tokens": sum(map(len, texts)), "steps": steps, "ids": ids}
