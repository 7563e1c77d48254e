"""The operations of CSA, HCA and the lightning indexer; those that CSA2 has too are written once, here.

B batch, T tokens, H heads, D head dim, S entries, K kept ones, W window. (reference/deepseek-v4.md, sections 1 to 3)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.model.attention.core import attend
from workbench.model.attention.hybrid import HybridAttention
from workbench.model.compressor import Compressor
from workbench.model.indexer import Indexer, keep_best, score_chunk
from workbench.model.layers import GroupedProjection
from workbench.walk.run import Look, Operation, Statement, Way, operation, softmax_of_last

CLOSED_ONLY = "Entries are there only for complete blocks: entry j from token (j + 1) m - 1 on."
BEST = Statement(keep_best, "best, entries = topk_lower_first(")


def all_rows(x: Tensor, block: Any) -> Tensor:
    """[B, S, D] -> [S, D]."""
    return x[0]


def window_columns(x: Tensor, block: Any) -> Tensor:
    """Probabilities [B, T, H, W] -> [H, W] without the places before the text; ``x`` ends with the walked token's row."""
    return x[0, -1, :, -min(block.attn.window, x.shape[1]) :] if x.shape[1] < block.attn.window else x[0, -1]


def _window(x: Tensor, block: Any) -> Tensor:
    """Keys [B, T, D] -> those in the last token's window."""
    return x[0, -block.attn.window :]


def _gathered(x: Tensor, block: Any) -> Tensor:
    """Entries [B, T, K, D] or, shared by all queries, [B, S, D]."""
    return x[0, -1] if x.dim() == 4 else x[0]


def _last_query(x: Tensor, block: Any) -> Tensor:
    """Products [B, T * H, S] -> [H, S]."""
    return x[0, -block.attn.indexer.heads :]


def _heads(x: Tensor, block: Any) -> Tensor:
    return x[0, -1].view(block.attn.heads, -1)


def _groups(x: Tensor, block: Any) -> Tensor:
    return x[0, -1].view(block.attn.wo_a.groups, -1)


def hybrid(attn: HybridAttention) -> tuple[Operation, ...]:
    """CSA or HCA: queries and keys, compression, choice (CSA only), one softmax over all, output."""
    forward = HybridAttention.forward
    csa = attn.kind == "csa"
    return (
        low_rank(forward),
        operation(
            "A query for every head",
            "q_h = (qr W_qb)_h",
            Statement(forward, "q = self.wq_b(qr)"),
            Look("q", "q", "heads, channels"),
        ),
        operation(
            "Normed, and turned by its position",
            "q_h ← RoPE_t( q_h / √(mean(q_h²) + ε) ), the last channels only",
            Statement(forward, "q = rotate(rms_norm(q"),
            Look("q", "q", "heads, channels"),
        ),
        window_keys(HybridAttention._keys),
        *_compress("attn.compressor", overlapping=csa),
        *([*index_scores(Indexer.forward), _choose()] if csa else []),
        _read(gathering=csa),
        *softmax_and_sum(
            Statement(HybridAttention._attend, "self.attention_tap(Attention("), "entry_probs", "kept" if csa else "entries"
        ),
        *output(Look("out", "return", "channels"), forward),
    )


def indexer() -> tuple[Operation, ...]:
    """CSA's lightning indexer alone: its own small keys, queries and head weights, scores, the choice."""
    return (
        low_rank(HybridAttention.forward),
        *_compress("attn.indexer.compressor", overlapping=True, key="K^I"),
        *index_scores(Indexer.forward),
        _choose(),
    )


def low_rank(forward: Any) -> Operation:
    return operation(
        "One low-rank query",
        "qr = RMSNorm(x W_qa)",
        Statement(forward, "qr = self.q_norm(self.wq_a(x))"),
        Look("x", "x", "channels"),
        Look("qr", "qr", "rank"),
        note="x is what the sublayer reads from the residual streams, normed. The indexer shares qr.",
    )


def window_keys(keys: Any) -> Operation:
    return operation(
        "Window keys, which are the values too",
        "kv_t = RoPE_t( RMSNorm(x_t W_kv) )",
        Statement(keys, "return rotate(self.kv_norm(self.wkv(x))"),
        Look("kv", "return", "tokens, channels", _window, rows="window"),
        note="One key-value head serves all query heads; the last W tokens, this one included.",
    )


def _compress(owner: str, *, overlapping: bool, key: str = "C") -> list[Operation]:
    forward = Compressor.forward
    if overlapping:
        series, rows = "channels of both series", "the block before's a-series and the own block's b-series"
        projected = "[Ka; Kb] = W_kv x,  [Za; Zb] = W_gate x + B[t mod m]"
        collect, path = Statement(forward, "rows = torch.cat([torch.cat([before", owner), "rows"
    else:
        series, rows = "channels", "the tokens of block j"
        projected = "K = W_kv x,  Z = W_gate x + B[t mod m]"
        collect, path = Statement(forward, "closed = pair[:, :, : blocks * ratio]", owner), "closed"
    return [
        operation(
            "Each token's value and gate score" + (", twice" if overlapping else ""),
            projected,
            Statement(forward, "pair = torch.stack([self.wkv(x)", owner),
            Look("K", "pair.0", series),
            Look("Z", "pair.1", series),
        ),
        operation(
            "The rows that the newest entry reads",
            f"rows of entry j: {rows}",
            collect,
            Look("K rows", f"{path}.0", "tokens, channels", rows="block"),
            Look("Z rows", f"{path}.1", "tokens, channels", rows="block"),
            note=CLOSED_ONLY,
        ),
        operation(
            "Gated into one entry",
            f"{key}_j = RMSNorm( Σ_rows softmax_rows(Z) ∘ K ), channel by channel",
            Statement(forward, "pooled = self.norm((torch.softmax(scores", owner),
            Look("gate weights", "scores", "tokens, channels", softmax_of_last, rows="block"),
            Look(f"{key}_j before RoPE", "pooled", "channels"),
            note=CLOSED_ONLY,
        ),
        operation(
            "Turned by the position of its first token",
            f"{key}_j ← RoPE_jm( {key}_j )",
            Statement(forward, "return rotate(pooled", owner),
            Look(f"{key}_j", "return", "channels"),
            Look(f"all {key}", "return", "entries, channels", all_rows, rows="entries"),
            note=CLOSED_ONLY,
        ),
    ]


