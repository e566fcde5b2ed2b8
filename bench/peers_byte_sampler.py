"""SewoongLab/byte-sampler beside us, by its own classes: see `bench/peers.py`.

Its samplers give the exact distribution of the next byte of each model, whatever tokens the text could be
made of, and its ensembles mix these. It is written for transformers 4: `DynamicCache` had the lists
`key_cache` and `value_cache` then, and `_old_caches` gives them back. Nothing else is changed. It reads
byte-level BPE vocabularies; Gemma's SentencePiece tokens are refused with KeyError: '▁'.

Its samplers read a BOS token before every text, which our members read only where their tokenizer puts one
there. A row "after BOS" has it, the others begin as ours do.

A likelihood needs the distribution at every byte of a given text. To ask for one after the other runs each
model once a byte; here all that would be asked for is put into one tree, which the same cache manager
reads in one forward pass. The first bytes are asked for one by one too, and have to agree.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from common import PROMPTS
from peers_setup import BLOCK, Job, Memory, Row, Text, attempt, choices_right, questions, speed, texts
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from deepen_ext.members.hf.gguf_conversion import convert_embedded

SYSTEM = "byte-sampler"
CHANGES = ["DynamicCache.key_cache and value_cache, gone from transformers 5, as properties over its layers"]
BYTES_A_TOKEN = 4  # about: how many bytes are written for one token of the main model
COMPARED = 8  # bytes asked for one by one
TOLERANCE = 1e-2  # nats between a byte's two log-probabilities, where it has 1e-4 or more


def _old_caches() -> None:
    def tensors(name: str) -> property:
        def put(cache: Any, values: Sequence[torch.Tensor]) -> None:
            for layer, value in zip(cache.layers, values, strict=True):
                setattr(layer, name, value)

        return property(lambda cache: [getattr(layer, name) for layer in cache.layers], put)

    DynamicCache.key_cache = tensors("keys")
    DynamicCache.value_cache = tensors("values")


@torch.inference_mode()
def measure(job: Job) -> list[Row]:
    """A row for each way of mixing, and one for each model alone, byte by byte."""
    assert job.checkout is not None
    sys.path.insert(0, str(job.checkout / "src"))
    import byte_sampling

    warnings.simplefilter("ignore")
    _old_caches()
    folders = [convert_embedded(name) for name in job.models]
    models = [AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32).eval() for one in folders]
    tokenizers = [AutoTokenizer.from_pretrained(one) for one in folders]
    for model, tokenizer in zip(models, tokenizers, strict=True):
        model(**tokenizer(PROMPTS[0], return_tensors="pt"))
    memory = Memory()
    conditioned = [
        byte_sampling.ByteConditioning(model, tokenizer)
        for model, tokenizer in zip(models, tokenizers, strict=True)
    ]

    def write(prompts: list[str]) -> float:
        written = byte_sampling.generate_batched(
            byte_sampling.EnsembleBytewiseSamplerFactory(conditioned),
            prompts,
            max_new_bytes=BYTES_A_TOKEN * job.tokens,
            do_sample=False,
            allow_special=False,
        )
        return sum(len(tokenizers[0].tokenize(one)) for one in written) / len(written)

    letters = job.pair.split("+")
    rows: list[Row] = []
    for begin, names in (
        ([[one.bos] for one in conditioned], ["mix, after BOS"]),
        ([tokenizer("").input_ids for tokenizer in tokenizers], ["mix", "product", *letters]),
    ):
        mixed = Mixed(byte_sampling, conditioned, begin)
        own: list[Row] = [{"system": SYSTEM, "name": name} for name in names]
        if not rows:  # as the package itself begins; its answers would take two minutes more
            attempt(own[0], "speed", lambda: speed(job, write, memory))
            attempt(own[0], "equality", lambda mixed=mixed: mixed.check(texts(job)[0]))
        else:
            _choices(job, mixed, own)
        _texts(job, mixed, own)
        rows += own
    return rows


class Mixed:
    """Some models' exact distributions of bytes, alone and mixed.

    `begin` has the tokens that each model reads before every text.
    """

    def __init__(self, package: Any, conditioned: Sequence[Any], begin: Sequence[list[int]]) -> None:
        self._package = package
        self._conditioned = conditioned
        self._begin = begin

    def _alone(self, context: str, after: Sequence[str]) -> list[torch.Tensor]:
        pairs = zip(self._conditioned, self._begin, strict=True)
        return [torch.log_softmax(_at_once(*one, context, after).double(), -1) for one in pairs]

    def distributions(self, context: str, after: Sequence[str]) -> list[list[torch.Tensor]]:
        """Log-probabilities of each byte of texts that follow one context.

        Returns:
            For each text the log-probabilities float32 [bytes] of: the mixture, the product, each model.
        """
        alone = self._alone(context, after)
        each = [self._fused(mode, alone) for mode in ("mix", "product")] + alone
        found, begin = [], 0
        for text in after:
            ids = torch.tensor(list(text.encode()))[:, None]
            rows = slice(begin, begin + len(ids))
            found.append([one[rows].gather(1, ids)[:, 0] for one in each])
            begin = rows.stop
        return found

    def one_by_one(self, context: str, text: str) -> torch.Tensor:
        """The mixture's distributions [bytes, 257] at the text's bytes, each asked for by itself."""
        factory = self._package.EnsembleBytewiseSamplerFactory(list(self._conditioned))
        sampler = factory.get_bytewise_sampler(1)
        sampler.add_context([context])
        found = []
        for byte in text.encode():
            found.append(sampler.get_dists())
            sampler.add_context([bytes([byte])])
        return torch.cat(found)

    def _fused(self, mode: str, alone: Sequence[torch.Tensor]) -> torch.Tensor:
        """By the ensemble's own formula, over distributions that are there."""
        ensemble = self._package.EnsembleBytewiseSampler(1, list(self._conditioned), mode=mode)
        ensemble.bss = [SimpleNamespace(get_dists=lambda one=one: one) for one in alone]
        return ensemble.get_dists()

    def check(self, text: Text) -> float:
        """The largest difference, in nats, between all at once and one by one, on a text's first bytes.

        One by one, the models begin with their BOS token: so this is for such a mixture alone.

        Raises:
            RuntimeError: it is too large.
        """
        start = text.scored.encode()[:COMPARED].decode(errors="ignore")
        slow = self.one_by_one(text.context, start)
        fast = self._fused("mix", self._alone(text.context, [start]))
        counts = slow > math.log(1e-4)
        difference = float((slow - fast)[counts].abs().max())
        if difference > TOLERANCE:
            raise RuntimeError(f"all at once and one by one differ by {difference:.1e} nats")
        return difference


