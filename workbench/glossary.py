"""The words of the field: ``wb.glossary("CSA")`` explains one in a sentence and an equation, ``wb.glossary()`` lists all."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from html import escape
from typing import Any

from workbench.errors import InputError

_V4 = "DeepSeek-V4 report (reference/deepseek-v4.md, section {})"
_V41 = "DeepSeek-V4.1 report (reference/deepseek-v41.md, section {})"
_ENGRAM = "Engram paper (reference/engram-and-overlap.md, section {})"
_MHC = "mHC paper (reference/deepseek-v4.md, section 8)"
_GENERAL = "general knowledge"
STYLE = (
    "<style>.wb-term{line-height:1.5;margin:6px 0;max-width:60em}"
    ".wb-term code{white-space:pre-wrap;display:block;padding:2px 0}"
    ".wb-term small{opacity:0.8}</style>"
)


@dataclass(frozen=True, slots=True)
class Term:
    """One word: what it means in one sentence, its equation in plain characters, and where it comes from."""

    name: str
    meaning: str
    equation: str
    source: str
    also: tuple[str, ...] = ()  # other names it answers to

    def __str__(self) -> str:
        names = f"{self.name} ({', '.join(self.also)})" if self.also else self.name
        return f"{names}: {self.meaning}\n    {self.equation}\n    [{self.source}]"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return STYLE + self.html()

    def html(self) -> str:
        """Without the style, for lists."""
        other = f" <small>({escape(', '.join(self.also))})</small>" if self.also else ""
        return (
            f"<div class='wb-term'><b>{escape(self.name)}</b>{other}: {escape(self.meaning)}"
            f"<code>{escape(self.equation)}</code><small>{escape(self.source)}</small></div>"
        )

    def mentions(self, words: str) -> bool:
        """Whether every one of the words stands somewhere in this term, case aside."""
        text = " ".join((self.name, *self.also, self.meaning)).lower()
        return all(word in text for word in words.lower().split())


def glossary(term: str | None = None) -> Any:
    """A ``Term`` by any of its names, case, dashes and a plural aside; without a name, a list of all to search.

    Raises InputError for a word that is not in it, with the nearest ones.
    """
    if term is None:
        from workbench.widgets.glossary import GlossarySearch  # only a list needs Jupyter

        return GlossarySearch()
    if not isinstance(term, str):
        raise InputError(f"a term is looked up by its name, got {term!r:.60}")
    wanted = _plain(term)
    found = _NAMES.get(wanted) or _NAMES.get(wanted.removesuffix("s")) or _NAMES.get(wanted.removesuffix("ies") + "y")
    if found is None:
        near = [_NAMES[name].name for name in difflib.get_close_matches(wanted, _NAMES, n=6, cutoff=0.5)]
        near += [t.name for t in TERMS if wanted and wanted in _plain(t.meaning)]
        told = f"did you mean {', '.join(list(dict.fromkeys(near))[:4])}?" if near else "wb.glossary() lists all terms"
        raise InputError(f"the glossary has no {term!r:.60}; {told}")
    return found


def _plain(text: str) -> str:
    """Letters and digits alone, in small letters: "top-k" and "Top K" are one word."""
    return re.sub(r"[\W_]+", "", text.lower())


TERMS: tuple[Term, ...] = (
    Term(
        "KV cache",
        "What a layer keeps of tokens it has already seen, so that a new token need not process them again.",
        "bytes(L) = layers × L × bytes of a row, if every token has one",
        _GENERAL,
        ("cache", "KV"),
    ),
    Term(
        "prefill",
        "Reading a prompt: many tokens go through the model in one call and fill the cache.",
        "one call with T tokens; same result as T calls with one",
        _V4.format(4),
    ),
    Term(
        "decode",
        "Writing: each call feeds one token back and reads the cache for it.",
        "token t + 1 = choose(model(token t, cache of tokens 0..t − 1))",
        _V4.format(4),
        ("decoding",),
    ),
    Term(
        "MHA",
        "Attention with a key and a value of its own in every head, so its cache is the largest.",
        "bytes per token and layer = 2 × H × D × value bytes",
        "reference/deepseek-v4.md, sections 5 and 6 (as a baseline)",
        ("multi-head attention",),
    ),
    Term(
        "GQA",
        "Attention whose query heads share keys and values in groups, which saves bytes but no arithmetic.",
        "bytes per token and layer = 2 × H_kv × D × value bytes, H_kv < H",
        "reference/deepseek-v4.md, sections 5 and 6 (as a baseline)",
        ("grouped-query attention",),
    ),
    Term(
        "MLA",
        "Attention that keeps for each token one narrow latent vector, from which all heads derive their keys and values.",
        "row = [latent c ; rotary key], c = W_down x;  512 + 64 numbers in V3.2",
        "DeepSeek-V3.2 (reference/deepseek-v4.md, sections 0 and 5)",
        ("multi-head latent attention", "latent attention"),
    ),
    Term(
        "DSA",
        "V3.2's sparse attention: a lightning indexer scores every token and attention reads only the best of them.",
        "attend to top-k over s ≤ t of I[t, s], k = 2048",
        "DeepSeek-V3.2 (reference/deepseek-v4.md, sections 0 and 6)",
        ("DeepSeek sparse attention", "MLA + DSA"),
    ),
    Term(
        "CSA",
        "V4's compressed sparse attention: a few tokens become one entry, and an indexer picks the entries a query may read.",
        "attend to window ∪ top-k of ⌊(t + 1) / 4⌋ entries",
        _V4.format(2),
        ("compressed sparse attention",),
    ),
    Term(
        "HCA",
        "V4's heavily compressed attention: so many tokens become one entry that a query reads all, without indexer.",
        "attend to window ∪ all ⌊(t + 1) / 128⌋ entries",
        _V4.format(3),
        ("heavily compressed attention",),
    ),
    Term(
        "CSA2",
        "V4.1's way of sharing: a few layers own a stream of entries, later layers read it and may reuse another's choice.",
        "layer modes: Full (own stream and choice), Reindex (own choice), Reuse (neither)",
        _V41.format("3 and 4"),
        ("shared streams", "shared stream"),
    ),
    Term(
        "compressor",
        "The part that turns a block of tokens into one entry: a weighted mean, with weights for every channel of its own.",
        "C_j = RMSNorm(Σ softmax over the block's tokens (Z + bias) · K)",
        _V4.format("2.1 and 3"),
        ("token compressor",),
    ),
    Term(
        "compressed entry",
        "What a compressor leaves of a block of tokens; it is key and value at once, shared by all heads.",
        "entry j stands for tokens j·m … j·m + m − 1 (and in CSA looks m tokens further back)",
        _V4.format("2.1"),
        ("entry", "compressed entries"),
    ),
    Term(
        "overlap of blocks",
        "CSA's entries are made from their own block and the one before, so that no border cuts a phrase in two.",
        "softmax over 2m rows: Za of block j − 1, Zb of block j",
        _V4.format("2.1"),
        ("overlapping compressor", "overlap"),
    ),
    Term(
        "tail",
        "What a compressor remembers between calls: the open block, not yet an entry, and in CSA half of the last one.",
        "open tokens = L mod m",
        _V4.format(4),
        ("open block", "compressor tail"),
    ),
    Term(
        "sliding window",
        "The last tokens, kept as they are beside the entries, so that close neighbours are seen in full.",
        "tokens max(0, t − W + 1) … t, W = 128",
        _V4.format("1.2"),
        ("window",),
    ),
    Term(
        "ring",
        "How the window is stored: a new token overwrites the oldest in place and nothing is moved.",
        "slot of token t = t mod W",
        _V4.format(4),
        ("ring buffer",),
    ),
    Term(
        "sink",
        "A learned number for each head in the softmax's denominator, so that a head may attend to nothing.",
        "p_j = exp(a_j) / (Σ exp(a) + exp(s_head))",
        _V4.format("1.2"),
        ("attention sink",),
    ),
    Term(
        "lightning indexer",
        "A small scorer with narrow heads that rates all entries for a query, so that attention reads only the best.",
        "I[t, s] = Σ_h w[t, h] · ReLU(q[t, h] · k[s])",
        _V4.format("2.2"),
        ("indexer",),
    ),
    Term(
        "index key",
        "What the indexer keeps of an entry to score it; all of them are read for each token, so they are small.",
        "128 numbers in FP4 = 64 + 4 scale bytes = 68 B",
        _V4.format("2.2 and 5"),
    ),
    Term(
        "top-k",
        "How many entries the indexer keeps for a query; equal scores count for the lower entry.",
        "S_t = the k entries s with the largest I[t, s]",
        _V4.format("2.2"),
        ("index_topk",),
    ),
    Term(
        "RoPE",
        "Positions put into queries and keys by turning pairs of channels, so that products depend on distances alone.",
        "(x + iy) · exp(i · t · θ^(−2i / R))",
        _V4.format("1.1"),
        ("rotary embedding",),
    ),
    Term(
        "inverse RoPE",
        "Since V4's values are turned like its keys, attention's output is turned back by the query's position.",
        "o_t = RoPE⁻¹_t(Σ p_j k_j)",
        _V4.format("1.1"),
    ),
    Term(
        "YaRN",
        "Stretches RoPE to longer texts: slow rotations are slowed further, quick ones are left as they were.",
        "f ← f / factor · ramp + f · (1 − ramp)",
        _V4.format("1.1"),
    ),
    Term(
        "mHC",
        "Several residual streams mixed between layers by a matrix kept close to doubly stochastic, so nothing can blow up.",
        "X′_k = post_k · y + Σ_j A_jk X_j,  y = sublayer(Σ pre_k X_k)",
        _MHC,
        ("manifold-constrained hyper-connections", "hyper-connections"),
    ),
    Term(
        "stream",
        "One of the parallel residual vectors that mHC carries from layer to layer, four in V4.",
        "X ∈ R^(n × D), n = 4",
        _MHC,
        ("residual stream",),
    ),
    Term(
        "Sinkhorn-Knopp",
        "Divides a positive matrix by its row sums and column sums in turn until both are close to one.",
        "A ← A / rowsum(A);  A ← A / colsum(A);  20 times",
        _MHC,
        ("Sinkhorn",),
    ),
    Term(
        "n-gram",
        "A few tokens in a row, here the last ones before a position.",
        "(x_{t−n+1}, …, x_t)",
        _ENGRAM.format("1.2"),
        ("suffix n-gram",),
    ),
    Term(
        "Engram",
        "A large table of vectors that is looked up by the last few tokens, without attention, and let in by a gate.",
        "e_t = concat of table[hash_h(n-gram)] over heads h;  added: gate · W e_t",
        _ENGRAM.format("1.2 to 1.4"),
        ("conditional memory",),
    ),
    Term(
        "gate",
        "A number from 0 to 1 that says how much of what Engram found enters a stream.",
        "gate_g = σ(RMSNorm(k_g) · RMSNorm(H_g) / √d)",
        _ENGRAM.format("1.4"),
    ),
    Term(
        "collision",
        "Two different n-grams whose hash is the same row, which rarely happens in all heads at once.",
        "hash_h(a) = hash_h(b), a ≠ b",
        _ENGRAM.format("1.2"),
        ("hash collision",),
    ),
    Term(
        "prefetch",
        "Fetching table rows before the layer that needs them is reached; which ones is known from the tokens alone.",
        "stall = max(0, fetch time − compute time before the layer)",
        _ENGRAM.format("3"),
        ("prefetching",),
    ),
    Term(
        "MoE",
        "A feed-forward layer made of many experts, of which each token uses a few.",
        "y = shared(x) + Σ over chosen e of g_e · expert_e(x)",
        _V4.format(7),
        ("mixture of experts",),
    ),
    Term(
        "router",
        "Scores the experts for each token and picks the best; in V4's first layers a hash of the token picks instead.",
        "g = sqrt(softplus(W x)), normalised over the chosen",
        _V4.format("0 and 7"),
        ("gate of the MoE",),
    ),
    Term(
        "FP8 E4M3",
        "A number in one byte: sign, four bits of exponent, three of mantissa; largest value 448.",
        "± 2^(e − 7) · (1 + f / 8)",
        _GENERAL,
        ("FP8", "E4M3"),
    ),
    Term(
        "UE8M0",
        "A scale in one byte that is a power of two and nothing else: eight bits of exponent, no sign, no mantissa.",
        "2^(e − 127)",
        _GENERAL,
        ("E8M0",),
    ),
    Term(
        "MXFP4",
        "Numbers in four bits (E2M1), with one UE8M0 scale for each 32 of them.",
        "x ≈ 2^(e − 127) · {0, ½, 1, 1½, 2, 3, 4, 6} with sign; 17 bytes for 32",
        _V4.format("0 and 2.2"),
        ("FP4", "E2M1"),
    ),
    Term(
        "BF16",
        "A number in two bytes with the exponent of FP32 and eight bits of precision: the same range, three decimal digits.",
        "± 2^(e − 127) · (1 + f / 128)",
        _GENERAL,
        ("bfloat16",),
    ),
    Term(
        "FP32",
        "A number in four bytes, about seven decimal digits; what models here compute in on a CPU.",
        "± 2^(e − 127) · (1 + f / 2^23)",
        _GENERAL,
        ("float32", "single precision"),
    ),
    Term(
        "nat",
        "The unit of a loss or a divergence when logarithms are natural; a guess one nat worse was e times less likely.",
        "1 nat = 1 / ln 2 bits ≈ 1.44 bits",
        _GENERAL,
    ),
    Term(
        "KL divergence",
        "How far one distribution of the next token is from another: zero if equal, and not the same in both directions.",
        "KL(p ‖ q) = Σ p_i · ln(p_i / q_i), in nats",
        _GENERAL,
        ("KL", "Kullback-Leibler divergence"),
    ),
    Term(
        "softmax",
        "Turns scores into shares that are positive and sum to one, larger scores getting far more.",
        "p_i = exp(a_i) / Σ exp(a_j)",
        _GENERAL,
    ),
    Term(
        "logit",
        "A model's raw score for one token of its vocabulary to come next, before the softmax.",
        "p(next token = i) = softmax(logits)_i",
        _GENERAL,
    ),
    Term(
        "FLOP",
        "One multiplication or addition of floating-point numbers; FLOP/s counts them per second.",
        "a matrix of m × n times a vector = 2 · m · n FLOPs",
        _V4.format(6),
        ("floating-point operation",),
    ),
    Term(
        "tensor parallelism",
        "Cutting each layer's weights over several cards, which then work on every token together and exchange results.",
        "weights per card = weights / cards; a cache shared by all heads is on every card",
        _GENERAL,
        ("tensor parallel", "TP"),
    ),
    Term(
        "doubly stochastic",
        "Said of a matrix of positive numbers whose rows and columns all sum to one, so that mixing with it amplifies nothing.",
        "Σ_j A_ij = Σ_i A_ij = 1, A_ij ≥ 0",
        _MHC,
    ),
    Term(
        "recall",
        "The share of questions answered right, or of what was sought that is among what was found.",
        "found and sought / sought",
        _GENERAL,
    ),
    Term(
        "stall",
        "The time that compute stands still because rows it needs have not come yet.",
        "hidden share = 1 − stall / lookup time",
        _ENGRAM.format("3"),
        ("exposed time",),
    ),
    Term(
        "replayed prefill",
        "A shortcut of V4.1: the upper half of the layers reads only the prompt's last window of tokens.",
        "work ≈ L · layers / 2 + W · layers / 2 instead of L · layers",
        _V41.format(10),
        ("replay", "bounded replay"),
    ),
    Term(
        "candidate pool",
        "In V4.1 the blocks of entries that one indexer liked best; later indexers choose among them alone.",
        "2,048 blocks of up to 8 entries = at most 16,384 entries",
        _V41.format(4),
        ("pool",),
    ),
    Term(
        "bytes held and bytes read",
        "What the cache occupies, and what of it one decoded token must fetch: sparse attention reads far less than it holds.",
        "CSA holds ⌊L/4⌋ · (E + I), reads min(k, ⌊L/4⌋) · E + ⌊L/4⌋ · I",
        _V4.format(5),
        ("bytes held", "bytes read"),
    ),
)
_NAMES: dict[str, Term] = {_plain(name): term for term in TERMS for name in (term.name, *term.also)}
