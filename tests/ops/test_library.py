"""The operations as `torch.ops.deepen_ext.*`: torch's own checks, torch.compile, and the same results."""

from __future__ import annotations

import pytest
import torch
from library_cases import CASES, compiled_step, step_arguments

from deepen_ext.ops import topk_softmax

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_opcheck(name):
    operator, arguments = CASES[name]("cpu")
    torch.library.opcheck(operator, arguments)


def test_the_operators_report_by_status_where_the_functions_raise():
    logits = torch.randn(3, 50)
    logits[1, 7] = float("nan")
    ids, _, _, status = torch.ops.deepen_ext.topk_softmax(logits, 4)
    assert status.tolist() == [0, 1, 0]
    assert torch.equal(ids[::2], topk_softmax(logits[::2].contiguous(), 4).ids)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_compile_sees_through_the_step(dense):
    step, logits = compiled_step("cpu", dense=dense)
    want = step(*logits)
    assert (want[0] - logits[0]).abs().max() > 0.1, "the step moves nothing"
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for one, other in zip(want, compiled(*logits), strict=True):
        assert torch.equal(one, other)
    fresh = [one.flip(0).contiguous() for one in logits]
    for one, other in zip(step(*fresh), compiled(*fresh), strict=True):
        assert torch.equal(one, other)


def flat(results):
    """The tensors of a result, of several, or of lists of them."""
    if isinstance(results, torch.Tensor):
        return [results]
    return [one for each in results for one in flat(each)]


def test_fake_tensors_have_the_real_shapes_and_dtypes():
    for name, case in CASES.items():
        operator, arguments = case("cpu")
        real = operator(*arguments)
        fake = operator(*step_arguments(arguments, lambda one: one.to("meta")))
        for one, other in zip(flat(real), flat(fake), strict=True):
            assert (one.shape, one.dtype) == (other.shape, other.dtype), name
