"""Frozen model configurations, read from and written to the ``config.json`` of a Hugging Face folder.

One class per family. All of them answer ``layer_kinds`` and ``compress_ratios`` layer by layer, ``sliding_window`` (0 for
none), ``index_topk`` (None or 0 where nothing chooses), ``engram`` (None without), and the sizes every decoder has.
"""

from __future__ import annotations

from typing import Any

from workbench.config.common import EngramConfig, RopeConfig
from workbench.config.dense import DenseConfig
from workbench.config.hybrid import HybridConfig, LayerKind
from workbench.config.latent import LatentConfig
from workbench.config.shared_stream import SharedStreamConfig
from workbench.errors import InputError

__all__ = [
    "DeepSeekV4Config",
    "DenseConfig",
    "EngramConfig",
    "HybridConfig",
    "LatentConfig",
    "LayerKind",
    "ModelConfig",
    "RopeConfig",
    "SharedStreamConfig",
    "read_config",
]

ModelConfig = HybridConfig | SharedStreamConfig | LatentConfig | DenseConfig
DeepSeekV4Config = HybridConfig | SharedStreamConfig  # V4 and V4.1 share mHC streams, MoE, Engram and the shared-KV attention
FAMILIES: dict[str, Any] = {
    "deepseek_v4": HybridConfig,
    "deepseek_v41": SharedStreamConfig,
    "deepseek_v32": LatentConfig,
    "deepseek_v3": LatentConfig,
    "llama": DenseConfig,
}


def read_config(settings: dict[str, Any]) -> Any:
    """The configuration a ``config.json`` describes. Raises InputError for another ``model_type`` or a bad setting."""
    family = FAMILIES.get(settings.get("model_type", "deepseek_v4"))
    if family is None:
        raise InputError(f"model_type {settings['model_type']!r} is not supported here; expected one of {sorted(FAMILIES)}")
    try:
        return family.from_dict(settings)
    except (TypeError, AttributeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"config.json has a setting of the wrong type: {error}") from None
