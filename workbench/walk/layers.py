"""The operations of the residual streams (mHC), of MoE routing and of Engram.

B batch, T tokens, N tokens of all sequences, M streams, C model dim, E experts, K chosen ones.
(reference/deepseek-v4.md, sections 7 and 8; reference/deepseek-v41.md, sections 5 and 6; reference/engram-and-overlap.md,
section 1)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from workbench.model.engram import Engram, NgramHash
from workbench.model.hyper_connections import HyperConnection, collapse, sinkhorn
from workbench.model.moe import Experts, Gate, MoE, SwiGLU, clamped_swiglu
from workbench.model.single_pass import SinglePassBlock
from workbench.model.transformer import Block
from workbench.walk.run import Look, Operation, Statement, Way, last_row, operation


def _whole(x: Tensor, block: Any) -> Tensor:
    return x


def _row_sums(x: Tensor, block: Any) -> Tensor:
    return x[-1].double().sum(1) - 1  # how far from one: the sums themselves would all print as 1


def _column_sums(x: Tensor, block: Any) -> Tensor:
    return x[-1].double().sum(0) - 1


def _ngram(x: Tensor, block: Any) -> Tensor:
    """[B, N - 1 + T] -> the longest n-gram, oldest first."""
    return x[0, -block.engram.hash.orders :]


def _rows_by_width(x: Tensor, block: Any) -> Tensor:
    return x[0, -1].view(-1, block.engram.table.width)


def _by_stream(x: Tensor, block: Any) -> Tensor:
    return x[0, -1].view(block.engram.streams, -1)


def streams(block: Any) -> tuple[Operation, ...]:
    """mHC around the layer's MoE: how it reads the streams and writes to them. The last step is what leaves the layer."""
    weights, write, owner = HyperConnection.weights, HyperConnection.write, "hc_ffn"
    single_pass = isinstance(block, SinglePassBlock)
    makes = [
        operation(
            "The streams, as one long vector",
            "vec(X), X the streams of this token",
            Statement(weights, "flat = streams.flatten(2)", owner),
            Look("X", "streams", "streams, channels"),
            note="The sublayer walked here is the layer's MoE; attention has weights of its own.",
        ),
        operation(
            "All weights come from one projection",
            "z = ( vec(X) / √(mean(vec(X)²) + ε) ) φᵀ",
            Statement(weights, "z = F.linear(flat", owner),
            Look("z", "z", "weights"),
            note="First the M weights to read, then the M to write, then the M × M of the mixing matrix.",
        ),
        operation(
            "Scaled, with their bases",
            "z ← α z + b, one α each for pre, post and mix",
            Statement(weights, "z = torch.addcmul(self.base", owner),
            Look("z", "z", "weights"),
        ),
        operation(
            "Weights to read and to write",
            "pre = σ(z_pre) + ε,  post = 2 σ(z_post)",
            Statement(weights, "pre, post = gates[", owner),
            Look("pre", "pre", "streams"),
            Look("post", "post", "streams"),
        ),
        operation(
            "The mixing matrix begins as a row softmax",
            "A = softmax_rows(Z_res) + ε",
            Statement(sinkhorn, "a = torch.softmax(logits"),
            *_matrix("a"),
        ),
        Operation(
            "Sinkhorn–Knopp balances it",
            "columns, then rows and columns in turn, are divided by their sums",
            (
                Way(
                    Statement(sinkhorn, "a = a / (a.sum(1"), _matrix("return", Statement(sinkhorn, "return a.permute(2, 0, 1)"))
                ),
                Way(Statement(sinkhorn, "balance_4x4(rows"), _matrix("return")),
            ),
            "The row step is shown; it ends on a column step, so columns sum to one and rows nearly.",
        ),
    ]
    read = operation(
        "One vector is read from the streams",
        "x = Σ_m pre_m X_m",
        Statement(collapse, "return torch.bmm(pre"),
        Look("pre used", "pre", "streams"),
        Look("x", "return", "channels"),
        note="Single pass: read with the weights of the sublayer before; those worked out next are for the one after."
        if single_pass
        else "",
    )
    call = (
        Statement(SinglePassBlock.forward, "return Flow(self.hc_ffn.write(")
        if single_pass
        else Statement(Block.forward, "return self.hc_ffn.write(")
    )
    writes = [
        operation(
            "The sublayer does its work",
            "y = MoE( RMSNorm(x) )",
            call,
            Look("y", "y", "channels", at=Statement(write, "turned = mix.to(", owner)),
        ),
        operation(
            "The streams are mixed",
            "Σ_j A_jk X_j for every stream k",
            Statement(write, "mixed = torch.bmm(turned", owner),
            Look("mixed", "mixed", "streams, channels"),
        ),
        operation(
            "The output joins them",
            "X'_k = post_k y + Σ_j A_jk X_j",
            Statement(write, "return mixed.addcmul_(", owner),
            Look("X'", "return", "streams, channels"),
        ),
    ]
    return (read, *makes, *writes) if single_pass else (*makes, read, *writes)


