"""Where training of dense and MLA models starts: heads that look a few tokens back, and heads that look for what those found.

To recall what followed a word, a dense decoder needs two steps: a head that tells a token which words stood before it, and one
above that looks for the tokens which were told of the word at hand. V4's compressor brings neighbouring tokens together by
itself; random attention must find both steps, for which the few million tokens that a tiny model sees are too few. So the first
layer begins with heads that copy the words one and two tokens back, and the second looks for tokens into which its own word was
copied. Everything stays trainable, and what becomes of these heads is up to training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.config import DenseConfig
from workbench.model.attention.dense import DenseAttention
from workbench.model.attention.latent import LatentAttention
from workbench.model.layers import Rotary
from workbench.model.plain import PlainModel

SHARED_CHANNELS, SHARED_VALUE = 4, 1.5  # of the embeddings: a direction all words have, because RoPE finds distances only there
DISTANCES = (1, 2)  # tokens back
PAIRS, SIZE = 4, 5.3  # the fastest rotary pairs, which tell near distances apart, and the length of queries and keys in them
COPY_GAIN, SEEK_GAIN, FAST_GAIN = 1.5, 2.5, 0.3


@torch.no_grad()
def give_head_start(model: PlainModel) -> None:
    """Set attention weights of an untrained model of two layers or more as described above, in place."""
    model.embed.weight[:, :SHARED_CHANNELS] = SHARED_VALUE
    model.head.weight[:, :SHARED_CHANNELS] = 0.0  # it tells no word from another
    first, second = model.blocks[:2]
    words = first.attn_norm(model.embed.weight)
    dense = isinstance(model.config, DenseConfig)
    copied = (_copy_dense if dense else _copy_latent)(first.attn, words, model.rotary)
    (_seek_dense if dense else _seek_latent)(second.attn, words, copied)


def _copy_dense(attention: DenseAttention, words: Tensor, rotary: Rotary) -> Tensor:
    """Heads copy the words at each distance by one and the same map [C, C], which is returned."""
    heads, width, half = attention.heads, attention.head_dim, attention.head_dim // 2
    keys, queries = attention.wk.weight.unflatten(0, (-1, width)), attention.wq.weight.unflatten(0, (heads, width))
    for weight in (attention.wq.weight, attention.wv.weight):
        _ignore_shared(weight, words)
    there, here = _far_keys_and_queries(rotary, heads)
    for head in range(heads):
        _answer(queries[head, :PAIRS], words, here[head].real)
        _answer(queries[head, half : half + PAIRS], words, here[head].imag)
    for group in keys:
        _answer(group[:PAIRS], words, there.real)
    out, values = attention.wo.weight.unflatten(1, (heads, width)), attention.wv.weight.unflatten(0, (-1, width))
    groups = heads // attention.kv_heads
    attention.wv.weight *= COPY_GAIN
    attention.wo.weight *= COPY_GAIN
    for head in range(heads):
        out[:, head] = out[:, head - head % groups].clone()
    return torch.stack([out[:, groups * n] @ values[n] for n in range(attention.kv_heads)]).sum(0)


def _seek_dense(attention: DenseAttention, words: Tensor, copied: Tensor) -> None:
    """Queries are what the keys of a token would be into which the word was copied; slowly rotated channels count more."""
    width = attention.head_dim
    keys = attention.wk.weight.unflatten(0, (-1, width))
    keys.unflatten(1, (2, -1))[:, :, : width // 4] *= FAST_GAIN
    _ignore_shared(attention.wk.weight, words)
    sought = keys @ copied
    sought *= keys.std() / sought.std()
    attention.wq.weight.copy_(sought.repeat_interleave(attention.heads // attention.kv_heads, dim=0).flatten(0, 1))
    _ignore_shared(attention.wq.weight, words)
    attention.wq.weight *= SEEK_GAIN
    attention.wk.weight *= SEEK_GAIN


def _copy_latent(attention: LatentAttention, words: Tensor, rotary: Rotary) -> Tensor:
    """As ``_copy_dense``; heads come in pairs, one for each distance."""
    heads, nope, rank = attention.heads, attention.nope, attention.rank
    _ignore_shared(attention.wkv_a.weight[:rank], words)
    low = attention.q_norm(attention.wq_a(words))
    queries = attention.wq_b.weight.unflatten(0, (heads, -1))[:, nope:]
    _ignore_shared(queries.flatten(0, 1), low)
    there, here = _far_keys_and_queries(rotary, heads)
    for head in range(heads):
        _answer(queries[head, : 2 * PAIRS], low, torch.view_as_real(here[head]).flatten())
    _answer(attention.wkv_a.weight[rank : rank + 2 * PAIRS], words, torch.view_as_real(there).flatten())
    out = attention.wo.weight.unflatten(1, (heads, -1))
    values = attention.wkv_b.weight.unflatten(0, (heads, -1))[:, nope:]
    values *= COPY_GAIN
    attention.wo.weight *= COPY_GAIN
    pair = len(DISTANCES)
    for head in range(heads):
        out[:, head] = out[:, head - head % pair].clone()
        values[head] = values[head - head % pair].clone()
    latents = attention.kv_norm(attention.wkv_a(words)[:, :rank])
    scale = latents.std() / attention.wkv_a(words)[:, :rank].std()  # what the norm between the two maps does, about
    return scale * torch.stack([out[:, n] @ values[n] @ attention.wkv_a.weight[:rank] for n in range(0, heads, pair)]).sum(0)


def _seek_latent(attention: LatentAttention, words: Tensor, copied: Tensor) -> None:
    """As ``_seek_dense``, with the channels that RoPE leaves alone."""
    heads, nope, rank = attention.heads, attention.nope, min(attention.rank, attention.wq_a.out_features)
    into_latent = attention.wkv_a.weight[: attention.rank]
    _ignore_shared(into_latent, words)
    sought = into_latent[:rank] @ copied
    attention.wq_a.weight[:rank] = sought * into_latent.std() / sought.std()
    _ignore_shared(attention.wq_a.weight, words)
    keys = attention.wkv_b.weight.unflatten(0, (heads, -1))[:, :nope]
    keys *= SEEK_GAIN
    queries = attention.wq_b.weight.unflatten(0, (heads, -1))
    queries[:, :nope] = 0.0
    queries[:, :nope, :rank] = keys[:, :, :rank]
    queries[:, nope:] *= FAST_GAIN


def _far_keys_and_queries(rotary: Rotary, heads: int) -> tuple[Tensor, Tensor]:
    """Complex keys [P] and queries [H, P] whose product is largest at the distance of each head."""
    distances = torch.tensor(DISTANCES).repeat(heads)[:heads]
    turns = rotary(distances)[:, :PAIRS]
    return SIZE * torch.ones_like(turns[0]), SIZE * turns.conj()


def _answer(weight: Tensor, inputs: Tensor, target: Tensor) -> None:
    """Change rows of a projection [P, C] so that the mean of ``inputs`` [N, C] gives ``target`` [P] besides."""
    mean = inputs.mean(0)
    weight += torch.outer(target, mean / mean.dot(mean))


def _ignore_shared(weight: Tensor, inputs: Tensor) -> None:
    """Change rows of a projection so that the mean of ``inputs`` gives nothing."""
    mean = inputs.mean(0)
    weight -= torch.outer(weight @ mean, mean / mean.dot(mean))
