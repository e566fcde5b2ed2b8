"""Token ids and columns that lie outside their tensors: an error on the CPU before anything is written; on
CUDA (here emulated, under AddressSanitizer) no access out of range, and NaN for such a candidate."""

from __future__ import annotations

import emulated
import pytest
import torch
from oracle import random_embedding, random_logits

from deepen_ext import InputError, RelativeMap
from deepen_ext.ops import FuseInput, RelativeRows, fuse, inverse_search, topk_softmax

VOCAB, ANCHORS, K = 40, 24, 6
BAD_IDS = (-1, 42, 10**6, -(2**31))
BAD_COLUMNS = (ANCHORS, 10**6, 2**31 - 1)
# The operator calls the function, so that the kernels get the same from both: they are emulated for one.
CALLS = ("function", "operator") if emulated.EMULATOR is None else ("operator",)


def rows_of(*, dense: bool) -> RelativeRows:
    relative = RelativeMap.from_embedding(random_embedding(VOCAB, 8, 0), torch.arange(ANCHORS), entries=5)
    relative.ensure(torch.arange(VOCAB))
    return RelativeMap.from_dense(relative.to_dense()).rows if dense else relative.rows


def members(*, dense: bool = False) -> tuple[torch.Tensor, list[FuseInput]]:
    logits = [random_logits(3, VOCAB, seed) for seed in (0, 1)]
    rows = rows_of(dense=dense)
    return logits[0].clone(), [FuseInput(topk_softmax(one, K), rows) for one in logits]


def with_id(one: FuseInput, place: tuple[int, int], bad: int) -> FuseInput:
    ids = one.topk.ids.clone()
    ids[place] = bad
    return one._replace(topk=one.topk._replace(ids=ids))


def with_column(rows: RelativeRows, token: int, place: int, bad: int) -> RelativeRows:
    assert rows.columns is not None
    columns = rows.columns.clone()
    columns[token, place] = bad
    return rows._replace(columns=columns)


def with_empty_row(rows: RelativeRows, token: int) -> RelativeRows:
    """A token like one that is left out: it gives no anchor anything."""
    values = rows.values.clone()
    values[token] = 0
    if rows.columns is None or rows.rest is None:
        return rows._replace(values=values)
    columns, rest = rows.columns.clone(), rows.rest.clone()
    columns[token], rest[token] = -1, 0
    return RelativeRows(columns, values, rest, rows.anchors)


def run_fuse(call, logits, given, weights=None, min_probability=0.0):
    weights = torch.full((3, 2), 0.5) if weights is None else weights
    if call == "function":
        return fuse(logits, given, weights, learning_rate=0.2, min_probability=min_probability)
    tops = [one.topk for one in given]
    rows = [one.rows for one in given]
    sparse = rows[0].columns is not None
    lists = [[one.ids for one in tops], [one.probs for one in tops], [one.tail for one in tops]]
    lists += [[one.columns for one in rows] if sparse else [], [one.values for one in rows]]
    lists += [[one.rest for one in rows] if sparse else []]
    return torch.ops.deepen_ext.fuse(logits, *lists, ANCHORS, weights, 0.2, 5, min_probability)


def run_search(call, ids, rows):
    logits, tail = random_logits(3, K, 3), torch.zeros(3)
    target = torch.full((3, ANCHORS), 1 / ANCHORS)
    if call == "function":
        return inverse_search(logits, ids, tail, target, rows, learning_rate=0.2)
    sparse = (rows.columns, rows.values, rows.rest)
    return torch.ops.deepen_ext.inverse_search(logits, ids, tail, target, *sparse, ANCHORS, 0.2, 5)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("bad", BAD_IDS)
def test_fuse_takes_no_id_outside_the_rows(backend, call, dense, member, bad):
    around = torch.full((5, VOCAB), 7.0)
    logits, given = members(dense=dense)
    around[1:4] = logits
    free = next(i for i in range(VOCAB) if all(i not in one.topk.ids for one in given))
    empty = [one._replace(rows=with_empty_row(one.rows, free)) for one in given]
    empty[member] = with_id(empty[member], (2, 3), free)
    given[member] = with_id(given[member], (2, 3), bad)
    if backend.emulator is None:
        with pytest.raises(InputError, match=f"token {bad} of member {member} is outside its rows' 40 tok"):
            run_fuse(call, around[1:4], given)
        assert torch.equal(around[1:4], logits), "written before it was refused"
    else:
        fused, chosen = run_fuse(call, around[1:4], given)
        assert fused.isnan().nonzero().tolist() == ([[2, 3]] if member == 0 else [])
        assert ((chosen >= 0) & (chosen < VOCAB)).all()
        if member == 0:
            logits[2, free] = 0  # which such a candidate counts as having
        want = run_fuse(call, logits, empty)[0]
        assert torch.equal(fused[fused.isfinite()], want[fused.isfinite()]), "it was not left out"
    assert (around[[0, 4]] == 7).all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize("place", [0, 4])
