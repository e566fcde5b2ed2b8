"""deepen-ext: language models with different vocabularies write one text, fused at every token by DeePEn.

Huang et al., "Ensemble Learning for Heterogeneous Large Language Models with Deep Parallel Collaboration",
NeurIPS 2024 (arXiv 2404.12715), on a C++ core.
"""

from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import DeepenError, InputError, ModelError
from deepen_ext.fusion import fuse_logits
from deepen_ext.generation import Generation, Timings
from deepen_ext.relative_map import RelativeMap

__version__ = "0.1.0"

__all__ = [
    "DeepenError",
    "Ensemble",
    "Generation",
    "InputError",
    "ModelError",
    "RelativeMap",
    "Timings",
    "__version__",
    "fuse_logits",
]
