"""Listening to a live ``transformers`` model: its own attention, through forward hooks, into the recorder of ours.

Nothing of ``transformers`` is imported here: the model that is given brings it along. What its attention modules return and
what their indexers see is turned into the records that our own models hand to their taps, and kept the same way.
Letters: B batch, T new tokens, H heads, W window, K kept entries, S entries, N keys.
"""

from __future__ import annotations

import inspect
import json
import sys
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from workbench.config import read_config
from workbench.decoded import NOTE, SpelledCharacters
from workbench.errors import InputError, WorkbenchError
from workbench.model.attention.hybrid import Attention
from workbench.model.indexer import IndexQueries, Selection, score_chunk
from workbench.recorder import PENDING_STEPS, Column, LayerRecord
from workbench.runtime import device_name
from workbench.trace import Timeline, Trace

GUESSES = 5
SCORED_QUERIES = 256  # at a time; V3.2's indexer scores every token for each of them
WHAT = "attached, run by transformers"
V4_KINDS = {"sliding_attention": "window", "compressed_sparse_attention": "csa", "heavily_compressed_attention": "hca"}
KNOWN = "DeepseekV4ForCausalLM, DeepseekV32ForCausalLM and dense models with attention like Llama's or Qwen's"


def attach(model: Any, tokenizer: Any = None) -> Attachment:
    """Use as a context around the calls of a ``transformers`` model (``model(ids)`` or ``model.generate(ids)``):

        with wb.attach(model, tokenizer) as seen:
            model.generate(ids, max_new_tokens=8)
        wb.AttentionExplorer(seen.trace)

    Kept is the last sequence read, of a batch its first row, unpadded. ``tokenizer`` shows the tokens' texts. The hooks go when
    the block ends, also after an error. Raises InputError for a model that is not known, or one whose attention runs in a
    fused kernel (sdpa, flash, flex), which never makes the probabilities: it says how to load it with them.
    """
    return Attachment(model, tokenizer)