@pytest.mark.parametrize("bad", BAD_COLUMNS)
def test_fuse_takes_no_column_outside_the_anchors(backend, call, member, place, bad):
    logits, given = members()
    token = int(given[member].topk.ids[1, 2])
    given[member] = given[member]._replace(rows=with_column(given[member].rows, token, place, bad))
    before = logits.clone()
    if backend.emulator is None:
        with pytest.raises(InputError, match=f"token {token} of member {member} names anchor {bad} of 24"):
            run_fuse(call, logits, given)
        assert torch.equal(logits, before)
    else:
        assert run_fuse(call, logits, given)[0].isfinite().all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("bad", BAD_IDS)
def test_inverse_search_takes_no_id_outside_the_rows(backend, call, dense, bad):
    ids = torch.arange(3 * K, dtype=torch.int32).view(3, K)
    ids[1, 4] = bad
    if backend.emulator is None:
        with pytest.raises(InputError, match=f"token {bad} of member 0 is outside"):
            run_search(call, ids, rows_of(dense=dense))
    else:
        found = run_search(call, ids, rows_of(dense=dense))
        assert found.isnan().nonzero().tolist() == [[1, 4]]
        ids[1, 4] = VOCAB - 1
        want = run_search(call, ids, with_empty_row(rows_of(dense=dense), VOCAB - 1))
        assert torch.equal(found[found.isfinite()], want[found.isfinite()]), "it was not left out"


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("bad", BAD_COLUMNS)
def test_inverse_search_takes_no_column_outside_the_anchors(backend, call, bad):
    ids = torch.arange(3 * K, dtype=torch.int32).view(3, K)
    rows = with_column(rows_of(dense=False), 7, 2, bad)
    if backend.emulator is None:
        with pytest.raises(InputError, match=f"the row of token 7 of member 0 names anchor {bad} of 24"):
            run_search(call, ids, rows)
    else:
        assert run_search(call, ids, rows).isfinite().all()


def naming_twice(token: int, *, alone: bool) -> tuple[RelativeRows, RelativeRows]:
    """Rows where `token` names an anchor twice, and rows that mean the same. alone: no other row names it."""
    columns = torch.full((VOCAB, 4), -1, dtype=torch.int32)
    values = torch.zeros(VOCAB, 4)
    columns[:, 0] = torch.arange(VOCAB) % (ANCHORS - 1) + 1
    values[:, 0] = 0.9
    if not alone:
        columns[:, 1], values[:, 0], values[:, 1] = 0, 0.6, 0.3
    rest = torch.full((VOCAB,), 0.1)
    rest[token] = 0.0
    twice, once = (columns.clone(), values.clone()), (columns.clone(), values.clone())
    twice[0][token], twice[1][token] = torch.tensor([0, 0, -1, -1]), torch.tensor([0.6, 0.4, 0, 0])
    once[0][token], once[1][token] = torch.tensor([0, -1, -1, -1]), torch.tensor([1.0, 0, 0, 0])
    return RelativeRows(*twice, rest, ANCHORS), RelativeRows(*once, rest, ANCHORS)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("member", [0, 1])
def test_fuse_with_a_row_that_names_an_anchor_twice(backend, call, alone, member):
    """No error: nobody looks for it. On CUDA one of a candidate's two values may not count."""
    logits, given = members()
    ids = given[member].topk.ids
    token = int(ids[1, 1])
    here = (ids == token).any(dim=1)
    assert here.tolist() == [False, True, False]
    twice, once = naming_twice(token, alone=alone)
    found, want = (
        run_fuse(call, logits.clone(), [one._replace(rows=rows) for one in given])[0]
        for rows in (twice, once)
    )
    assert not torch.equal(want[1], logits.gather(1, given[0].topk.ids.long())[1])
    assert torch.equal(found[~here], want[~here]), "the other batch rows have nothing to do with it"
    if member == 1 or backend.emulator is None:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("alone", [False, True])