def index_scores(forward: Any) -> list[Operation]:
    return [
        operation(
            "Index queries",
            "q^I_h = RoPE_t( (qr W^I_qb)_h )",
            Statement(forward, "q = rotate(self.wq_b(qr.detach())"),
            Look("q^I", "q", "index heads, channels"),
        ),
        operation(
            "How much each index head counts",
            "w = (x W_w) · c_I^-½ · n_I^-½",
            Statement(forward, "w = self.weights_proj(x.detach())"),
            Look("w", "w", "index heads"),
        ),
        operation(
            "Products, the negative ones cut off",
            "ReLU( q^I_h · K^I_j )",
            Statement(score_chunk, "products = torch.matmul(q.float()"),
            Look("products", "products", "index heads, entries", _last_query, columns="entries"),
            note="A long context is scored in tiles; these are the last one's.",
        ),
        operation(
            "One score for each entry",
            "I_j = Σ_h w_h ReLU( q^I_h · K^I_j )",
            Statement(score_chunk, "return torch.matmul(w.float()"),
            Look("I", "scores", "entries", at=BEST, columns="entries"),
        ),
    ]


def _choose() -> Operation:
    return operation(
        "The K best are kept",
        "kept = top-K_j( I_j ), of equal scores the lower entry",
        Statement(HybridAttention._attend, "selection = Selection(best.scores[..., :kept]"),
        Look("kept", "selection.entries", "kept", columns="kept"),
        Look("scores", "selection.scores", "kept", columns="kept"),
        note="Best first; -1 where fewer entries are complete than may be kept.",
    )


def _read(*, gathering: bool) -> Operation:
    attend_ = HybridAttention._attend
    ready = Statement(attend_, "rows = rows.to(q.dtype)")
    every = Way(
        Statement(attend_, "rows = entries.read()"),
        (Look("entries", "rows", "entries, channels", _gathered, ready, rows="entries"),),
    )
    if not gathering:
        return Operation("The entries are read", "C_j for every complete block", (every,), CLOSED_ONLY)
    some = Way(
        Statement(attend_, "rows = entries.gather(selection.entries"),
        (Look("entries", "rows", "kept, channels", _gathered, ready, rows="kept"),),
    )
    note = "While no more entries are complete than may be kept, all are read and none is left out."
    return Operation("The kept entries are read", "C_j for every kept j", (some, every), note)


def softmax_and_sum(record: Statement, entry_probs: str, place: str) -> list[Operation]:
    """``record`` hands the probabilities to the attention tap; those of entries are called ``entry_probs`` there."""
    result = (Look("o", "out", "heads, channels", at=Statement(attend, "return Attended(out")),)
    return [
        operation(
            "One softmax over window, entries and sink",
            "p_hj = exp(q_h·k_j / √D) / ( Σ_j' exp(q_h·k_j' / √D) + exp(s_h) )",
            Statement(attend, "probs = torch.softmax("),
            Look("p window", "near", "heads, tokens", window_columns, record, columns="window"),
            Look("p entries", entry_probs, f"heads, {place}", at=record, columns=place),
            Look("p sink", "done.sink_probs", "heads", at=record),
            note="The learned sink takes its share and has no value: the rest sums to less than one.",
        ),
        Operation(
            "The weighted sum of keys as values",
            "o_h = Σ_j p_hj k_j",
            (
                Way(Statement(attend, "out = torch.matmul(weights"), result),
                Way(Statement(attend, "out = out + (torch.matmul(p"), result),
            ),
        ),
    ]


def output(out: Look, forward: Any) -> list[Operation]:
    project = GroupedProjection.forward
    final = Statement(forward, "return self.wo_b(self.wo_a(rotate(out")
    turned = Look("o", "heads", "heads, channels", _heads, Statement(project, "grouped = heads.reshape(", "attn.wo_a"))
    return [
        operation(
            "Turned back by the query's position",
            "o_h ← RoPE_t⁻¹( o_h )",
            final,
            turned,
            note="Values carry their key's turn; what is left depends on the distance alone.",
        ),
        operation(
            "Each group of heads is projected by itself",
            "y_i = o_i W_oa,i",
            Statement(project, "return torch.bmm(grouped", "attn.wo_a"),
            Look("y", "return", "groups, channels", _groups),
        ),
        operation("The output of attention", "out = concat_i(y_i) W_ob", final, out),
    ]
