"""Feed-forward layers: a SwiGLU alone, and mixtures of experts with one shared expert.

V4's router takes sqrt-softplus scores, or a table in its hash-routed first layers, of which V4.1 has none; V3.2's sigmoid
scores, limited to groups.

Letters: N tokens (batch and time flattened), C model dim, E experts, K experts per token, I expert width.
(reference/deepseek-v4.md, section 7)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workbench.config import DeepSeekV4Config, LatentConfig
from workbench.model.layers import Tap

FEW_ASSIGNMENTS = 8  # of tokens to experts: up to here each is done by itself


def clamped_swiglu(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    """silu(min(gate, limit)) * clamp(up, -limit, limit): the gate is bounded from above only."""
    if limit == math.inf:
        return F.silu(gate) * up
    return F.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


class Gate(nn.Module):
    """Chooses K experts per token and weighs them.

    Score layers take the top K of s + bias, hash layers read the experts of a token id from a table; the weights
    always come from the scores without the bias: w_e = s_e / sum(s) * routed_scaling_factor.
    """

    tid2eid: Tensor
    bias: Tensor

    def __init__(self, config: DeepSeekV4Config, hashed: bool) -> None:
        super().__init__()
        experts, k = config.n_routed_experts, config.num_experts_per_tok
        self.k, self.scaling = k, config.routed_scaling_factor
        self.weight = nn.Parameter(torch.randn(experts, config.hidden_size) * config.hidden_size**-0.5)
        if hashed:
            # A fixed pseudo-random table until a checkpoint brings its own: k distinct experts per token id.
            table = torch.rand(config.vocab_size, experts, generator=torch.Generator().manual_seed(0)).argsort(1)[:, :k]
            self.register_buffer("tid2eid", table.contiguous())
        else:
            self.register_buffer("bias", torch.zeros(experts))
        self.hashed = hashed

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C], token ids [N] -> weights [N, K] and expert numbers [N, K]."""
        scores = F.softplus(F.linear(x.float(), self.weight.float())).sqrt()
        chosen = self.tid2eid[ids] if self.hashed else (scores + self.bias).topk(self.k, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling, chosen


class GroupedGate(nn.Module):
    """V3.2's router: the K best experts by s + bias among the best groups; a group counts for its two best experts.

    s = sigmoid(W x); the weights come from the scores without the bias: w_e = s_e / sum(s) * routed_scaling_factor.
    """

    bias: Tensor
    hashed = False

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.k, self.scaling = config.num_experts_per_tok, config.routed_scaling_factor
        self.groups, self.kept_groups = config.n_group, config.topk_group
        self.weight = nn.Parameter(torch.randn(config.n_routed_experts, config.hidden_size) * config.hidden_size**-0.5)
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))

    def forward(self, x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """x [N, C] -> weights [N, K] and expert numbers [N, K]; the token ids do not matter here."""
        scores = F.linear(x.float(), self.weight.float()).sigmoid()
        by_group = (scores + self.bias).unflatten(-1, (self.groups, -1))  # [N, G, E / G]
        best = by_group.topk(2, dim=-1).values.sum(-1).topk(self.kept_groups, dim=-1, sorted=False).indices
        left_out = torch.ones_like(by_group[..., 0], dtype=torch.bool).scatter(-1, best, False)
        chosen = by_group.masked_fill(left_out.unsqueeze(-1), -torch.inf).flatten(1).topk(self.k, sorted=False).indices
        weights = scores.gather(1, chosen)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.scaling, chosen


class Experts(nn.Module):
    """All routed experts, stacked: w13 [E, 2I, C] holds gate rows first, then up rows; w2 [E, C, I]."""

    def __init__(self, config: DeepSeekV4Config | LatentConfig) -> None:
        super().__init__()
        e, i, c = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.limit = config.swiglu_limit
        self.w13 = nn.Parameter(torch.empty(e, 2 * i, c).uniform_(-(c**-0.5), c**-0.5))
        self.w2 = nn.Parameter(torch.empty(e, c, i).uniform_(-(i**-0.5), i**-0.5))

    def forward(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """x [N, C] through the experts chosen [N, K], each weighed: [N, C]."""
        if chosen.numel() <= FEW_ASSIGNMENTS:
            return self._one_by_one(x, weights, chosen)
        order = chosen.flatten().argsort(stable=True)  # assignments grouped by expert
        visitors = x.index_select(0, order // chosen.shape[1])  # [N * K, C]; plain indexing is five times slower
        counts = torch.bincount(chosen.flatten(), minlength=self.w13.shape[0]).tolist()
        parts, first = [], 0
        for expert, count in enumerate(counts):
            if count:
                gate, up = F.linear(visitors[first : first + count], self.w13[expert]).chunk(2, dim=-1)
                parts.append(F.linear(clamped_swiglu(gate, up, self.limit), self.w2[expert]))
                first += count
        done = torch.cat(parts).index_select(0, order.argsort()).view(*chosen.shape, -1)  # back in the tokens' order, [N, K, C]
        return torch.matmul(weights.to(x.dtype).unsqueeze(1), done).squeeze(1)

    def _one_by_one(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """The same for a decoded token: grouping would cost more operations than the experts have."""
        share = weights.to(x.dtype).unsqueeze(-1)  # [N, K, 1]
        out = []
        for token, experts in enumerate(chosen.tolist()):
            gate, up = torch.stack([torch.mv(self.w13[e], x[token]) for e in experts]).chunk(2, dim=-1)  # [K, I]
            hidden = clamped_swiglu(gate, up, self.limit) * share[token]
            y = torch.mv(self.w2[experts[0]], hidden[0])
            for e, h in zip(experts[1:], hidden[1:], strict=True):
                y = torch.addmv(y, self.w2[e], h)
            out.append(y)
        return torch.stack(out)


class SwiGLU(nn.Module):
    """w2 (silu(w1 x) * w3 x), clamped where ``limit`` says: a dense layer, or the expert that every token visits."""

    def __init__(self, hidden: int, width: int, limit: float = math.inf) -> None:
        super().__init__()
        self.limit = limit
        self.w1 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(hidden, width, bias=False)
        self.w2 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(clamped_swiglu(self.w1(x), self.w3(x), self.limit))


class MoE(nn.Module):
    """Routed experts and the shared one, which every token visits with weight one."""

    def __init__(self, config: DeepSeekV4Config | LatentConfig, hashed: bool = False) -> None:
        super().__init__()
        self.gate = GroupedGate(config) if isinstance(config, LatentConfig) else Gate(config, hashed)
        self.experts = Experts(config)
        shared = config.moe_intermediate_size * config.n_shared_experts
        self.shared_experts = SwiGLU(config.hidden_size, shared, config.swiglu_limit)
        self.routing_tap = Tap()

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        """x [B, T, C], ids [B, T] -> [B, T, C]."""
        flat = x.flatten(0, 1)
        weights, chosen = self.routing_tap(self.gate(flat, ids.flatten()))
        return (self.experts(flat, weights, chosen) + self.shared_experts(flat)).view_as(x)
