"""The operations of CSA2, V4.1's attention, in each of its modes: Full, Reindex and Reuse.

(reference/deepseek-v41.md, sections 3 and 4)
"""

from __future__ import annotations

from workbench.model.attention.shared_stream import SharedStreamAttention
from workbench.model.compressor import StreamCompressor
from workbench.model.indexer import StreamIndexer, candidate_blocks, select_candidates
from workbench.walk.attention import BEST, all_rows, index_scores, low_rank, output, softmax_and_sum, window_keys
from workbench.walk.run import Look, Operation, Statement, Way, operation, softmax_of_last

FORWARD = SharedStreamAttention.forward


def shared_stream(attn: SharedStreamAttention) -> tuple[Operation, ...]:
    """One layer: what it adds to the shared stream, how it comes by its choice, one softmax over all, output."""
    return (
        *(_publish(attn) if attn.kind == "csa2-full" else ()),
        low_rank(FORWARD),
        operation(
            "A query for every head, turned by its position",
            "q_h = RoPE_t( (qr W_qb)_h ), the last channels only",
            Statement(FORWARD, "q = rotate(self.wq_b(qr)"),
            Look("q", "q", "heads, channels"),
            note="Unlike V4's, the heads' queries are not normed.",
        ),
        window_keys(SharedStreamAttention._keys),
        *([_reuse()] if attn.kind == "csa2-reuse" else _choose(attn)),
        _read(),
        *softmax_and_sum(Statement(SharedStreamAttention._attend, "self.attention_tap(Attention("), "done.entry_probs", "kept"),
        *output(Look("out", "return.0", "channels"), FORWARD),
    )


def _publish(attn: SharedStreamAttention) -> list[Operation]:
    forward, publish = StreamCompressor.forward, SharedStreamAttention.publish
    value = operation(
        "Each token's value",
        "V = W_kv x",
        Statement(forward, "values = self.wkv(x)"),
        Look("V", "values", "channels"),
    )
    if attn.ratio == 1:
        pooled = [
            operation(
                "At ratio one a token is an entry",
                "c_i = RMSNorm(V_i)",
                Statement(forward, "return self.norm(values)"),
                Look("c_i", "return", "channels"),
            )
        ]
    else:
        pooled = [
            operation(
                "The tokens of the newest entry",
                "Z = W_gate x; the rows of block i",
                Statement(forward, "closed_values, scores = pair"),
                Look("V rows", "closed_values", "tokens, channels", rows="block"),
                Look("Z rows", "scores", "tokens, channels", rows="block"),
                note="Blocks do not overlap, and there is no position bias.",
            ),
            operation(
                "Gated into one entry",
                "c_i = RMSNorm( Σ_rows softmax_rows(Z) ∘ V ), channel by channel",
                Statement(forward, "return self.norm((torch.softmax(scores"),
                Look("gate weights", "scores", "tokens, channels", softmax_of_last, rows="block"),
                Look("c_i", "return", "channels"),
            ),
        ]
    shared = operation(
        "Published for the layers after this one",
        "C_i = RoPE_im(c_i),  K^I_i = RoPE_im( RMSNorm(c_i W_k) )",
        Statement(publish, "entries, keys = rotate(latents"),
        Look("C_i", "entries", "channels"),
        Look("K^I_i", "keys", "index channels"),
        Look("all C", "entries", "entries, channels", all_rows, rows="entries"),
        note="The index key is projected from the entry before its turn. Later layers read both and make none.",
    )
    return [value, *pooled, shared]


def _choose(attn: SharedStreamAttention) -> list[Operation]:
    """The scores and the choice of a layer with an indexer; with a pool made, or kept to, where the layer has one."""
    choose = SharedStreamAttention._choose
    queries, weights, products, scores = index_scores(StreamIndexer.forward)
    before, after = [], []
    if attn.pool:  # of a context much longer than the pool only its members are read
        members = Look("products", "products", "index heads, members of the pool")
        way = Way(Statement(select_candidates, "products = torch.matmul(index.q.float()"), (members,))
        products = Operation(products.title, products.equation, (*products.ways, way), products.note)
        way = Way(
            Statement(select_candidates, "scores = torch.matmul(index.w.float()"),
            (Look("I", "scores", "members of the pool", at=BEST),),
        )
        scores = Operation(scores.title, scores.equation, (*scores.ways, way), "-∞ outside the pool.")
        before.append(
            operation(
                "The pool to choose from",
                "only entries of the blocks that the candidate source kept for this token",
                Statement(choose, "found.append(select_candidates("),
                Look("pool", "pool", "blocks"),
            )
        )
    if attn.makes_pool:
        after.append(
            operation(
                "A pool for later layers",
                "blocks by their best I_i, the newest block always among them",
                Statement(candidate_blocks, "return numbers.masked_fill("),
                Look("pool", "return", "blocks"),
                note="-1 where fewer blocks are there than the pool takes.",
            )
        )
    chosen = operation(
        "The K best are kept",
        "kept = top-K_i( I_i ), of equal scores the lower entry",
        Statement(choose, "return replace("),
        Look("kept", "return.selection.entries", "kept", columns="kept"),
        Look("scores", "return.selection.scores", "kept", columns="kept"),
        note="Best first; -1 where fewer entries are complete than may be kept. Reuse layers after this one take it over.",
    )
    return [queries, weights, *before, products, scores, *after, chosen]


def _reuse() -> Operation:
    return operation(
        "The choice of an earlier layer is taken over",
        "kept = kept of the latest Full or Reindex layer",
        Statement(SharedStreamAttention._attend, "selection = Selection(*(part[:, mine]"),
        Look("kept", "selection.entries", "kept", columns="kept"),
        Look("scores", "selection.scores", "kept", columns="kept"),
        note="This layer runs no indexer.",
    )


def _read() -> Operation:
    attend_ = SharedStreamAttention._attend_to_stream
    some = Look("entries", "gathered", "kept, channels", rows="kept")
    every = Look("entries", "stream.entries", "entries, channels", all_rows, rows="entries")
    return Operation(
        "The kept entries of the shared stream are read",
        "C_i for every kept i",
        (
            Way(Statement(attend_, "gathered = stream.entries.gather("), (some,)),
            Way(Statement(attend_, "done = attend(q, keys, self.window, known, stream.entries.read()"), (every,)),
        ),
        "Where nothing is left out, all are read.",
    )
