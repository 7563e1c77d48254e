"""What FP8 and FP4 cost, on live tensors: rows of a cache as stored and as read back, and entries chosen by rounded keys.

Letters: S rows, D channels, T queries, K kept entries. (reference/deepseek-v4.md, sections 2.1, 2.2 and 5)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from workbench.errors import InputError

if TYPE_CHECKING:
    from workbench.model.language_model import LanguageModel

FORMATS = {"fp8": "FP8 E4M3", "fp4": "FP4 E2M1", "bf16": "BF16"}
ROTATED = "index keys"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredRows:
    """Rows of one part of one layer's cache. ``values`` [S, D] went in, ``stored`` came back, alike float64.

    The first ``coded`` channels are ``codes`` ("fp8" or "fp4") with a scale each ``block`` of them, ``scales`` [S, blocks]; the
    rest is BF16. ``levels``: what one code can mean, times the scale. ``nbytes``: what of a row's bytes is what. ``rotated``
    rows were multiplied by a Hadamard matrix before; ``unrotated`` is what they would have come back as without that.
    """

    name: str
    layer: int
    codes: str
    block: int
    coded: int
    values: np.ndarray
    stored: np.ndarray
    scales: np.ndarray
    levels: np.ndarray
    nbytes: dict[str, int]
    label: str
    rotated: bool = False
    unrotated_error: float | None = None

    @property
    def relative_error(self) -> float:
        """Root mean square of the error over that of the values, coded channels of all rows together."""
        return relative_error(self.values[:, : self.coded], self.stored[:, : self.coded])


def relative_error(values: np.ndarray, stored: np.ndarray) -> float:
    return float(np.sqrt(((stored - values) ** 2).sum() / (values**2).sum()))


def stored_rows(model: LanguageModel, prompt: str | Sequence[int]) -> tuple[StoredRows, StoredRows]:
    """Compressed entries and index keys of the model's first CSA layer after reading a prompt, through its release's formats.

    The rows are live, kept in float32; then each is packed and unpacked as a released cache does it. InputError for a model
    without CSA layers, and for a prompt too short to close a block.
    """
    import torch

    from workbench.live import encode
    from workbench.model.formats import PackedFormat, RotatedFormat, hadamard, row_formats
    from workbench.runtime import device_name, threads_for_run, use_threads

    layer = _first_csa(model)
    cache, ids = model.new_cache(storage="fp32"), encode(model, prompt)
    use_threads(threads_for_run())
    with torch.inference_mode():
        model(torch.tensor([ids], device=model.device), cache, logits="last")
    formats = row_formats(model.config, "released")
    label = f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"
    found = []
    for name, part in (("compressed entries", "compressed"), (ROTATED, "index")):
        rows = getattr(cache.layers[layer], part).read()[0]
        if not len(rows):
            raise InputError(f"{len(ids)} tokens close no block of {model.config.compress_ratios[layer]}; give a longer prompt")
        form: Any = formats[part]
        packed: PackedFormat = form.packed if isinstance(form, RotatedFormat) else form
        values = hadamard(rows) if isinstance(form, RotatedFormat) else rows
        stored = form.encode(rows)
        plain = packed.decode(packed.encode(rows)) if isinstance(form, RotatedFormat) else None
        padding = packed.stored_width - packed.code_bytes - packed.scale_bytes - 2 * packed.bf16_width
        parts = {"codes": packed.code_bytes, "scales": packed.scale_bytes, "BF16": 2 * packed.bf16_width, "padding": padding}
        found.append(
            StoredRows(
                name=name,
                layer=layer,
                codes=packed.codes,
                block=packed.block,
                coded=packed.coded,
                values=_plain(values),
                stored=_plain(form.decode(stored)),
                scales=_plain(packed.scales_of(stored)),
                levels=_levels(packed.codes),
                nbytes={what: nbytes for what, nbytes in parts.items() if nbytes},
                label=label,
                rotated=isinstance(form, RotatedFormat),
                unrotated_error=None if plain is None else relative_error(_plain(rows), _plain(plain)),
            )
        )
    return found[0], found[1]


def _plain(tensor: Any) -> np.ndarray:
    return tensor.double().cpu().numpy()


def _levels(codes: str) -> np.ndarray:
    """Every value a code of this format can have, ascending, without infinities and NaN."""
    import torch

    from workbench.model.quant import E2M1_MAGNITUDES

    if codes == "fp4":
        magnitudes = np.array(E2M1_MAGNITUDES)
    else:
        values = torch.arange(128, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
        magnitudes = values[np.isfinite(values)]
    return np.unique(np.concatenate([-magnitudes, magnitudes]))


def _first_csa(model: LanguageModel) -> int:
    kinds = model.config.layer_kinds
    if "csa" not in kinds:
        raise InputError(f"{model.name} has no CSA layers, whose rows are shown here; choose tiny-v4")
    return int(kinds.index("csa"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Selections:
    """Entries each CSA layer keeps for each query, best first, -1 where none: with exact index keys and with rounded ones.

    ``exact`` and ``rounded``: layer -> [T, K]; ``attention``: layer -> [T, K], what the heads gave the exact ones, on average.
    ``choosing`` [T] is where more entries are visible than are kept, so that
    something is left out. Layers after the first also see streams that its other choices have changed.
    """

    exact: dict[int, np.ndarray]
    rounded: dict[int, np.ndarray]
    attention: dict[int, np.ndarray]
    choosing: np.ndarray
    label: str

    @property
    def topk(self) -> int:
        return int(next(iter(self.exact.values())).shape[1])

    def still_kept(self, layer: int) -> np.ndarray:
        """[choosing queries, K]: whether the entry of each rank, by exact keys, is still among those kept."""
        exact, rounded = self.exact[layer][self.choosing], self.rounded[layer][self.choosing]
        return (exact[:, :, None] == rounded[:, None, :]).any(-1)

    def share_by_rank(self, layer: int) -> np.ndarray:
        """[K]: in how many of the choosing queries the entry of each rank is still kept."""
        return self.still_kept(layer).mean(axis=0)

    def share(self, layer: int) -> float:
        """Of all kept entries, those that rounding leaves."""
        return float(self.still_kept(layer).mean())

    def attention_on_entries(self, layer: int) -> float:
        """Of all attention, what entries receive; the rest goes to the window and the sink."""
        return float(self.attention[layer][self.choosing].sum(axis=1).mean())

    def attention_lost(self, layer: int) -> float:
        """Of the attention that the exact choice received, the share of those entries that rounding drops."""
        given = self.attention[layer][self.choosing]
        return float((given * ~self.still_kept(layer)).sum() / given.sum())

    def same(self, layer: int) -> float:
        """Of all choosing queries, those that keep the same entries, in whatever order."""
        return float(self.still_kept(layer).all(axis=1).mean())


def rounded_selections(model: LanguageModel, prompt: str | Sequence[int]) -> Selections:
    """What the indexers choose when only index keys, and the queries that meet them, are stored as released: FP4 in V4.

    Everything else of the cache stays float32. InputError for a model without CSA layers and a prompt too short to choose.
    """
    import torch

    from workbench.live import encode
    from workbench.recorder import selecting_attention
    from workbench.runtime import device_name, threads_for_run, use_threads

    first, ids = _first_csa(model), encode(model, prompt)
    topk, ratio = model.config.index_topk, model.config.compress_ratios[first]
    choosing = (np.arange(len(ids)) + 1) // ratio > topk
    if not choosing.any():
        raise InputError(f"{len(ids)} tokens leave nothing to choose: more than {topk * ratio} are needed")
    use_threads(threads_for_run())
    found = []
    for storage in ("fp32", "released"):
        cache, donor = model.new_cache(storage="fp32"), model.new_cache(storage=storage)
        for layer, other in zip(cache.layers, donor.layers, strict=True):
            layer.index = other.index
        with selecting_attention(model) as seen, torch.inference_mode():
            model(torch.tensor([ids], device=model.device), cache, logits="last")
        chosen = {layer: [record for record in records if record.selection] for layer, records in seen.items()}
        found.append(
            {
                layer: np.concatenate([r.selection.entries[0].cpu().numpy() for r in records if r.selection])
                for layer, records in chosen.items()
            }
        )
        if storage == "fp32":
            attention = {
                layer: np.concatenate([_plain(r.entry_probs[0].mean(1)) for r in records]) for layer, records in chosen.items()
            }
    label = f"{model.name} ({model.what}), measured on {device_name(str(model.device))}"
    return Selections(exact=found[0], rounded=found[1], attention=attention, choosing=choosing, label=label)