class Attachment:
    """What ``attach`` gives: ``trace`` holds all that was recorded up to the last finished call."""

    def __init__(self, model: Any, tokenizer: Any = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.modules = _attention_modules(model)
        if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
            raise InputError(f"a tokenizer has decode(ids), such as transformers.AutoTokenizer's; got {tokenizer!r:.60}")
        used = str(getattr(model.config, "_attn_implementation", None) or "eager")
        if used != "eager":
            raise InputError(
                f"attention runs as {used!r}, a fused kernel that never makes the probabilities; load the model with "
                'attn_implementation="eager", or call model.set_attn_implementation("eager"), and attach again'
            )
        self._hooks: list[Any] = []
        self._thread = 0
        self._restart()

    def _restart(self) -> None:
        """Forget what was recorded: another sequence begins."""
        self.layers = [_Layer(i, module) for i, module in enumerate(self.modules)]
        self.ids, self.starts = Column(np.int32), Column(np.int32)
        self.length, self.prompt_length, self.calls = 0, 0, 0
        self.guesses: list[tuple[np.ndarray, np.ndarray]] = []
        self._new: np.ndarray | None = None  # the tokens of a call under way
        self._last_key: Tensor | None = None  # what the cache held last for the first row, None where it does not say

    def __enter__(self) -> Attachment:
        if self._hooks:
            raise InputError("already attached; leave the first block before entering another")
        if any(m.training and float(getattr(m, "attention_dropout", 0.0) or 0.0) > 0 for m in self.modules):
            raise InputError("the model is in training mode and drops attention at random; call model.eval() and attach again")
        self._thread = threading.get_ident()
        self._names = tuple(inspect.signature(self.model.forward).parameters)
        try:
            self._hook(self.model.register_forward_pre_hook, self._on_call)
            self._hook(self.model.register_forward_hook, self._on_answer)
            for i, module in enumerate(self.modules):
                for name, part in _listened(module):
                    self._hook(part.register_forward_hook, self._on_part(i, name))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _hook(self, register: Any, callback: Any) -> None:
        def only_mine(*arguments: Any) -> None:
            if threading.get_ident() == self._thread:
                with torch.no_grad():
                    callback(*arguments)

        self._hooks.append(register(only_mine, with_kwargs=True))

    def _on_call(self, _module: Any, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(zip(self._names, args, strict=False)) | named
        ids: Any = named.get("input_ids")
        embeds: Any = named.get("inputs_embeds")
        if ids is None and embeds is None:
            return  # the model's own error is the clearer one
        mask, past = named.get("attention_mask"), named.get("past_key_values")
        if isinstance(mask, Tensor) and mask.dim() == 2 and not mask[0].all():
            raise InputError(
                "the first row of the batch is padded, or holds the pad token, which generate takes for padding; give it "
                "alone, with an attention_mask of ones, while attached"
            )
        cached = int(past.get_seq_length()) if past is not None else 0
        if isinstance(mask, Tensor) and mask.dim() == 4:  # [B, 1, T, S], made by the caller: True or 0 where something is seen
            seen = mask[0] if mask.dtype == torch.bool else mask[0] == 0
            if seen.triu(cached + 1).any():
                raise InputError(
                    "the attention_mask lets tokens see later ones, which a recording has no place for; leave it out, or hide "
                    "all tokens after each one, while attached"
                )
        if cached == 0:
            self._restart()
        elif cached != self.length or self._new is not None:
            raise WorkbenchError(
                f"the cache holds {cached} tokens and {self.length} were recorded; attach before the prompt is read, "
                "and begin again after a call that failed"
            )
        elif self._last_key is not None and not _same(self._last_key, _newest_key(past)):
            raise WorkbenchError(
                "the first row's past is no longer what was recorded: a beam search exchanges rows; generate without beams "
                "(num_beams=1) while attached"
            )
        self._new = ids[0].cpu().numpy() if ids is not None else np.full(embeds.shape[1], -1)

    def _on_part(self, i: int, name: str) -> Any:
        def note(_module: Any, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
            if self._new is not None:
                getattr(self.layers[i], f"on_{name}")(args, named, output, self.length, len(self._new))

        return note

    def _on_answer(self, _module: Any, _args: Any, _named: Any, output: Any) -> None:
        if self._new is None:
            return
        tokens = len(self._new)
        self.starts.append(np.array([self.length]))
        self.ids.append(self._new)
        self.calls += 1
        self.length += tokens
        if tokens > 1 or self.calls == 1:
            self.prompt_length = self.length
        self._last_key = _newest_key(getattr(output, "past_key_values", None))
        logits = getattr(output, "logits", None)
        if isinstance(logits, Tensor):
            probs, best = torch.softmax(logits[0, -1].float(), -1).topk(min(GUESSES, logits.shape[-1]))
            self.guesses.append((best.cpu().numpy(), probs.cpu().numpy()))
        for layer in self.layers:
            if tokens > 1 or self.calls % PENDING_STEPS == 0:
                layer.record.flush()
            layer.record.settle(self.length)
        self._new = None

    @property
    def trace(self) -> Trace:
        if not self.length:
            raise WorkbenchError("nothing was recorded yet; call the model inside the with block")
        ids, starts = self.ids.rows(), self.starts.rows()
        following = [int(ids[start]) for start in starts[1:].tolist()] + [-1]
        guesses = self.guesses if len(self.guesses) == self.calls else []
        width = len(guesses[0][0]) if guesses else GUESSES
        config = self.model.config
        device = device_name(str(self.model.device))
        texts = tuple(self._text(i) for i in ids.tolist())
        spelled = SpelledCharacters(self.tokenizer.decode if self.tokenizer is not None else str)
        spelled.update(ids.tolist(), texts)
        return Trace(
            model=str(getattr(config, "_name_or_path", "") or type(self.model).__name__).rstrip("/").split("/")[-1],
            what=WHAT,
            device=device,
            config=_plain_config(config),
            token_ids=ids.copy(),
            token_texts=texts,
            prompt_length=self.prompt_length,
            layers=tuple(layer.record.snapshot(self.length) for layer in self.layers),
            timeline=Timeline("measured", (), device),
            step_starts=starts.copy(),
            top_ids=np.array([g[0] for g in guesses], np.int32).reshape(-1, width),
            top_probs=np.array([g[1] for g in guesses], np.float32).reshape(-1, width),
            next_ids=np.array(following, np.int32),
            notes={"attached": type(self.model).__name__} | ({NOTE: spelled.found} if spelled.found else {}),
        )

    def _text(self, token: int) -> str:
        return f"[{token}]" if self.tokenizer is None or token < 0 else str(self.tokenizer.decode([token]))


def _newest_key(past: Any) -> Tensor | None:
    """A copy of the first row's newest key in the last layer of a cache, which the whole text so far went into."""
    layers = getattr(past, "layers", None)
    keys = getattr(layers[-1], "keys", None) if layers else None
    return keys[0, :, -1].detach().clone().cpu() if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[2] else None


def _same(one: Tensor, other: Tensor | None) -> bool:
    return other is None or one.shape != other.shape or torch.equal(one, other)


def _attention_modules(model: Any) -> list[Any]:
    found: list[Any] = []
    if isinstance(model, torch.nn.Module) and hasattr(model, "config"):
        modules: list[Any] = [m for m in model.modules() if type(m).__name__.endswith("Attention") and hasattr(m, "layer_idx")]
        found = sorted(modules, key=lambda m: int(m.layer_idx))
    known = [m for m in found if hasattr(m, "compressor") or hasattr(m, "indexer") or hasattr(m, "num_key_value_groups")]
    if not found or len(known) != len(found) or [int(m.layer_idx) for m in found] != list(range(len(found))):
        name = type(found[0]).__name__ if found else "no attention layers"
        raise InputError(f"attach knows {KNOWN}; {type(model).__name__} has {name}")
    return found


def _listened(module: Any) -> list[tuple[str, Any]]:
    """The parts of an attention module that are listened to, inner ones first: they run before it ends."""
    parts = []
    compressor = getattr(module, "compressor", None)
    indexer = getattr(compressor, "indexer", None) or getattr(module, "indexer", None)
    if compressor is not None and indexer is not None:
        parts += [("weights", indexer.scorer.weights_proj), ("scorer", indexer.scorer), ("indexer", indexer)]
    elif indexer is not None:
        parts.append(("token_indexer", indexer))
    if compressor is not None:
        parts.append(("compressor", compressor))
    return [*parts, ("attention", module)]


def _plain_config(config: Any) -> dict[str, Any]:
    """As a trace keeps it: read as one of our families where it is one, so that formulas know it."""
    plain: dict[str, Any] = json.loads(json.dumps(config.to_dict(), default=str))
    try:
        return dict(read_config(plain).to_dict())
    except InputError:
        return plain


class _Keys:
    """Index keys so far, [B, S, D], read like those of our caches."""

    def __init__(self, keys: Tensor) -> None:
        self.keys = keys

    def read(self, start: int, stop: int) -> Tensor:
        return self.keys[:, start:stop]


class _Layer:
    """One attention module: what its parts handed over in the call under way, and the record they become."""

    def __init__(self, number: int, module: Any) -> None:
        self.module = module
        self.window = 0
        if hasattr(module, "compressor"):  # V4
            kind = V4_KINDS[module.layer_type]
            rates = module.config.compress_rates
            ratio = 0 if kind == "window" else int(rates[module.layer_type])
            self.window = int(module.sliding_window)
        elif hasattr(module, "indexer"):
            kind, ratio = "mla-dsa", 1
        elif _sliding_window(module):
            kind, ratio, self.window = "window", 0, _sliding_window(module)
        else:
            mla = hasattr(module, "kv_a_proj_with_mqa")
            kind, ratio = "mla" if mla else "mha" if module.num_key_value_groups == 1 else "gqa", 1
        self.record = LayerRecord(number, kind, ratio)
        self.compressed = 0  # entries behind the window's keys in this call
        self.weights: Tensor | None = None
        self.scores: Tensor | None = None  # [1, T, S], -inf in the future
        self.chosen: Tensor | None = None  # [1, T, K], -1 where none is left

    def on_weights(self, _args: Any, _named: Any, output: Tensor, _start: int, _tokens: int) -> None:
        self.weights = output[:1].float()

    def on_scorer(self, args: Any, _named: Any, output: Tensor, start: int, _tokens: int) -> None:
        """I = sum_h w relu(q . k), with both of the module's scales folded into w."""
        scorer, (q, keys) = self.module.compressor.indexer.scorer, args[:2]
        assert self.weights is not None
        self._note_index(q[:1], self.weights * (scorer.softmax_scale * scorer.weights_scaling), keys[:1])
        self.scores = self._masked(output[:1].float(), start)

    def on_indexer(self, _args: Any, _named: Any, output: Tensor, _start: int, _tokens: int) -> None:
        self.chosen = output[:1].long()

    def on_compressor(self, _args: Any, _named: Any, output: Any, _start: int, _tokens: int) -> None:
        self.compressed = int(output[0].shape[2])

    def on_token_indexer(self, args: Any, named: Any, output: Tensor, start: int, tokens: int) -> None:
        """V3.2: queries and keys are turned inside the indexer, so they are made once more from what went into it."""
        indexer = self.module.indexer
        given = dict(zip(("hidden_states", "q_resid", "position_embeddings"), args, strict=False)) | named
        hidden, (cos, sin) = given["hidden_states"][:1], given["position_embeddings"]
        turn, rotary = vars(sys.modules[type(indexer).__module__])["apply_rotary_pos_emb"], indexer.qk_rope_head_dim
        q = indexer.wq_b(given["q_resid"][:1]).unflatten(-1, (indexer.n_heads, indexer.head_dim))
        k = indexer.k_norm(indexer.wk(hidden)).unsqueeze(2)
        q_turned, k_turned = turn(q[..., :rotary], k[..., :rotary], cos[:1], sin[:1], unsqueeze_dim=2)
        q = torch.cat([q_turned, q[..., rotary:]], -1).float()
        k = torch.cat([k_turned, k[..., rotary:]], -1).squeeze(2).float()
        w = indexer.weights_proj(hidden).float() * (indexer.n_heads**-0.5 * indexer.softmax_scale)
        before = self.record.index_keys.read(0, start) if start and self.record.index_keys is not None else k[:, :0]
        keys = torch.cat([before, k], 1)
        self._note_index(q, w, keys)
        parts = zip(q.split(SCORED_QUERIES, 1), w.split(SCORED_QUERIES, 1), strict=True)
        self.scores = self._masked(torch.cat([score_chunk(a, b, keys) for a, b in parts], 1), start)
        chosen = output[:1].long()
        position = torch.arange(start, start + tokens, device=chosen.device).view(1, -1, 1)
        self.chosen = chosen.masked_fill(chosen > position, -1)  # where fewer are visible it fills up with the future

    def _note_index(self, q: Tensor, w: Tensor, keys: Tensor) -> None:
        kept = _Keys(keys.detach())
        self.record.index_keys = kept  # type: ignore[assignment]  # only ``read`` is asked of it
        self.record.pending.append(IndexQueries(q.float(), w, kept))  # type: ignore[arg-type]

    def _masked(self, scores: Tensor, start: int) -> Tensor:
        t = torch.arange(start, start + scores.shape[1], device=scores.device)
        closed = (t + 1) // self.record.ratio
        return scores.masked_fill(torch.arange(scores.shape[2], device=scores.device) >= closed.view(-1, 1), -torch.inf)

    def on_attention(self, _args: Any, _named: Any, output: Any, start: int, tokens: int) -> None:
        weights = output[1]
        if weights is None:
            raise WorkbenchError(
                f"layer {self.record.layer} returned no probabilities; "
                'load the model with attn_implementation="eager" and attach again'
            )
        probs = weights[:1].detach().float().transpose(1, 2)  # [1, T, H, N]
        sink = (1.0 - probs.sum(-1)).clamp_min(0.0) if hasattr(self.module, "sinks") else probs.new_zeros(probs.shape[:3])
        keys = probs.shape[-1] - self.compressed
        window = _window(probs[..., :keys], start, self.window)
        entries = probs[..., keys:] if self.window else probs[..., : start + tokens]
        selection, runner_up = self._selection()
        if selection is not None:
            at = selection.entries.clamp_min(0).unsqueeze(2).expand(-1, -1, probs.shape[2], -1)
            entries = entries.gather(-1, at).masked_fill(selection.entries.unsqueeze(2) < 0, 0.0)
        elif self.record.kind == "csa":
            entries = entries[..., :0]
        self.record.note(Attention(start, window, sink, entries, selection, runner_up))
        self.compressed, self.weights, self.scores, self.chosen = 0, None, None, None

    def _selection(self) -> tuple[Selection | None, Selection | None]:
        if self.chosen is None or self.scores is None or not self.chosen.shape[-1]:
            return None, None
        missing = self.chosen < 0
        scores = self.scores.gather(-1, self.chosen.clamp_min(0)).masked_fill(missing, -torch.inf)
        padded = torch.nn.functional.pad(self.scores, (0, 1), value=-torch.inf)  # one place more for those that are missing
        left = padded.scatter(-1, self.chosen.masked_fill(missing, self.scores.shape[-1]), -torch.inf)
        best, entry = left.max(-1, keepdim=True)
        runner_up = Selection(best, entry.masked_fill(best == -torch.inf, -1))
        return Selection(scores, self.chosen), runner_up


def _sliding_window(module: Any) -> int:
    """How far back a dense layer sees, 0 without a limit: by its own attribute (Qwen), or its configuration's (Mistral)."""
    config = module.config
    if hasattr(module, "sliding_window"):
        return int(module.sliding_window or 0)
    kinds = getattr(config, "layer_types", None)
    limited = kinds[module.layer_idx] == "sliding_attention" if kinds else getattr(config, "use_sliding_window", True)
    return int(getattr(config, "sliding_window", None) or 0) if limited else 0


def _window(probs: Tensor, start: int, window: int) -> Tensor:
    """[1, T, H, N] over the last N positions -> [1, T, H, W]: column w is the key W - 1 - w tokens back, 0 before token 0."""
    tokens, keys = probs.shape[1], probs.shape[3]
    if not window:
        return probs[..., :0]
    t = torch.arange(tokens, device=probs.device).view(-1, 1)
    back = torch.arange(window - 1, -1, -1, device=probs.device)
    place = keys - tokens + t - back  # [T, W]; the last key is the newest token
    seen = (place >= 0) & (start + t - back >= 0)
    at = place.clamp_min(0).view(1, tokens, 1, window).expand(-1, -1, probs.shape[2], -1)
    return probs.gather(-1, at).masked_fill(~seen.view(1, tokens, 1, window), 0.0)
