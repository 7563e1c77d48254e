"""Which model class computes which configuration."""

from __future__ import annotations

from workbench.config import DenseConfig, HybridConfig, LatentConfig, ModelConfig, SharedStreamConfig
from workbench.errors import InputError
from workbench.model.language_model import LanguageModel
from workbench.model.plain import PlainModel
from workbench.model.single_pass import V41Model
from workbench.model.transformer import V4Model

MODELS: dict[type, type[LanguageModel]] = {
    HybridConfig: V4Model,
    SharedStreamConfig: V41Model,
    LatentConfig: PlainModel,
    DenseConfig: PlainModel,
}


def model_class(config: ModelConfig) -> type[LanguageModel]:
    """The class that computes ``config``. Raises InputError for something that is no model configuration."""
    found = MODELS.get(type(config))
    if found is None:
        raise InputError(f"expected a model configuration such as model.config, got {type(config).__name__}")
    return found
