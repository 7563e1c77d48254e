"""How mHC mixes its residual streams, recorded from a live model, and what unconstrained matrices would do in their place.

A sublayer's mixing matrix A [M, M] turns streams X into X'_k = sum_j A[j, k] X_j. Through depth that is the product
G = A_P^T ... A_1^T: what becomes of the streams if sublayers write nothing. Its gain bounds how far a signal can grow:

    forward: largest row sum of |G|        backward: largest column sum of |G|        energy: largest singular value of G

Letters: P sublayers, T tokens, M streams. (reference/deepseek-v4.md, section 8; reference/tiny-model.md, section 7)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.model.language_model import LanguageModel

Measure = Literal["energy", "forward", "backward"]
MEASURES: dict[Measure, str] = {
    "energy": "largest singular value",
    "forward": "largest row sum, of what goes forward",
    "backward": "largest column sum, of gradients going back",
}
MHC, SOFTMAX, SIGNS, EXP = (
    "mHC, the live matrices",
    "row softmax alone, no Sinkhorn",
    "as far from the identity, signs at random",
    "exp of the same logits, not normalised",
)
ITERATION_STEPS = 20  # as released
LOSS_WINDOWS, LOSS_TOKENS = 8, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixing:
    """Of each sublayer and token: ``logits`` [P, T, M, M] float64 and the live model's ``mix`` made of them, alike.

    ``names`` of the sublayers in their order, ``token_texts`` of the tokens; ``iterations`` and ``eps`` are the model's.
    """

    logits: np.ndarray
    mix: np.ndarray
    names: tuple[str, ...]
    token_texts: tuple[str, ...]
    iterations: int
    eps: float
    label: str

    @property
    def streams(self) -> int:
        return int(self.mix.shape[-1])

    def balanced(self, iterations: int) -> np.ndarray:
        """What ``mix`` would be after another number of Sinkhorn iterations."""
        return balance(self.logits, iterations, self.eps)


def record_mixing(model: LanguageModel, prompt: str | Sequence[int]) -> Mixing:
    """Run ``model`` on a prompt, text or token ids, and keep the mixing matrices of all its sublayers and their logits.

    Matrices come from the model's own taps; logits are recomputed from the streams that went in, and the matrices they give
    are held against the live ones. InputError for a model without such streams and for a prompt it cannot read.
    """
    import torch
    import torch.nn.functional as F

    from workbench.live import encode, token_texts
    from workbench.model.layers import rms_scale
    from workbench.runtime import device_name, threads_for_run, use_threads

    wrapped: list[Any] = [getattr(block, name, None) for block in model.blocks for name in ("hc_attn", "hc_ffn")]
    if None in wrapped:
        raise InputError(f"{model.name} has one residual stream; choose tiny-v4, whose sublayers mix several")
    ids = encode(model, prompt)
    streams: list[Any] = []
    mixes: list[Any] = []
    hooks: list[Any] = []
    for hc in wrapped:
        hooks.append(hc.register_forward_pre_hook(lambda _module, inputs: streams.append(inputs[0][0])))
        hooks.append(hc.mix_tap.register_forward_hook(lambda _module, _inputs, mix: mixes.append(mix[0])))
    use_threads(threads_for_run())
    try:
        with torch.inference_mode():
            model(torch.tensor([ids], device=model.device), logits="last")
    finally:
        for hook in hooks:
            hook.remove()
    if len(streams) != len(wrapped) or len(mixes) != len(wrapped):
        raise InputError(f"{model.name} reads its streams in another order than DeepSeek-V4; choose tiny-v4")
    logits = []
    with torch.inference_mode():
        for hc, x in zip(wrapped, streams, strict=True):
            flat = x.flatten(1).float()
            z = F.linear(flat, hc.fn.float()) * rms_scale(flat, hc.rms_eps)
            z = torch.addcmul(hc.base, z, hc.scale.index_select(0, hc.parts))
            logits.append(z[:, 2 * hc.streams :].unflatten(1, (hc.streams, hc.streams)))
    first = wrapped[0]
    found = Mixing(
        logits=torch.stack(logits).double().cpu().numpy(),
        mix=torch.stack(mixes).double().cpu().numpy(),
        names=tuple(f"layer {layer} {part}" for layer in range(len(model.blocks)) for part in ("attention", "MoE")),
        token_texts=token_texts(model, ids),
        iterations=first.iterations,
        eps=first.eps,
        label=f"{model.name} ({model.what}), measured on {device_name(str(model.device))}",
    )
    gap = float(np.abs(found.balanced(found.iterations) - found.mix).max())
    if gap > 1e-4:  # rounding alone leaves far less
        raise InputError(f"the recomputed matrices of {model.name} differ from the live ones by {gap:.1e}")
    return found


def balance(logits: np.ndarray, iterations: int, eps: float = 1e-6) -> np.ndarray:
    """Sinkhorn-Knopp as released, [..., M, M]: row softmax + eps, then column steps with a row step before all but the first.

    0 iterations are the row softmax alone. InputError for fewer.
    """
    if iterations < 0:
        raise InputError(f"iterations must be 0 or more, got {iterations}")
    raised = np.exp(logits - logits.max(-1, keepdims=True))
    a = raised / raised.sum(-1, keepdims=True) + eps
    for done in range(iterations):
        if done:
            a = a / (a.sum(-1, keepdims=True) + eps)
        a = a / (a.sum(-2, keepdims=True) + eps)
    return a


def sum_errors(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far row sums and column sums miss one, [..., M] each."""
    return np.abs(matrices.sum(-1) - 1), np.abs(matrices.sum(-2) - 1)