def _matrix(path: str, at: Statement | None = None) -> tuple[Look, ...]:
    return (
        Look("A", path, "from stream, to stream", last_row, at),
        Look("row sums − 1", path, "from stream", _row_sums, at),
        Look("column sums − 1", path, "to stream", _column_sums, at),
    )


def routing(ffn: MoE) -> tuple[Operation, ...]:
    """MoE: scores, the choice, weights, the chosen experts and the shared one."""
    gate, together, single = Gate.forward, Experts.forward, Experts._one_by_one
    if ffn.gate.hashed:
        rule, looks = "chosen = table[token id]", (Look("token id", "ids", "", last_row),)
        note = "A hash layer: the experts are read from a fixed table, whatever the token's vector."
    else:
        rule, looks = "chosen = top-K_e( s_e + b_e )", (Look("b", "self.bias", "experts", _whole, columns="expert"),)
        note = "The bias only balances the load: it takes part in the choice and not in the weights."
    inside = tuple(
        Look(name, path, "expert channels", last_row) for name, path in (("g", "gate"), ("u", "up"), ("SwiGLU", "return"))
    )
    outputs = Look("f", "done", "chosen, channels", last_row)
    weighed = Look("weighed, before W_2", "hidden", "chosen, expert channels", _whole)
    routed = (Look("routed", "return", "channels", last_row),)
    return (
        operation(
            "The token comes in",
            "x = RMSNorm(what was read from the streams)",
            Statement(MoE.forward, "flat = x.flatten(0, 1)"),
            Look("x", "flat", "channels", last_row),
        ),
        operation(
            "A score for each expert",
            "s = √softplus(x W)",
            Statement(gate, "scores = F.softplus("),
            Look("s", "scores", "experts", last_row, columns="expert"),
        ),
        operation(
            "K experts are chosen",
            rule,
            Statement(gate, "chosen = self.tid2eid[ids] if self.hashed"),
            *looks,
            Look("chosen", "chosen", "chosen", last_row),
            note=note,
        ),
        operation(
            "Their scores, without the bias",
            "s_e for every chosen e",
            Statement(gate, "weights = scores.gather(1, chosen)"),
            Look("s chosen", "weights", "chosen", last_row),
        ),
        operation(
            "Weights that sum to the routed scaling factor",
            "w_e = s_e / Σ s · scaling",
            Statement(gate, "return weights / ("),
            Look("w", "return.0", "chosen", last_row),
            Look("chosen", "return.1", "chosen", last_row),
        ),
        Operation(
            "The chosen experts work",
            "f_e(x) = W_2e( SwiGLU(W_1e x, W_3e x) )",
            (
                Way(Statement(together, "done = torch.cat(parts)"), (outputs,)),
                Way(Statement(single, "hidden = clamped_swiglu("), (weighed,)),
            ),
        ),
        Operation(
            "They are weighed and added",
            "Σ_e w_e f_e(x)",
            (
                Way(Statement(together, "return torch.matmul(weights.to(x.dtype)"), routed),
                Way(Statement(single, "return torch.stack(out)"), routed),
            ),
        ),
        Operation(
            "Inside an expert, here the shared one",
            "SwiGLU(g, u) = SiLU(min(g, limit)) · clamp(u, ±limit)",
            (
                Way(Statement(clamped_swiglu, "return F.silu(gate.clamp("), inside),
                Way(Statement(clamped_swiglu, "return F.silu(gate) * up"), inside),
            ),
        ),
        operation(
            "The shared expert, which every token visits",
            "f_shared(x) = W_2( SwiGLU(W_1 x, W_3 x) )",
            Statement(SwiGLU.forward, "return self.w2(clamped_swiglu(", "ffn.shared_experts"),
            Look("shared", "return", "channels", last_row),
        ),
        operation(
            "The output of the MoE",
            "y = Σ_e w_e f_e(x) + f_shared(x)",
            Statement(MoE.forward, "return (self.experts("),
            Look("y", "return", "channels"),
        ),
    )


