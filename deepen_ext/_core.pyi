"""The compiled core (csrc/bindings). Addresses are `Tensor.data_ptr()`, 0 for null; sizes are checked by the
core, shapes, dtypes and devices by `deepen_ext.ops`, which is what to call."""

from typing import TypeAlias

_Address: TypeAlias = int
_Rows: TypeAlias = tuple[_Address, _Address, _Address, int, int]  # columns, values, rest, vocab, entries
_Member: TypeAlias = tuple[_Address, _Address, _Address, int, _Rows]  # ids, probs, tail, k, rows
# logits, dtype, batch, vocab, k, ids, probs, tail, status
_Logits: TypeAlias = tuple[_Address, int, int, int, int, _Address, _Address, _Address, _Address]
_Backend: TypeAlias = tuple[int, int, int]  # threads, CUDA device or -1 for the CPU, cudaStream_t

def cuda_compiled() -> bool: ...
def cuda_device_count() -> int: ...
def isa() -> str: ...
def best_isa() -> str: ...
def is_intel() -> bool: ...
def set_isa(name: str, /) -> None: ...
def topk_softmax_workspace(members: list[_Logits], backend: _Backend) -> int: ...
def topk_softmax(members: list[_Logits], workspace: _Address, backend: _Backend) -> None: ...
def relative_rows_workspace(dim: int, anchors: int, entries: int, count: int, backend: _Backend) -> int: ...
def relative_rows(
    embedding: _Address,
    dtype: int,
    vocab: int,
    dim: int,
    tokens: _Address,
    count: int,
    anchor_ids: _Address,
    anchors: int,
    mean: _Address,
    anchor_inverse_norm: _Address,
    temperature: float,
    normalise: bool,
    entries: int,
    columns: _Address,
    values: _Address,
    rest: _Address,
    status: _Address,
    workspace: _Address,
    backend: _Backend,
) -> None: ...
def inverse_search_workspace(
    rows: _Rows, batch: int, candidates: int, anchors: int, backend: _Backend
) -> int: ...
def inverse_search(
    logits: _Address,
    ids: _Address,
    tail_logit: _Address,
    target: _Address,
    rows: _Rows,
    batch: int,
    candidates: int,
    anchors: int,
    learning_rate: float,
    steps: int,
    found: _Address,
    workspace: _Address,
    backend: _Backend,
) -> None: ...
def fuse_workspace(main_rows: _Rows, batch: int, k: int, anchors: int, backend: _Backend) -> int: ...
def fuse(
    members: list[_Member],
    weights: _Address,
    logits: _Address,
    dtype: int,
    batch: int,
    anchors: int,
    learning_rate: float,
    steps: int,
    min_probability: float,
    log_probs: bool,
    fused: _Address,
    chosen: _Address,
    workspace: _Address,
    backend: _Backend,
) -> None: ...
