"""Where training of models whose entries are single tokens begins: heads that look back, and heads that seek what those found.

To recall what followed a word, such a decoder needs two steps: a head that tells a token which words stood before it, and one
above that looks for the tokens which were told of the word at hand. V4's compressor brings neighbouring tokens together by
itself; random attention must find both steps at once, for which the few million tokens that a tiny model sees are too few. So
the first layer begins with heads that copy the words one and two tokens back into channels of their own, and one layer above
begins with queries for tokens into which its own word was copied. What a found token says, and everything else, is learned;
training holds the first layer's attention for a while (``Recipe.held_steps``), then all is free to change.
"""

from __future__ import annotations

import torch
from torch import Tensor

from workbench.model.attention.dense import DenseAttention
from workbench.model.attention.latent import LatentAttention
from workbench.model.attention.shared_stream import SharedStreamAttention
from workbench.model.layers import Rotary
from workbench.model.plain import PlainModel
from workbench.model.single_pass import V41Model

SHARED_CHANNELS, SHARED_VALUE = 4, 1.5  # of the embeddings: a direction all words have, because RoPE finds distances only there
DISTANCES = (1, 2)  # tokens back
PAIRS = 4  # the fastest rotary pairs, which tell near distances apart
NEAR = 5.3  # length of queries and keys in each of them
NEAR_KEY, NEAR_QUERY = 1.5, 45.0  # where key and value are one normed vector, and only queries can be long
SOUGHT = 9.0  # about the logit of a token into which the word was copied; it stands about four deviations above the others
FOR = 0.5  # makes every index head count in favour of what it finds
OTHERS = 0.3  # of what else is in the queries and keys of heads that seek


@torch.no_grad()
def give_head_start(model: PlainModel | V41Model) -> None:
    """Set attention weights of an untrained model of two layers or more as described above, in place."""
    half = model.config.hidden_size // 2
    own, copies = slice(SHARED_CHANNELS, half), slice(half + SHARED_CHANNELS, 2 * half)
    model.embed.weight[:, half:] = 0.0
    model.head.weight[:, half:] = 0.0
    model.embed.weight[:, :SHARED_CHANNELS] = SHARED_VALUE
    model.head.weight[:, :SHARED_CHANNELS] = 0.0  # it tells no word from another
    first = model.blocks[0]
    words = first.attn_norm(model.embed.weight)
    if isinstance(model, V41Model):
        _copy_shared(first.attn, words, own, copies, model.window_rotary)
        for source in model.config.kv_source_layer_ids:
            if model.config.compress_ratios[source] == 1:
                _seek_shared(model.blocks[source].attn, own, copies)
    elif isinstance(first.attn, LatentAttention):
        _copy_latent(first.attn, words, own, copies, model.rotary)
        _seek_latent(model.blocks[1].attn, own, copies)
    else:
        _copy_dense(first.attn, words, own, copies, model.rotary)
        _seek_dense(model.blocks[1].attn, own, copies)


def _copy_dense(attention: DenseAttention, words: Tensor, own: slice, copies: slice, rotary: Rotary) -> None:
    heads, width, half = attention.heads, attention.head_dim, attention.head_dim // 2
    keys, queries = attention.wk.weight.unflatten(0, (-1, width)), attention.wq.weight.unflatten(0, (heads, width))
    _ignore_shared(attention.wq.weight, words)
    there, here = _far_keys_and_queries(rotary, heads)
    for head in range(heads):
        _answer(queries[head, :PAIRS], words, NEAR * here[head].real)
        _answer(queries[head, half : half + PAIRS], words, NEAR * here[head].imag)
    for group in keys:
        _answer(group[:PAIRS], words, NEAR * there.real)
    values, out = attention.wv.weight.unflatten(0, (-1, width)), attention.wo.weight.unflatten(1, (heads, width))
    for group in values:
        _wire(group, own)
    for head in range(heads):
        _wire(out[:, head].mT, copies, _copy_gain(words, own, heads))