def engram(module: Engram) -> tuple[Operation, ...]:
    """Engram: the n-gram, its hash, rows, gates, the value they let through, the convolution where there is one."""
    hashing, forward, gates = NgramHash.__call__, Engram.forward, Engram.gates
    common = (
        operation(
            "The n-gram that ends here",
            "canonical ids of the last N tokens",
            Statement(hashing, "line = torch.cat(", "engram.hash"),
            Look("ids", "line", "tokens", _ngram, columns="window"),
            note="Token ids alone decide, so the rows can be fetched before the first layer runs.",
        ),
        operation(
            "Multiplied and mixed",
            "mix_n = x_t m_0 XOR x_{t-1} m_1 XOR … ; the longest n here",
            Statement(hashing, "mix = mix ^ (", "engram.hash"),
            Look("mix", "mix", ""),
        ),
        operation(
            "Rows of the table",
            "row = mix_n mod prime + offset, one prime for each order and head",
            Statement(hashing, "return torch.cat(per_order", "engram.hash"),
            Look("rows", "return", "orders and heads"),
        ),
        operation(
            "A key for each stream and one value",
            "[k_1 … k_M; v] = W_kv e,  e the fetched rows",
            Statement(forward, "kv = self.wkv(memory)"),
            Look("e", "memory", "rows, channels", _rows_by_width),
            Look("k and v", "kv", "keys and value, channels"),
        ),
        operation(
            "Does the memory fit the stream?",
            "s_m = ⟨RMSNorm(k_m), RMSNorm(X_m)⟩ / √C",
            Statement(gates, "s = (q * k).sum(-1)"),
            Look("s", "s", "streams"),
        ),
        operation(
            "A gate for each stream",
            "gate_m = σ( sign(s_m) √max(|s_m|, 1e-6) )",
            Statement(gates, "return torch.sigmoid("),
            Look("gate", "return", "streams"),
        ),
        operation(
            "What the gates let through",
            "V_m = gate_m v",
            Statement(forward, "value = gates.to(kv.dtype)"),
            Look("V", "value", "streams, channels"),
        ),
    )
    joined = Look("X'", "return.0", "streams, channels")
    if not module.kernel:
        plain = Statement(forward, "return streams + value, None")
        return (*common, operation("It joins the streams", "X'_m = X_m + V_m", plain, joined))
    return (
        *common,
        operation(
            "Normed for the convolution",
            "N = RMSNorm(V)",
            Statement(forward, "normed = (F.rms_norm(value"),
            Look("N", "normed", "streams, channels", _by_stream),
        ),
        operation(
            "A short convolution over earlier tokens",
            "DWConv(N): each channel, tokens spaced by the longest n-gram",
            Statement(forward, "mixed = sum(line["),
            Look("DWConv", "mixed", "streams, channels", _by_stream),
        ),
        operation(
            "Both join the streams",
            "X'_m = X_m + SiLU(DWConv(N))_m + V_m",
            Statement(forward, "return streams + F.silu(mixed)"),
            joined,
        ),
    )
