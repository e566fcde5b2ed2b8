"""`deepen-ext lm-eval`: the command line of lm-evaluation-harness, with the model `deepen` in it."""

from __future__ import annotations

import sys
import traceback

import typer

from deepen_ext.commands.console import exit_codes, write
from deepen_ext.errors import DeepenError, InputError

# All arguments are the harness's, `--help` included.
CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}

_HELP = """\
deepen-ext lm-eval: the command line of lm-evaluation-harness, which then knows the model `deepen`.

  deepen-ext lm-eval --model deepen --model_args demo=True --tasks arc_easy --limit 20
  deepen-ext lm-eval --model deepen --model_args pretrained="A|B",weights="0.6|0.4" --tasks hellaswag

model_args of deepen:
  pretrained=A|B        the members: hub names, folders, .gguf files. The first is the main model, or without
                        fuser and weights one of at least twice its size
  demo=True             the embedded pair instead
  preset=FILE           or a preset that `deepen-ext tune` wrote
  fuser=, recipe=, weights=0.6|0.4 (or size, or prompt), learning_rate=, and the other settings of an ensemble
  backend=, device=, dtype=, threads=, device_map=, max_memory=, offload_folder=, quantization=,
  adapter=, revision=, attn_implementation=, protocol=, tokenizer=, api_key=, placement=, timeout=
                        how members are loaded, as on the command line: one for all members, or one
                        for each, where - is the default: quantization=-|int8
  trust_remote_code=True   run code that members bring along
  max_gen_toks=256      tokens of a text where the task does not say
  piece=, context=      of whole texts, as of `deepen-ext nll`: characters of a piece, and before it
  without_template=     in a chat, for a member that has no chat template: error, or plain

"""


def lm_eval(context: typer.Context) -> None:
    """Run lm-evaluation-harness with the ensemble as its model `deepen`; all arguments are the harness's."""
    with exit_codes(False):
        try:
            import lm_eval.models  # noqa: F401  # fills the registry, which it does only while that is empty
            from lm_eval.__main__ import cli_evaluate
            from lm_eval.api.registry import model_registry
        except ModuleNotFoundError as error:
            raise InputError(
                f"lm-evaluation-harness is not installed ({error}): pip install 'deepen-ext[lm-eval]'"
            ) from error
        if "deepen" not in model_registry:  # versions that read entry points have it
            model_registry.register("deepen", target="deepen_ext.adapters.lm_eval:DeepenLM")
        if context.args in ([], ["-h"], ["--help"]):
            write(_HELP)
        before, sys.argv = sys.argv, ["lm-eval", *context.args]
        try:
            cli_evaluate()
        except (DeepenError, KeyboardInterrupt, BrokenPipeError):
            raise
        except Exception:  # as the harness's own command shows it
            traceback.print_exc()
            sys.exit(1)
        finally:
            sys.argv = before
