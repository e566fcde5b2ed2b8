"""The core releases the GIL, and may be called from several threads at once."""

from __future__ import annotations

import threading

import torch
from oracle import random_embedding, random_logits

from deepen_ext.ops import topk_softmax
from deepen_ext.space.row_sources import SimilarityRows


def test_other_threads_run_while_the_core_works(backend):
    vocab, count = backend.size(20_000, 1000), backend.size(256, 64)
    source = SimilarityRows(random_embedding(vocab, 128, seed=0), torch.arange(vocab), entries=8)
    begun, done = threading.Event(), threading.Event()

    def work():
        begun.set()
        source.compute(torch.arange(count))
        done.set()

    worker = threading.Thread(target=work)
    worker.start()
    begun.wait()
    rounds = 0
    while not done.wait(0.0005):
        rounds += 1
    worker.join()
    assert rounds > 20, "nothing else ran until the core had finished"


def test_several_threads_at_once():
    logits = [random_logits(2, 30_000, seed=seed) for seed in range(6)]
    alone = [topk_softmax(one, 64) for one in logits]
    together: list[object] = [None] * 6

    def work(i):
        for _ in range(5):
            together[i] = topk_softmax(logits[i], 64)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for one, other in zip(alone, together, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