def _at_once(conditioned: Any, begin: list[int], context: str, after: Sequence[str]) -> torch.Tensor:
    """The unnormalised distributions [all bytes, 257] before each byte of texts that follow the context."""
    asked, lengths, trunk_lengths = [], [], []
    for text in after:
        sampler = conditioned.get_bytewise_sampler(1)
        sampler.trunks, size = [list(begin)], sum(len(conditioned.vrev_all[token]) for token in begin)
        sampler.lens, sampler.trunk_lens = [size], [size]
        sampler.add_context([context])
        for byte in text.encode():
            branches = sampler.sbps[0].eval_tree(inclusive=True, filter_tensors=False)
            asked.append((list(sampler.trunks[0]), branches))
            lengths.append(sampler.lens[0])
            trunk_lengths.append(sampler.trunk_lens[0])
            sampler.add_context([bytes([byte])])
    whole: dict[Any, Any] = {}
    for trunk, branches in asked:
        _graft(_at(whole, trunk), branches)
    reader = conditioned.get_bytewise_sampler(1)
    (read,) = reader.rcm.query([whole], skip_trunk_logprobs=True)
    reader.lens, reader.trunk_lens = lengths, trunk_lengths
    results = [(None, _part(branches, _at(read, trunk))) for trunk, branches in asked]
    reader.tree_inference = lambda **_: ([branches for _, branches in asked], results)
    return reader.get_dists()


def _at(tree: dict[Any, Any], trunk: Sequence[int]) -> dict[Any, Any]:
    for token in trunk:
        tree = tree.setdefault(token, {})
    return tree


def _graft(tree: dict[Any, Any], branches: dict[Any, Any]) -> None:
    for token, below in branches.items():
        if token is None:
            tree[None] = below  # that the distribution here is asked for; of which tokens comes later
        else:
            _graft(tree.setdefault(token, {}), below)


def _part(branches: dict[Any, Any], read: dict[Any, Any]) -> dict[Any, Any]:
    return {
        token: read[None] if token is None else _part(below, read[token]) for token, below in branches.items()
    }


def _texts(job: Job, mixed: Mixed, rows: Sequence[Row]) -> None:
    for row in rows:
        row["texts"] = []
    for text in texts(job):
        (found,) = mixed.distributions(text.context, [text.scored])
        for row, each in zip(rows, found, strict=False):  # of the first one only, where there is one row
            bits = (-each / math.log(2)).split(BLOCK)
            row["texts"].append(
                {
                    "kind": text.kind,
                    "bytes": len(each),
                    "bits": [round(float(block.sum()), 4) for block in bits],
                }
            )


def _choices(job: Job, mixed: Mixed, rows: Sequence[Row]) -> None:
    found: list[list[Any]] = [[] for _ in rows]
    for question in questions(job):
        of_choices = mixed.distributions(question.prompt, question.choices)
        for values, each in zip(found, zip(*of_choices, strict=True), strict=False):
            values.append((question, [float(one.sum()) for one in each]))
    for row, values in zip(rows, found, strict=True):
        row["choices"] = choices_right(values)
