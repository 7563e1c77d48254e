"""The KV caches of different kinds of attention side by side: bytes held, and bytes one decoded token reads of them.

Measured on a live model, or modelled by the formulas of ``workbench.cost``; each record says which. (reference/deepseek-v4.md,
section 5)
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from workbench import cost
from workbench.errors import InputError
from workbench.presets import Preset, presets

if TYPE_CHECKING:
    from workbench.model.language_model import LanguageModel

# What the toys are there for -> the recipe they come from, and what is changed in its shape: nothing can ship for these.
TOYS: dict[str, tuple[str, dict[str, int]]] = {
    "MHA": ("tiny-gqa", {"num_key_value_heads": 4}),
    "GQA": ("tiny-gqa", {}),
    "MLA": ("tiny-mla-dsa", {"index_topk": 0}),
    "MLA + DSA": ("tiny-mla-dsa", {}),
    "CSA + HCA": ("tiny-v4", {}),
    "CSA2": ("tiny-v41", {}),
}


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Part -> bytes held by one sequence of ``tokens`` tokens, and of them read to decode the last; no totals in either."""

    name: str
    what: str  # "toy, trained", "toy, random weights", "published size"
    origin: str  # "measured on ..." or "modelled (formula)"
    tokens: int
    storage: str
    held: dict[str, int]
    read: dict[str, int]

    @property
    def held_bytes(self) -> int:
        return sum(self.held.values())

    @property
    def read_bytes(self) -> int:
        return sum(self.read.values())


def modelled_cache(model: cost.Model, tokens: int, storage: str = "released", name: str = "") -> CacheUse:
    """By formula, of a preset or a configuration. Raises InputError for a length or storage that cannot be."""
    held, read = cost.kv_bytes(model, tokens, storage), cost.decode_bytes(model, tokens, storage)
    preset = presets[model] if isinstance(model, str) else model
    title, what = (preset.title, "published size") if isinstance(preset, Preset) else ("this model", "a formula alone")
    del held["total"], read["total"]
    return CacheUse(name or title, what, "modelled (formula)", tokens, storage, held, read)


def measured_cache(model: LanguageModel, tokens: int = 512, storage: str = "fp32", name: str = "", seed: int = 0) -> CacheUse:
    """Feed ``tokens`` random tokens to a live model, the last one as a decode step, and count its cache.

    Bytes do not depend on which tokens they are. Where a candidate pool (V4.1) holds more than half of a stream, all keys are
    read at once instead of the pool's, so more than the formula says. Raises InputError for fewer than two tokens, or more than
    the model reads.
    """
    import torch

    from workbench.runtime import device_name, threads_for_run, use_threads

    limit = model.config.max_position_embeddings
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 2 <= tokens <= limit:
        raise InputError(f"a cache is measured at 2 to {limit} tokens, got {tokens!r}")
    use_threads(threads_for_run())
    line = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(seed)).to(model.device)
    cache = model.new_cache(storage=storage)
    with torch.inference_mode():
        model(line[:, :-1], cache, logits="last")
        cache.reset_bytes_read()
        model(line[:, -1:], cache, logits="last")
    origin = f"measured on {device_name(str(model.device))}"
    held, read = cache.nbytes_by_part(), cache.bytes_read_by_part()
    return CacheUse(name or model.name, model.what, origin, tokens, storage, held, read)


def toy_models(seed: int = 0) -> dict[str, LanguageModel]:
    """A toy for each kind of attention, of one width (CSA2 has a layer more): trained where one ships, else random weights.

    Each says which it is (``model.what``); bytes do not depend on it.
    """
    from workbench.checkpoint import load, shipped_names
    from workbench.model.families import model_class
    from workbench.training.recipes import RECIPES

    toys: dict[str, LanguageModel] = {}
    for kind, (name, changes) in TOYS.items():
        if name in shipped_names() and not changes:
            toys[kind] = load(name)
            continue
        config = RECIPES[name].config(RECIPES[name].vocab_size)
        if changes:
            config = replace(config, **changes)  # type: ignore[arg-type]
        toys[kind] = model_class(config).untrained(config, seed)
        toys[kind].name, toys[kind].what = f"{name} shape", "toy, random weights"
    return toys
