"""One llama_context: the KV cache of several sequences, and forward passes over it."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from deepen_ext.errors import ModelError
from deepen_ext.members.llama_cpp import api
from deepen_ext.members.llama_cpp.model import LlamaModel
from deepen_ext.members.llama_cpp.threads import Threads

MOST_TOKENS = 512  # of one forward
MOST_SEQUENCES = 256  # of one context: LLAMA_MAX_SEQ of llama.cpp's source
_PADDING = 256  # llama.cpp rounds a cache's cells up to this

# What llama_decode returns, where it says more than that it failed.
_NO_CELLS, _ABORTED = 1, 2


class Feed(NamedTuple):
    """New tokens of one sequence.

    Attributes:
        sequence: which.
        start: the position of the first.
        ids: the tokens.
        outputs: after how many of the last of them logits are wanted.
    """

    sequence: int
    start: int
    ids: Sequence[int]
    outputs: int


def cells_for(model: LlamaModel, sequences: int, cells: int) -> int:
    """How many cells a cache gets for which so many are asked, over all sequences."""
    unit = _PADDING * (1 if model.window is None else sequences)
    return -(-cells // unit) * unit


class Context:
    """KV cache and forward passes of one session.

    Sequences share the cache's cells ("unified"), so that texts with different numbers of new tokens go
    through the model in one pass, and a prefix that a sequence takes over from another one costs nothing. In
    a model with sliding windows each sequence has cells of its own: among shared ones, llama.cpp gives the
    cells of positions that have left one text's window to other texts, and no rollback brings them back.

    Attributes:
        sequences: how many there can be.
        cells: positions that the cache holds, over all sequences; one that sequences share counts once.
        room: positions for all sequences together, or for each where they have cells of their own.
    """

    def __init__(
        self, model: LlamaModel, sequences: int, room: int, *, threads: Threads, float32_cache: bool
    ) -> None:
        """Allocate the cache.

        Raises:
            ModelError: llama.cpp cannot, for lack of memory for example.
        """
        self._model = model
        self._threads = threads
        self._call = call = model.library.call
        self.sequences = sequences
        self.cells = cells_for(model, sequences, room if model.window is None else room * sequences)
        self.room = self.cells if model.window is None else self.cells // sequences
        params = call.llama_context_default_params()
        asked = {
            "n_ctx": self.cells,
            "n_batch": min(MOST_TOKENS, self.cells),  # more can never be new at once
            "n_ubatch": min(MOST_TOKENS, self.cells),
            "n_seq_max": sequences,
            "n_threads": threads.most,
        }
        for field, value in asked.items():
            setattr(params, field, value)
        params.n_threads_batch = threads.most
        params.kv_unified = model.window is None
        params.swa_full = True  # a window that forgets cannot be rolled back
        params.type_k = params.type_v = api.TYPE_F32 if float32_cache else api.TYPE_F16
        if float32_cache:
            params.flash_attn_type = api.FLASH_OFF  # on the CPU it rounds to float16 in between
        params.offload_kqv = params.op_offload = model.on_gpu
        model.library.complaint()
        self._handle = call.llama_init_from_model(model.handle, params)
        if not self._handle:
            raise ModelError(
                f"{model.name}: llama.cpp cannot make a cache of {self.cells} positions: "
                f"{model.library.complaint() or 'no reason given'}; take shorter texts or fewer at once"
            )
        # The views of `_logits` hold on to this object, and this object to the model.
        self._memory = call.llama_get_memory(self._handle)
        self._free = weakref.finalize(self, _free, call, self._handle, model)
        for field, value in asked.items():
            if (found := getattr(call, f"llama_{field}")(self._handle)) != value:
                raise ModelError(
                    f"{model.name}: {model.library.name} took {field}={found} for {value}, so its structures "
                    "are others than they seem; this version is not supported"
                )
        self._rows = sequences  # that the library's output buffer has room for
        self._views: list[weakref.ref[object]] = []

    def decode(self, feeds: Sequence[Feed]) -> torch.Tensor:
        """One forward pass: float32 [sum of outputs, V], feed after feed, each in the order of its ids.

        The tensor is a view of the library's own buffer. The next forward pass overwrites it.

        Args:
            feeds: `MOST_TOKENS` tokens or fewer in all.

        Raises:
            ModelError: the cache has no cell left, or the forward pass failed. Nothing of the feeds is kept
                that `remove` from their starts does not remove.
        """
        tokens: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        wanted: list[int] = []
        for feed in feeds:
            count = len(feed.ids)
            tokens += feed.ids
            positions += range(feed.start, feed.start + count)
            sequences += [feed.sequence] * count
            wanted += [0] * (count - feed.outputs) + [1] * feed.outputs
        total, rows = len(tokens), sum(wanted)
        numbers = ctypes.c_int32 * total
        lists = numbers(*sequences)
        # A token's sequences are a list of their own, of one.
        first, size = ctypes.addressof(lists), ctypes.sizeof(ctypes.c_int32)
        arrays = (
            numbers(*tokens),
            numbers(*positions),
            numbers(*([1] * total)),
            (ctypes.c_void_p * total)(*range(first, first + size * total, size)),
            (ctypes.c_int8 * total)(*wanted),
        )
        at = [ctypes.addressof(one) for one in arrays]
        batch = api.Batch(total, at[0], None, *at[1:])
        self._model.library.complaint()
        with self._threads.forward() as threads:
            self._call.llama_set_n_threads(self._handle, threads, threads)
            result = self._call.llama_decode(self._handle, batch)
        if result != 0:
            raise ModelError(f"{self._model.name}: its forward pass failed: {self._reason(result)}")
        self._rows = max(self._rows, rows)
        return self._logits(rows)

    def must_move(self, rows: int) -> bool:
        """Whether a forward with so many outputs would free a buffer that somebody still has a view of."""
        return rows > self._rows and self._is_seen()

    def _is_seen(self) -> bool:
        self._views = [view for view in self._views if view() is not None]
        return bool(self._views)

    def remove(self, sequence: int, start: int) -> bool:
        """Forget a sequence from a position on. False: the model cannot, and all of it must go (start 0)."""
        if not self._call.llama_memory_seq_rm(self._memory, sequence, start, -1):
            return False
        # What the window of the next token sees must still be there.
        window = self._model.window
        if start == 0 or window is None:
            return True
        first = int(self._call.llama_memory_seq_pos_min(self._memory, sequence))
        return 0 <= first <= max(0, start + 1 - window)

    def copy(self, source: int, target: int, end: int) -> bool:
        """An empty sequence takes over the first positions of another one; False as in `remove`."""
        self._call.llama_memory_seq_cp(self._memory, source, target, -1, -1)  # of own cells, all or none
        return self.remove(target, end)

    def take_over(self, other: Context, sequence: int) -> bool:
        """Take a sequence's states from another context of the model. False: they do not fit."""
        size = self._call.llama_state_seq_get_size(other._handle, sequence)
        state = np.empty(size, np.uint8)
        get, put = self._call.llama_state_seq_get_data, self._call.llama_state_seq_set_data
        written = get(other._handle, state.ctypes.data, size, sequence)
        return bool(written and put(self._handle, state.ctypes.data, written, sequence))

    def close(self) -> None:
        """Free it, as soon as no view of its logits is left."""
        if not self._is_seen():
            self._free()

    def _logits(self, rows: int) -> torch.Tensor:
        if not rows:
            return torch.empty((0, self._model.vocab_size), dtype=torch.float32, device="cpu")
        size = rows * self._model.vocab_size
        address = self._call.llama_get_logits(self._handle)
        buffer = (ctypes.c_float * size).from_address(address)
        buffer.context = self  # type: ignore[attr-defined]  # which must live as long as the view
        self._views.append(weakref.ref(buffer))
        return torch.frombuffer(buffer, dtype=torch.float32).view(rows, self._model.vocab_size)

    def _reason(self, result: int) -> str:
        if result == _NO_CELLS:
            return f"none of its cache's {self.cells} positions is left; take shorter texts or fewer at once"
        if result == _ABORTED:
            return "it was aborted"
        return self._model.library.complaint() or f"llama_decode returned {result}"


def _free(call: object, handle: int, model: LlamaModel) -> None:
    """The model stays until its last context is gone."""
    call.llama_free(handle)  # type: ignore[attr-defined]
    del model