def _seek_dense(attention: DenseAttention, own: slice, copies: slice) -> None:
    """Words are compared in the slower half of the rotary pairs, which turn little over the lengths trained on."""
    width = attention.head_dim
    for weight, read in ((attention.wq.weight, own), (attention.wk.weight, copies)):
        for head in weight.unflatten(0, (-1, width)):
            head *= OTHERS
            slow = head.unflatten(0, (2, -1))[:, width // 4 :]  # [2, slow pairs, C]
            compared = torch.zeros_like(slow).flatten(0, 1)
            channels = _wire(compared, read)
            compared *= _seeking_gain(channels, width**-0.5) ** 0.5
            slow.copy_(compared.view_as(slow))


def _copy_latent(attention: LatentAttention, words: Tensor, own: slice, copies: slice, rotary: Rotary) -> None:
    heads, nope, rank = attention.heads, attention.nope, attention.rank
    low = attention.q_norm(attention.wq_a(words))
    queries = attention.wq_b.weight.unflatten(0, (heads, -1))[:, nope:]
    _ignore_shared(queries.flatten(0, 1), low)
    there, here = _far_keys_and_queries(rotary, heads)
    for head in range(heads):
        _answer(queries[head, : 2 * PAIRS], low, NEAR * torch.view_as_real(here[head]).flatten())
    _answer(attention.wkv_a.weight[rank : rank + 2 * PAIRS], words, NEAR * torch.view_as_real(there).flatten())
    _wire(attention.wkv_a.weight[:rank], own)
    latents = attention.kv_norm(attention.wkv_a(words)[:, :rank])
    values, out = attention.wkv_b.weight.unflatten(0, (heads, -1))[:, nope:], attention.wo.weight.unflatten(1, (heads, -1))
    for head in range(heads):
        _wire(values[head], slice(0, rank))
        _wire(out[:, head].mT, copies, _copy_gain(latents, slice(0, _length(own)), heads))
    if attention.kind == "mla-dsa":
        indexer, half = attention.indexer, attention.rotary // 2
        there, here = _far_keys_and_queries(rotary, indexer.heads)
        _answer(indexer.wk.weight[:PAIRS], words, NEAR * there.real)
        for head, turns in zip(indexer.wq_b.weight.unflatten(0, (indexer.heads, -1)), here, strict=True):
            _answer(head[:PAIRS], low, NEAR * turns.real)
            _answer(head[half : half + PAIRS], low, NEAR * turns.imag)
        indexer.weights_proj.weight[:, :SHARED_CHANNELS] = FOR


def _seek_latent(attention: LatentAttention, own: slice, copies: slice) -> None:
    """Half of the latent holds what was copied, for the keys, half the word itself, for the values."""
    nope, half = attention.nope, attention.rank // 2
    latent = attention.wkv_a.weight
    latent[attention.rank :] *= OTHERS
    channels = min(_wire(latent[:half], copies), nope, attention.wq_a.out_features)
    _wire(latent[half : attention.rank], own)
    _wire(attention.wq_a.weight[:channels], own)
    per_head = attention.wkv_b.weight.unflatten(0, (attention.heads, -1))
    queries = attention.wq_b.weight.unflatten(0, (attention.heads, -1))
    queries[:, nope:] *= OTHERS
    gain = _seeking_gain(channels, attention.scale) ** 0.5
    for head in range(attention.heads):
        _wire(per_head[head, :nope], slice(0, channels), gain)
        _wire(queries[head, :nope], slice(0, channels), gain)
    if attention.kind == "mla-dsa":
        indexer, turning = attention.indexer, attention.rotary
        indexer.weights_proj.weight[:, :SHARED_CHANNELS] = FOR
        _wire(indexer.wk.weight[turning:], copies)
        for head in indexer.wq_b.weight.unflatten(0, (indexer.heads, -1)):
            _wire(head[turning:], slice(0, channels))


def _copy_shared(attention: SharedStreamAttention, words: Tensor, own: slice, copies: slice, rotary: Rotary) -> None:
    """In a window layer one KV head serves all, its keys are its values: what RoPE leaves alone holds the word."""
    heads, width = attention.heads, attention.head_dim
    still = width - 2 * rotary.frequencies.numel()
    keys, queries = attention.wkv.weight, attention.wq_b.weight.unflatten(0, (heads, width))
    keys[still:] = 0.0
    queries[...] = 0.0
    low = attention.q_norm(attention.wq_a(words))
    there, here = _far_keys_and_queries(rotary, heads)
    _answer(keys[still : still + 2 * PAIRS], words, NEAR_KEY * torch.view_as_real(there).flatten())
    for head in range(heads):
        _answer(queries[head, still : still + 2 * PAIRS], low, NEAR_QUERY * torch.view_as_real(here[head]).flatten())
    _wire(keys[:still], own)
    values = attention.kv_norm(attention.wkv(words))
    groups, rank = attention.wo_a.groups, attention.wo_a.weight.shape[0] // attention.wo_a.groups
    for group in attention.wo_a.weight.unflatten(0, (groups, rank)):
        for head in group.unflatten(1, (-1, width)).unbind(1):
            _wire(head, slice(0, still))
    for group in attention.wo_b.weight.unflatten(1, (groups, rank)).unbind(1):
        _wire(group.mT, copies, _copy_gain(values, slice(0, _length(own)), heads))


def _seek_shared(attention: SharedStreamAttention, own: slice, copies: slice) -> None:
    """Two thirds of what RoPE leaves alone in an entry hold what was copied, for queries to meet, one third the word itself."""
    heads = attention.heads
    still = attention.head_dim - 2 * attention.rotary.frequencies.numel()
    entry = attention.compressor.wkv.weight
    met = 2 * still // 3
    channels = min(_wire(entry[:met], copies), attention.wq_a.out_features)
    _wire(entry[met:still], own)
    entry[still:] *= OTHERS
    _wire(attention.wq_a.weight[:channels], own)
    queries = attention.wq_b.weight.unflatten(0, (heads, -1))
    queries[:, still:] *= OTHERS
    for head in range(heads):
        _wire(queries[head, :still], slice(0, channels), _seeking_gain(channels, attention.head_dim**-0.5))


def _wire(weight: Tensor, read: slice, gain: float = 1.0) -> int:
    """Let row i of a projection [P, C] give channel i of ``read``, times ``gain``, and nothing else; how many channels fit."""
    weight[...] = 0.0
    channels = min(len(weight), _length(read))
    weight[range(channels), range(read.start, read.start + channels)] = gain
    return channels


def _length(channels: slice) -> int:
    return channels.stop - channels.start


def _copy_gain(values: Tensor, own: slice, heads: int) -> float:
    """What makes a copy as large as an embedding, half of it from each of the two heads that look equally far back."""
    return 0.5 * len(DISTANCES) / heads / float(values[:, own].std())


def _seeking_gain(channels: int, scale: float) -> float:
    """What makes logits about ``SOUGHT`` where query and key share a word of unit size in so many channels."""
    return SOUGHT / (0.8 * channels * scale)  # the other word copied takes its share of a normed vector


def _far_keys_and_queries(rotary: Rotary, heads: int) -> tuple[Tensor, Tensor]:
    """Complex keys [P] and queries [H, P] of unit size whose product is largest at the distance of each head."""
    distances = torch.tensor(DISTANCES).repeat(heads)[:heads]
    turns = rotary(distances)[:, :PAIRS]
    return torch.ones_like(turns[0]), turns.conj().resolve_conj()


def _answer(weight: Tensor, inputs: Tensor, target: Tensor) -> None:
    """Change rows of a projection [P, C] so that the mean of ``inputs`` [N, C] gives ``target`` [P] besides."""
    mean = inputs.mean(0)
    weight += torch.outer(target, mean / mean.dot(mean))


def _ignore_shared(weight: Tensor, inputs: Tensor) -> None:
    """Change rows of a projection so that the mean of ``inputs`` gives nothing."""
    mean = inputs.mean(0)
    weight -= torch.outer(weight @ mean, mean / mean.dot(mean))
