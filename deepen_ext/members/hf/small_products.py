"""Linear layers of a few rows on the CPU, near the speed of the memory they read.

A decoding step multiplies every weight matrix with one row; a batch, or the check of a draft, with a few.
torch's own product (MKL's) is made for many rows, and reads the weights at half of memory's speed or less:
on processors of other makers than Intel for every number of rows, on Intel's from 4 rows on. Two ways are
faster:

- oneDNN's product, by the operation that the code of torch.compile calls too. It reads the weights as they
  lie, so there is no second copy of them.
- Turned around, ``(W x^T)^T``: torch's own product, with the weights as its large operand. Where Intel did
  not make the processor it is the fastest for 2 rows, and for 3 and 4 rows of a matrix that is wide and not
  deep (the head; gate and up of small models).

Microseconds of torch's own / turned around / oneDNN for weights [out, d], with two cores and torch 2.13; a
second run gives other figures by a tenth, some by a quarter:

    AMD EPYC, AVX-512 (all weights in no cache)
    rows  [576, 576]       [896, 4864]         [4864, 896]         [151936, 896]
    1     119 / 162 / 116   887 /  996 /  662  1314 /  707 /  730   39,008 / 19,134 /  16,315
    2     263 / 158 / 168  1775 /  980 /  777  2942 /  708 / 1037   87,949 / 18,117 /  27,512
    4     268 / 219 / 171  1686 / 1435 / 1106  2334 /  823 /  987   83,998 / 21,770 /  30,140
    8     229 / 340 / 169  1876 / 1943 /  971  2129 / 2424 / 1333   87,543 / 56,417 /  34,876
    16    214 / 255 / 196  1865 / 1748 / 1262  2611 / 2420 / 1531  104,797 / 82,179 /  45,807
    64    400 / 423 / 359  3949 / 3809 / 3129  4915 / 6849 / 3506  233,482 / 175,856 / 120,888

    Intel Xeon with AMX (the weights of the head in no cache, the others in its 300 MB)
    1      26 /  30 / 102   523 /  510 /  664   464 /  467 /  597   26,246 / 26,421 /  25,004
    2      19 /  99 / 109   509 / 1109 /  934   470 / 1310 /  928   29,509 / 70,687 /  38,103
    3      20 /  95 / 117   513 / 1070 /  945   484 / 1279 /  918   31,924 / 66,567 /  37,372
    4      89 /  97 / 113   961 / 1074 /  959   898 / 1243 /  970   53,853 / 71,361 /  34,773
    8     101 / 103 / 130  1505 / 1081 / 1140  1391 / 1523 / 1169   62,146 / 72,579 /  45,031
    16    123 / 116 / 169  1544 / 1068 / 1410  1715 / 1317 / 1460   74,179 / 75,006 /  49,844
    64    293 / 352 / 407  3515 / 3862 / 3260  3614 / 4363 / 3337  141,262 / 208,437 / 124,190
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.nn.functional import pad
from torch.overrides import TorchFunctionMode

from deepen_ext import _core
from deepen_ext.members.hf.loaded_model import is_plain

_LINEAR = torch.nn.functional.linear
# The more rows, the nearer torch's own comes: it takes 1.1 to 1.5 times as long as oneDNN's with 64 rows of a
# layer, 1.1 to 1.2 times with 512.
_MOST_ROWS = 64
# oneDNN makes a kernel for every number of rows of a shape: about 1 ms once, and 0.5 MB that stay. So larger
# numbers of rows are rounded up to a multiple of 8.
_EXACT_ROWS = 8
# A call of oneDNN takes 20 us more than one of torch, which is all that a smaller matrix takes.
_FEWEST_WEIGHTS = 1 << 16
_ON_INTEL = _core.is_intel()  # asked once: torch.compile cannot trace the question
# There torch's own is the faster one below both.
_FEWEST_ROWS_ON_INTEL, _FEWEST_WEIGHTS_ON_INTEL = 4, 1 << 22


def small_products(device: torch.device, dtype: torch.dtype, tokens: int) -> AbstractContextManager[Any]:
    """What to run a forward pass of `tokens` in: this module's products where they are faster, else nothing.

    They are used in float32 on x86 CPUs with AVX2 or AVX-512, where torch was built with oneDNN. On other
    CPUs they were not measured, and torch's own products stay. Where none could be faster there is no use in
    looking at every call of torch, which takes 13 ms of a forward of SmolLM2 on an Intel Xeon.

    The results are those of torch up to the rounding of sums. They have no gradients. Only this thread is
    affected.
    """
    on_x86 = device.type == "cpu" and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    has_onednn = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    of_use = not _ON_INTEL or _FEWEST_ROWS_ON_INTEL <= tokens <= _MOST_ROWS
    if on_x86 and has_onednn and dtype == torch.float32 and of_use:
        return _SmallProducts()
    return nullcontext()


class _SmallProducts(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _LINEAR and not kwargs and _takes(*args):
            return _linear(*args)
        return func(*args, **(kwargs or {}))


def _takes(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> bool:
    # Of quantised and other special weights (subclasses, sparse layouts) only the package that made them
    # knows the products. For shapes that do not fit together torch has the error message.
    operands = (x, weight) if bias is None else (x, weight, bias)
    if not all(is_plain(operand) and operand.dtype == torch.float32 for operand in operands):
        return False
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        return False
    if bias is not None and bias.shape != weight.shape[:1]:
        return False
    fewest_rows, fewest_weights = 1, _FEWEST_WEIGHTS
    if _ON_INTEL:
        fewest_rows, fewest_weights = _FEWEST_ROWS_ON_INTEL, _FEWEST_WEIGHTS_ON_INTEL
    rows = x.numel() // max(x.shape[-1], 1)
    return fewest_rows <= rows <= _MOST_ROWS and weight.numel() >= fewest_weights


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``x [..., d]`` by ``weight [out, d]``: ``x weight^T + bias``, ``[..., out]``."""
    rows = x.reshape(-1, x.shape[-1])
    product = (_turned_around if _better_turned(len(rows), weight) else _by_onednn)(rows, weight, bias)
    return product.view(*x.shape[:-1], len(weight))


def _better_turned(count: int, weight: torch.Tensor) -> bool:
    # Of a matrix of depth 1,024 and more, 3 rows turned around take up to twice as long as 2.
    if _ON_INTEL:
        return False
    out, depth = weight.shape
    return count == 2 or (count in (3, 4) and depth < 1024 and out > 4 * depth)


def _turned_around(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product = torch.mm(weight, rows.t()).t().contiguous()
    return product if bias is None else product.add_(bias)


def _by_onednn(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    count = len(rows)
    if count > _EXACT_ROWS:
        rows = pad(rows, (0, 0, 0, -count % 8))
    if bias is not None:
        bias = bias.contiguous()  # oneDNN would read a bias with gaps as if it had none
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return product[:count]
