"""Ways to fuse what the members say, all on one loop.

| name | what | source |
| --- | --- | --- |
| deepen | average in relative space, inverse search | Huang et al., arXiv 2404.12715 |
| average | the same relative rows (of the bytes recipe), no search | ours |
| union-topk | average over the union of the top-10 tokens | UniTE, Yao et al., arXiv 2410.03777 |
| union-vocab | average over the union of the vocabularies | GaC, Yu et al., arXiv 2406.12585 |
| follow | deepen where the main model counts most, else union-vocab | ours |
| product | geometric mean over the union of the vocabularies | Hinton 2002; arXiv 2603.05432 |
| consistent | union-vocab, far-off tokens count less | CoRE, Zeng et al., arXiv 2510.13855 |
| draw | one member, drawn by the weights; the average of union-vocab | ME, Fu et al., arXiv 2605.00419 |
| spans | the word that all find most probable | AdaFuse, Cui et al., arXiv 2601.06022 |
| single | the main model alone | |
| a function | yours: `FuseFunction` | |

A new fuser is a file here with one class, which says what it needs and how it is made, and a line for the
class in make.py.
"""

from __future__ import annotations

from deepen_ext.fusers.average import AverageFuser
from deepen_ext.fusers.base import Fuser
from deepen_ext.fusers.bridge import TokenBridge
from deepen_ext.fusers.deepen import DeepenFuser
from deepen_ext.fusers.draw import DrawFuser
from deepen_ext.fusers.function import FunctionFuser
from deepen_ext.fusers.ingredients import Ingredients
from deepen_ext.fusers.make import FUSERS, fuser_class, map_settings, method_name, parse_fuser
from deepen_ext.fusers.parts import FusedStep, Part, Said
from deepen_ext.fusers.settings import FuseFunction, FusionSettings
from deepen_ext.fusers.single import SingleFuser
from deepen_ext.fusers.spans import SpansFuser
from deepen_ext.fusers.union_topk import UnionTopkFuser
from deepen_ext.fusers.union_vocab import UnionVocabFuser

__all__ = [
    "FUSERS",
    "AverageFuser",
    "DeepenFuser",
    "DrawFuser",
    "FunctionFuser",
    "FuseFunction",
    "FusedStep",
    "Fuser",
    "FusionSettings",
    "Ingredients",
    "Part",
    "Said",
    "SingleFuser",
    "SpansFuser",
    "TokenBridge",
    "UnionTopkFuser",
    "UnionVocabFuser",
    "fuser_class",
    "map_settings",
    "method_name",
    "parse_fuser",
]
