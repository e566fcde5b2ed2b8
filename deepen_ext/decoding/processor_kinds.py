"""What is known of transformers' logits processors and warpers: exact classes, never a caller's own."""

from __future__ import annotations

from transformers.generation import logits_process

# They look at the scores alone, and are the same for all texts.
BATCHED = {
    logits_process.EpsilonLogitsWarper,
    logits_process.EtaLogitsWarper,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.LogitNormalization,
    logits_process.MinPLogitsWarper,
    logits_process.SuppressTokensLogitsProcessor,
    logits_process.TemperatureLogitsWarper,
    logits_process.TopHLogitsWarper,
    logits_process.TopKLogitsWarper,
    logits_process.TopPLogitsWarper,
    logits_process.TypicalLogitsWarper,
}

# Score by score, rising (or constant), without a state that a second call would change. Not among them:
# ExponentialDecayLengthPenalty, which may fall with a negative logit, and what looks at all scores.
ORDERLY = {
    logits_process.EncoderNoRepeatNGramLogitsProcessor,
    logits_process.EncoderRepetitionPenaltyLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor,
    logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.MinLengthLogitsProcessor,
    logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.NoBadWordsLogitsProcessor,
    logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    logits_process.SuppressTokensLogitsProcessor,
}

# What they give depends on the ids and scores of the call alone. (Some keep what they work out in their first
# call: tensors made of their settings.) Not among them: PrefixConstrainedLogitsProcessor, which calls a
# function of the caller's, watermarks, and guidance, which has a KV cache.
STATELESS = BATCHED | ORDERLY | {logits_process.ExponentialDecayLengthPenalty}
