"""Muon for matrices, AdamW for the rest, as V4 was trained; stacked expert matrices are orthogonalised one by one.

(reference/deepseek-v4.md, section 9)
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from workbench.model.engram import HostTable
from workbench.model.hyper_connections import HyperConnection, HyperHead
from workbench.model.language_model import LanguageModel
from workbench.training.recipes import Recipe

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_VECTORS = ("ape", "conv", "q_weight", "k_weight", "conv_norm")  # two-dimensional, but no matrices that map anything


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz towards the nearest semi-orthogonal matrix, for [..., rows, columns]."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum with Nesterov, then an orthogonalised update scaled to the RMS an Adam step would have."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[no-untyped-def]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = orthogonalise(p.grad.lerp(momentum, group["momentum"]))
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape[-2:]) ** 0.5)


def optimisers(model: LanguageModel, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Matrices of attention, experts and projections to Muon; embeddings, head, norms, mHC, gates and biases to AdamW."""
    matrices, tables, rest = [], [], []
    for module in model.modules():
        adam_only = isinstance(module, (nn.Embedding, HyperConnection, HyperHead)) or module is model.head
        for name, p in module.named_parameters(recurse=False):
            if isinstance(module, HostTable):
                tables.append(p)
            elif adam_only or p.dim() < 2 or name in _VECTORS:
                rest.append(p)
            else:
                matrices.append(p)
    adam = [{"params": rest, "lr": recipe.adam_lr, "weight_decay": 0.01}]
    if tables:
        adam.append({"params": tables, "lr": recipe.table_lr, "weight_decay": 0.0})
    return [
        Muon(matrices, lr=recipe.muon_lr, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(adam, betas=(0.9, 0.95)),
    ]