def compared(mixing: Mixing, seed: int = 0) -> dict[str, np.ndarray]:
    """The live matrices and three others in their place, name -> [P, T, M, M].

    "row softmax" is where Sinkhorn begins; "exp" the same logits without any normalisation; "signs": I + S (A - I), every
    entry's departure from the identity as large as in the live matrix A, with signs S drawn at random, so nothing holds sums.
    """
    identity = np.eye(mixing.streams)
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), mixing.mix.shape)
    return {
        MHC: mixing.mix,
        SOFTMAX: mixing.balanced(0),
        SIGNS: identity + signs * (mixing.mix - identity),
        EXP: np.exp(mixing.logits),
    }


def stacked(matrices: np.ndarray, depth: int, paths: int = 64, seed: int = 0) -> np.ndarray:
    """A deeper stack, [depth, paths, M, M]: each path draws its matrices at random from all recorded ones. Modelled."""
    if depth < 1 or paths < 1:
        raise InputError(f"depth and paths must be 1 or more, got {depth} and {paths}")
    flat = matrices.reshape(-1, *matrices.shape[-2:])
    return flat[np.random.default_rng(seed).integers(len(flat), size=(depth, paths))]


def gains(matrices: np.ndarray, measure: Measure = "energy") -> np.ndarray:
    """The gain of the product up to and including each sublayer, [P, T], for matrices [P, T, M, M]."""
    if measure not in MEASURES:
        raise InputError(f"measure must be one of {tuple(MEASURES)}, got {measure!r}")
    product, found = np.broadcast_to(np.eye(matrices.shape[-1]), matrices.shape[1:]), []
    for a in matrices:
        product = a.swapaxes(-1, -2) @ product
        if measure == "energy":
            found.append(np.linalg.norm(product, 2, axis=(-2, -1)))
        else:
            found.append(np.abs(product).sum(-1 if measure == "forward" else -2).max(-1))
    return np.stack(found)


@contextmanager
def sinkhorn_iterations(model: LanguageModel, iterations: int) -> Iterator[None]:
    """Run ``model`` with another number of Sinkhorn iterations inside the block, 1 at least."""
    if iterations < 1:
        raise InputError(f"a model runs 1 or more iterations, got {iterations}")
    wrapped = [getattr(block, name) for block in model.blocks for name in ("hc_attn", "hc_ffn")]
    before = [hc.iterations for hc in wrapped]
    try:
        for hc in wrapped:
            hc.iterations = iterations
        yield
    finally:
        for hc, kept in zip(wrapped, before, strict=True):
            hc.iterations = kept


def loss_by_iterations(model: LanguageModel, iterations: Sequence[int]) -> dict[int, float]:
    """Held-out loss, nats per token, with each number of Sinkhorn iterations; measured on a few windows of text."""
    from workbench.runtime import threads_for_run, use_threads
    from workbench.training import tasks
    from workbench.training.score import text_loss

    if model.tokenizer is None:
        raise InputError("this model has no tokenizer, so there is no text to read; load a shipped model")
    use_threads(threads_for_run())
    text = np.asarray(model.tokenizer.encode(tasks.heldout_sample()).ids)
    found = {}
    for number in iterations:
        with sinkhorn_iterations(model, number):
            found[number] = text_loss(model, text, LOSS_WINDOWS, LOSS_TOKENS)
    return found
