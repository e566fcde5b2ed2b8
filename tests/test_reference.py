"""The plain torch reference reproduces the authors' own code."""

from __future__ import annotations

import pytest
import torch
from golden_cases import golden_case, golden_names

from deepen_ext.fusers import reference


def test_small_cases_are_in_the_repository():
    assert {"two_models", "four_models_uneven_weights", "one_anchor_heavy"} <= set(golden_names())


@pytest.mark.parametrize("name", golden_names())
def test_relative_matrices(name):
    case = golden_case(name)
    for embedding, anchors, expected in zip(
        case.each("embedding"), case.each("anchors"), case.each("relative"), strict=True
    ):
        matrix = reference.relative_matrix(embedding, anchors, case.temperature)
        assert matrix.std() > 1e-4, "nearly all rows are uniform: this case shows nothing"
        torch.testing.assert_close(matrix, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", golden_names())
def test_fused_logits_from_embeddings(name):
    """In float64: in float32 the case whose rows are nearly uniform rounds to another 1.2e-4 on each CPU."""
    case = golden_case(name)
    relative = [
        reference.relative_matrix(embedding.double(), anchors, case.temperature)
        for embedding, anchors in zip(case.each("embedding"), case.each("anchors"), strict=True)
    ]
    fused = reference.fuse_logits(
        [one.double() for one in case.each("logits")],
        relative,
        case.weights,
        learning_rate=case.learning_rate,
        steps=case.steps,
    )
    assert (case.tensors["fused_logits"] - case.tensors["logits.0"]).abs().max() > 0.1, (
        "the case moves nothing"
    )
    torch.testing.assert_close(fused, case.tensors["fused_logits"].double(), atol=1e-4, rtol=0)


def test_rows_of_a_batch_are_independent():
    case = golden_case("two_models")
    logits = [torch.cat([one, one.flip(-1)]) for one in case.each("logits")]
    settings = {"learning_rate": case.learning_rate, "steps": case.steps}
    both = reference.fuse_logits(logits, case.each("relative"), case.weights, **settings)
    second = reference.fuse_logits(
        [one[1:] for one in logits], case.each("relative"), case.weights, **settings
    )
    torch.testing.assert_close(both[:1], case.tensors["fused_logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(both[1:], second, atol=1e-6, rtol=0)
