"""transformers' pipeline for text generation, with an ensemble in the place of the model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers import TextGenerationPipeline
from transformers.utils.chat_template_utils import Chat

from deepen_ext.adapters.custom_generate import custom_generate
from deepen_ext.errors import InputError

if TYPE_CHECKING:
    from deepen_ext.ensemble import Ensemble


class EnsemblePipeline(TextGenerationPipeline):
    """transformers' "text-generation" pipeline, written by an ensemble; see `pipeline`."""

    def _sanitize_parameters(self, **parameters: Any) -> Any:  # type: ignore[override]
        for name in ("tools", "documents", "continue_final_message"):
            if parameters.get(name) is not None:
                raise InputError(f"{name} is not supported: it would reach the main model's template only")
        return super()._sanitize_parameters(**parameters)  # type: ignore[no-untyped-call]

    def _forward(self, model_inputs: Any, **generate_kwargs: Any) -> Any:  # type: ignore[override]
        prompts = model_inputs["prompt_text"]
        prompts = prompts if isinstance(prompts, list) else [prompts]
        if all(isinstance(prompt, Chat) for prompt in prompts):
            generate_kwargs["messages"] = [prompt.messages for prompt in prompts]
        return super()._forward(model_inputs, **generate_kwargs)  # type: ignore[no-untyped-call]


def pipeline(ensemble: Ensemble, **settings: Any) -> EnsemblePipeline:
    """A pipeline for text generation as transformers' own, for texts and chats.

    Its defaults are those of transformers' pipeline: it samples with temperature 0.7, and gives the prompt
    back before the new text. In a chat every member reads its own template.

    Args:
        ensemble: whose main model's tokenizer it uses.
        settings: what `transformers.pipeline("text-generation", ...)` takes, and what
            `Ensemble.custom_generate` takes; both can also be given with each call.

    Raises:
        InputError: at the call, for what `Ensemble.custom_generate` refuses.
    """
    main = ensemble.members[0]
    return EnsemblePipeline(  # type: ignore[no-untyped-call]
        model=main.model,
        tokenizer=copy.copy(main.tokenizer),  # the pipeline sets its padding side
        task="text-generation",
        device=main.device,
        custom_generate=custom_generate(ensemble),
        **settings,
    )
