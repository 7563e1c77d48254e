"""The prime table sizes of Engram: pure arithmetic, so that a configuration can be checked without torch.

(reference/engram-and-overlap.md, section 1; reference/deepseek-v41.md, section 6)
"""

from __future__ import annotations

from workbench.config.common import EngramConfig

# Witnesses that make Miller-Rabin exact for every number below 3.3e24.
_WITNESSES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)


def is_prime(n: int) -> bool:
    if n < 2:
        return False
    for p in _WITNESSES:
        if n % p == 0:
            return n == p
    odd, twos = n - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for a in _WITNESSES:
        x = pow(a, odd, n)
        if x not in (1, n - 1) and all((x := x * x % n) != n - 1 for _ in range(twos - 1)):
            return False
    return True


def table_primes(engram: EngramConfig) -> list[list[int]]:
    """Rows of every (order, head) table, per Engram layer: distinct primes from ``vocab_size`` up, order by order."""
    used: set[int] = set()
    layers = []
    for _ in engram.layer_ids:
        primes = []
        for _ in range(2, engram.max_ngram_size + 1):
            candidate = engram.vocab_size - 1
            for _ in range(engram.n_heads):
                candidate += 1
                while candidate in used or not is_prime(candidate):
                    candidate += 1
                used.add(candidate)
                primes.append(candidate)
        layers.append(primes)
    return layers
