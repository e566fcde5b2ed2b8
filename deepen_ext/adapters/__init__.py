"""Fusion inside transformers' own calls: a logits processor, a `custom_generate` callable, a pipeline.

    main = ensemble.members[0].model
    main.generate(**inputs, logits_processor=[DeepenLogitsProcessor(ensemble)])    transformers' loop
    main.generate(**inputs, custom_generate=ensemble.custom_generate)              the ensemble's loop
    pipeline(ensemble)("The capital of France is")                                 the ensemble's loop

Greedy text is the same in all three, in float32, as that of `Ensemble.generate`. None of them has a loop.
"""

from __future__ import annotations

from deepen_ext.adapters.custom_generate import custom_generate
from deepen_ext.adapters.logits_processor import DeepenLogitsProcessor
from deepen_ext.adapters.pipeline import EnsemblePipeline, pipeline

__all__ = ["DeepenLogitsProcessor", "EnsemblePipeline", "custom_generate", "pipeline"]
