"""Index scores of one query over any number of compressed entries, from what a run recorded. Knows numpy alone.

Over a hundred thousand entries it is a matter of reading their keys once, as fast as memory gives them: a thread for each
long stretch of entries, and small products, so that the BLAS library behind numpy starts no threads of its own. Those go on
spinning for a while after each product and take the cores from whatever comes next.
"""

from __future__ import annotations

import os
from itertools import pairwise
from threading import Thread

import numpy as np

STRETCH = 65536  # entries worth a thread
TOGETHER = 32768  # entries whose products are made, rectified and summed in turn: few enough for a cache, many for a thread
AT_ONCE = 1024  # entries of one product


def index_scores(query: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Scores [S] float32 of one query [Hi, Di] with head weights [Hi] over keys [S, Di], whatever floats they are kept in.

    I[s] = sum_h w[h] relu(q[h] . k[s])   (DeepSeek-V4 lightning indexer, reference section 2.2)
    """
    query, weights = np.ascontiguousarray(query.T, np.float32), weights.astype(np.float32)  # [Di, Hi], [Hi]
    scores = np.empty(len(keys), np.float32)
    threads = max(1, min(len(keys) // STRETCH, os.cpu_count() or 1))
    edges = [len(keys) * i // threads for i in range(threads + 1)]
    parts = [(keys[first:last], scores[first:last]) for first, last in pairwise(edges)]
    failed: list[BaseException] = []

    def score(part: tuple[np.ndarray, np.ndarray]) -> None:
        try:
            _score(query, weights, *part)
        except BaseException as error:  # for the thread that asked
            failed.append(error)

    # Bare threads: an executor's queue would take a tenth of the time.
    others = [Thread(target=score, args=(part,), name="index-scores") for part in parts[1:]]
    for other in others:
        other.start()
    score(parts[0])
    for other in others:
        other.join()
    if failed:
        raise failed[0]
    return scores


def _score(query: np.ndarray, weights: np.ndarray, keys: np.ndarray, scores: np.ndarray) -> None:
    # One buffer for all products: memory fresh from the system, page by page, would take a third of the time. And zeros to
    # rectify against: with a single zero numpy takes four times as long.
    room, zeros = np.empty((min(TOGETHER, len(keys)), len(weights)), np.float32), np.zeros((AT_ONCE, len(weights)), np.float32)
    for start in range(0, len(keys), TOGETHER):
        part, out = keys[start : start + TOGETHER].astype(np.float32, copy=False), scores[start : start + TOGETHER]
        whole = len(part) - len(part) % AT_ONCE
        for size, first, last in ((AT_ONCE, 0, whole), (len(part) - whole, whole, len(part))):
            if first < last:
                products = room[first:last].reshape(-1, size, len(weights))
                np.matmul(part[first:last].reshape(-1, size, part.shape[1]), query, out=products)
                np.maximum(products, zeros[:size], out=products)
                np.matmul(products, weights, out=out[first:last].reshape(-1, size))
