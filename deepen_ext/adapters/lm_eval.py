"""The ensemble as a model of EleutherAI's lm-evaluation-harness, registered there as `deepen`.

    deepen-ext lm-eval --model deepen --model_args pretrained="A|B" --tasks arc_easy

The harness asks for log-likelihoods and for texts. Log-likelihoods are those of `deepen-ext nll`
(likelihood.py), texts those of `Ensemble.generate`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import lm_eval.models  # noqa: F401  # its own models: the registry fills itself only as long as it is empty
import torch
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import simple_parse_args_string
from tqdm import tqdm

from deepen_ext import __version__
from deepen_ext.adapters.lm_eval_args import ensemble_from, log, places_members, whole_number
from deepen_ext.adapters.lm_eval_contexts import fitting, prompt_of, read_chat, write_chat
from deepen_ext.ensemble import Ensemble
from deepen_ext.errors import InputError
from deepen_ext.ground.warning import warn
from deepen_ext.measure.likelihood.text_pieces import CONTEXT, PIECE, pieces
from deepen_ext.measure.likelihood.text_reading import TextReading
from deepen_ext.members.chat import chat_texts, check_without_template

__all__ = ["DeepenLM"]


@register_model("deepen")
class DeepenLM(LM):  # type: ignore[misc]
    """An ensemble as the harness sees a language model: text in, log-likelihoods and text out.

    A context that does not fit into every member's context loses its beginning, as with the harness's own
    models, and a warning says so.
    """

    def __init__(
        self,
        pretrained: str | Sequence[str] | Ensemble | None = None,
        *,
        batch_size: int | str = 1,
        max_gen_toks: int = 256,
        piece: int | str = PIECE,
        context: int | str = CONTEXT,
        without_template: str = "error",
        max_batch_size: int | None = None,
        **arguments: Any,
    ) -> None:
        """Load the ensemble.

        Args:
            pretrained: the members, as `Ensemble.from_pretrained` takes them: a list, or text with `|`
                between them (hub names, folders, `.gguf` files); or an ensemble.
            batch_size: how many texts are written side by side; log-likelihoods are read one text at a time.
            max_gen_toks: how long a text gets where the task does not say.
            piece: whole texts are read in pieces of at most so many characters, as by `deepen-ext nll`.
            context: each piece after at most so many of the characters before it.
            without_template: in a chat, what a member without a chat template reads: "error" refuses it,
                "plain" gives it a transcript.
            max_batch_size: refused; it goes with batch sizes found by trying.
            arguments: `demo`, `preset`, `weights`, `fuser`, `recipe`, `learning_rate` and the other settings
                of `Ensemble`; `backend`, `device`, `dtype` and the other `LoadOptions` (see `ensemble_from`).

        Raises:
            InputError: an argument that is unknown or out of range, or a model that is not there.
            ModelError: a model cannot be loaded.
        """
        super().__init__()
        if max_batch_size is not None:
            raise InputError("max_batch_size has no use here; give --batch_size a number")
        self.batch_size = whole_number("batch_size", batch_size)
        self.max_gen_toks = whole_number("max_gen_toks", max_gen_toks)
        self._piece, self._context = whole_number("piece", piece), whole_number("context", context, 0)
        check_without_template(without_template)
        self._without_template: Any = without_template
        self.ensemble = ensemble_from(pretrained, arguments)
        self._device = self.ensemble.device

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> DeepenLM:
        """What the harness calls with its model_args, and with batch sizes and device from its own options.

        These have defaults, so model_args come before them, a preset's device or device map too; and its
        device, "cuda:0" unless it is told otherwise, becomes the CPU where there is no CUDA, as in the
        harness's own models.
        """
        options = {name: value for name, value in (additional_config or {}).items() if value is not None}
        if options.get("device") == "cuda:0" and "device" not in arg_dict:
            if places_members(arg_dict):
                del options["device"]
            elif not torch.cuda.is_available():
                log.info("There is no CUDA device: the members run on the CPU")
                del options["device"]
        return cls(**{**options, **arg_dict})

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> DeepenLM:
        """The same, for model_args in one line."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Natural log of each continuation's probability after its context, and whether greedy decoding
        would write it.

        Raises:
            InputError: an empty continuation, one too long for a member's context, or a chat.
        """
        answers: dict[tuple[str, str], tuple[float, bool]] = {}
        members, cut = self.ensemble.members, 0
        before: TextReading | None = None
        # Contexts that are the same stand together; the longest come first, so that estimates fall.
        pairs = sorted({request.args for request in requests}, key=lambda pair: (-len(pair[0]), pair))
        for context, continuation in self._bar("loglikelihood", pairs, disable_tqdm):
            if read_chat(context):
                raise InputError(
                    "log-likelihoods after a chat are not supported: each member reads the chat in a "
                    "template of its own. Leave --apply_chat_template out, or choose tasks that generate text"
                )
            kept = fitting(members, context, continuation)
            cut += kept != context
            reading = TextReading(members, kept, continuation)
            if before is not None:  # of an answer to the same question, or after the same examples
                reading.go_on_from(before)
                before.close()
            scored = reading.fused(self.ensemble)
            before = reading
            answer = answers[context, continuation] = (scored.total, all(scored.greedy))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), answer)
        self.ensemble.save_rows()
        _warn_of_cuts(cut, len(pairs))
        return [answers[request.args] for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Natural log of each text's probability: every token of it, the first after the prefix (BOS).

        A long text is read in the pieces that `deepen-ext nll` reads it in.
        """
        answers = []
        for request in self._bar("loglikelihood_rolling", requests, disable_tqdm):
            (text,) = request.args
            total = 0.0
            cut = pieces(text, length=self._piece, context=self._context) if text else []
            for context, piece in cut:
                with TextReading(self.ensemble.members, context, piece) as reading:
                    total += reading.fused(self.ensemble).total
            answers.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        self.ensemble.save_rows()
        return answers

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that continues each context, up to the first of its stop strings and without it.

        A request's settings are the harness's (`until`, `max_gen_toks`, `do_sample`, `temperature`) and all
        that `Ensemble.generate` takes; it refuses others by name. Sampling draws by torch's random state,
        which the harness's `--seed` sets, or by a `seed` among the settings and the request's place in the
        order of the work (the longest context first). What is drawn does not depend on the batch size.

        Raises:
            InputError: a setting that is unknown or out of range, or a context that is empty.
        """
        order = Collator(
            [request.args for request in requests],
            sort_fn=lambda one: (-len(one[0]), one[0]),
            group_by="gen_kwargs",
            group_fn=lambda one: one[1],
        )
        texts: list[str] = []
        bar = self._bar("generate_until", requests, disable_tqdm)
        for batch in order.get_batched(n=self.batch_size):
            contexts, settings = [one[0] for one in batch], batch[0][1]
            for context, text in zip(contexts, self._write(contexts, settings, len(texts)), strict=True):
                texts.append(text)
                self.cache_hook.add_partial("generate_until", (context, settings), text)
                bar.update(1)
        bar.close()
        answers: list[str] = order.get_original(texts)
        return answers

    def _bar(self, kind: str, requests: Sequence[Any], hidden: bool) -> Any:
        return tqdm(requests, desc=f"Running {kind} requests", disable=hidden or self.rank != 0)

    def _write(self, contexts: Sequence[str], given: Mapping[str, Any], done: int) -> list[str]:
        """The new texts of one batch; `done` texts were written before it."""
        settings = dict(normalize_gen_kwargs(dict(given), self.max_gen_toks))
        stops = [stop for stop in settings.pop("until") if stop]
        new_tokens = settings.pop("max_gen_toks")
        if settings["do_sample"]:
            numbers = range(done, done + len(contexts))
            settings["seed"] = [_seed_of(settings.get("seed"), number) for number in numbers]
        elif not settings.get("temperature"):
            settings.pop("temperature", None)  # the harness's way to say that nothing is drawn
        members = self.ensemble.members
        prompts: list[Any] = [read_chat(one) or fitting(members, one, "", new_tokens) for one in contexts]
        pairs = zip(prompts, contexts, strict=True)
        _warn_of_cuts(sum(isinstance(kept, str) and kept != whole for kept, whole in pairs), len(contexts))
        prompts = [prompt_of(members, one) if isinstance(one, str) and one else one for one in prompts]
        written = self.ensemble.generate(
            prompts,
            max_new_tokens=new_tokens,
            stop_strings=stops or None,
            without_template=self._without_template,
            **settings,
        )
        full = sum(one.finish_reason == "context" for one in written)
        if full:
            warn(f"{full} texts ended early, because a member's context is full")
        return [postprocess_generated_text(text, stops, None) for text in written.texts]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The chat as text that `generate_until` takes apart again, for each member's own template.

        Raises:
            InputError: a member without a chat template, or one whose template refuses the messages.
        """
        if add_generation_prompt == (chat_history[-1]["role"] == "assistant"):
            raise InputError(
                "a chat that ends with the assistant's words is continued, any other is answered; "
                f"add_generation_prompt={add_generation_prompt} asks for something else"
            )
        chat_texts(self.ensemble.members, chat_history, without_template=self._without_template)
        return write_chat(chat_history)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """What the results say about the template."""
        if isinstance(chat_template, str):
            raise InputError(
                f"there is no choice of chat templates ({chat_template!r}); give --apply_chat_template "
                "alone, and each member uses its tokenizer's"
            )
        return "each member's own" if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """Goes into the names of cached requests."""
        return "+".join(self.ensemble.names).replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """What the results say about the model."""
        ensemble = self.ensemble
        models = [member.backend.describe() for member in ensemble.members]
        return {
            "deepen_ext": __version__,
            "method": ensemble.method,
            "members": [
                {"name": name, "backend": model.backend, "dtype": model.dtype}
                for name, model in zip(ensemble.names, models, strict=True)
            ],
            "weights": ensemble.weights_or_rule,
        }


def _seed_of(seed: int | None, number: int) -> int:
    """A text's own seed: made of the request's seed and the text's number, or of torch's random state."""
    if seed is None:
        return int(torch.randint(2**48, ()))
    return Random(f"{whole_number('seed', seed, -(2**62))} {number}").getrandbits(48)


def _warn_of_cuts(cut: int, total: int) -> None:
    if cut:
        warn(f"{cut} of {total} contexts were too long for a member, and lost their beginning")