def test_inverse_search_with_a_row_that_names_an_anchor_twice(backend, call, alone):
    ids = torch.arange(3 * K, dtype=torch.int32).view(3, K)
    found, want = (run_search(call, ids, rows) for rows in naming_twice(int(ids[1, 4]), alone=alone))
    assert torch.equal(found[[0, 2]], want[[0, 2]])
    if backend.emulator is None:
        torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-5)
    assert found.isfinite().all()


@pytest.mark.parametrize("dense", [False, True])
def test_lists_of_the_operator_have_an_entry_for_each_member(dense):
    logits, given = members(dense=dense)
    names = ("probs", "tails", "columns", "values", "rest")
    rows = [one.rows for one in given]
    lists = [[one.topk.ids for one in given], [one.topk.probs for one in given]]
    lists += [[one.topk.tail for one in given], [] if dense else [one.columns for one in rows]]
    lists += [[one.values for one in rows], [] if dense else [one.rest for one in rows]]
    settings = (ANCHORS, torch.full((3, 2), 0.5), 0.2, 5, 0.0)
    for i, name in enumerate(names, 1):
        short = [one[:-1] if i == j else one for j, one in enumerate(lists)]
        if lists[i]:
            with pytest.raises(InputError, match=f"{name} has 1 tensors for 2 members"):
                torch.ops.deepen_ext.fuse(logits, *short, *settings)


def test_every_column_of_every_row_out_of_range(backend):
    """More columns than there are anchors: on CUDA they must not fill the table of anchors."""
    logits, given = members()
    shape = given[0].rows.values.shape
    columns = torch.arange(ANCHORS, ANCHORS + shape.numel(), dtype=torch.int32).view(shape)
    given = [one._replace(rows=one.rows._replace(columns=columns)) for one in given]
    if backend.emulator is None:
        with pytest.raises(InputError, match="names anchor"):
            run_fuse("function", logits, given)
    else:
        assert run_fuse("function", logits, given)[0].isfinite().all()


def test_what_is_never_read_may_be_anything():
    """A member without weight, a row after its end, tokens that count as the tail."""
    logits, given = members()
    want = logits.clone()
    weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.5, 0.5]])
    bar = float(given[1].topk.probs[2, 3])  # the row's fifth and sixth count as its tail
    run_fuse("function", want, given, weights, bar)
    assert not torch.equal(want, logits)
    rows, token = given[1].rows, int(given[1].topk.ids[2, 5])
    assert token not in given[0].topk.ids
    given[1] = with_id(with_id(given[1], (0, 1), 10**6), (2, 4), 10**6)
    ended = with_column(rows, int(given[1].topk.ids[1, 0]), 3, -1)
    given[1] = given[1]._replace(rows=ended)
    first = logits.clone()
    run_fuse("function", first, given, weights, bar)
    given[1] = given[1]._replace(rows=with_column(ended, int(given[1].topk.ids[1, 0]), 4, 10**6))
    second = logits.clone()
    run_fuse("function", second, given, weights, bar)
    assert torch.equal(first, second)
    assert torch.equal(first[[0]], want[[0]])


def test_a_row_without_a_softmax_gives_no_ids_that_fuse_would_take(backend):
    logits, given = members()
    broken = logits.clone()
    broken[1, 3] = float("nan")
    ids, probs, tail, status = torch.ops.deepen_ext.topk_softmax(broken, K)
    assert status.tolist() == [0, 1, 0]
    given[0] = given[0]._replace(topk=given[0].topk._replace(ids=ids, probs=probs, tail=tail))
    if backend.emulator is None:
        with pytest.raises(InputError, match=r"token -1 of member 0 .*status is 0"):
            run_fuse("operator", broken, given)
    else:
        run_fuse("operator", broken, given)


@pytest.mark.parametrize("part", ["weights", "probs", "tail", "values", "rest"])
def test_logits_in_the_memory_of_what_is_read(part):
    logits, given = members()
    memory = torch.zeros(3 * VOCAB + 3 * VOCAB * 5)
    main, other = memory[: 3 * VOCAB].view(3, VOCAB), memory[3 * VOCAB - 1 :]
    main.copy_(logits)
    top, rows = given[1].topk, given[1].rows
    weights = torch.full((3, 2), 0.5)
    if part == "weights":
        weights = other[:6].view(3, 2).fill_(0.5)
    elif part in ("probs", "tail"):
        size = getattr(top, part).shape
        top = top._replace(**{part: other[: size.numel()].view(size)})
    else:
        size = getattr(rows, part).shape
        rows = rows._replace(**{part: other[: size.numel()].view(size)})
    given[1] = FuseInput(top, rows)
    with pytest.raises(InputError, match="logits share memory with"):
        run_fuse("function", main, given, weights)
