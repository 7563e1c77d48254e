"""Index scores of one query over any number of compressed entries, from what a run recorded. Knows numpy alone.

Over a hundred thousand entries it is a matter of reading their keys once, as fast as memory gives them.
"""

from __future__ import annotations

import numpy as np

AT_ONCE = 8192  # entries: few enough that their products stay in a cache


def index_scores(query: np.ndarray, weights: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Scores [S] float32 of one query [Hi, Di] with head weights [Hi] over keys [S, Di], whatever floats they are kept in.

    I[s] = sum_h w[h] relu(q[h] . k[s])   (DeepSeek-V4 lightning indexer, reference section 2.2)
    """
    query, weights = np.ascontiguousarray(query.T, np.float32), weights.astype(np.float32)  # [Di, Hi], [Hi]
    scores = np.empty(len(keys), np.float32)
    # One buffer for all products: memory fresh from the system, page by page, would take a third of the time. And zeros to
    # rectify against: with a single zero numpy takes four times as long.
    room, zeros = np.empty((2, min(AT_ONCE, len(keys)), len(weights)), np.float32)
    zeros[:] = 0.0
    for start in range(0, len(keys), AT_ONCE):
        part = keys[start : start + AT_ONCE].astype(np.float32, copy=False)
        products = np.matmul(part, query, out=room[: len(part)])
        np.maximum(products, zeros[: len(part)], out=products)
        np.matmul(products, weights, out=scores[start : start + AT_ONCE])
    return scores
