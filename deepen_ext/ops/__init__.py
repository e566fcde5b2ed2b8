"""The core's operations on torch tensors: shapes, dtypes and devices are checked, then the core is called.

Every operation keeps no state, allocates its outputs and workspace with torch, and releases the GIL while it
runs.
"""

from deepen_ext.ground import forks as _forks  # noqa: F401  # looks after forked processes
from deepen_ext.ops import library as _library  # noqa: F401  # registers torch.ops.deepen_ext
from deepen_ext.ops.fuse import FuseInput, fuse
from deepen_ext.ops.inverse_search import inverse_search
from deepen_ext.ops.relative_rows import Similarity, relative_rows
from deepen_ext.ops.rows import RelativeRows
from deepen_ext.ops.topk_softmax import TopK, topk_softmax, topk_softmax_many

__all__ = [
    "FuseInput",
    "RelativeRows",
    "Similarity",
    "TopK",
    "fuse",
    "inverse_search",
    "relative_rows",
    "topk_softmax",
    "topk_softmax_many",
]
