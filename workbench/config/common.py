"""What all configurations share: the settings every part of the workbench may ask for, RoPE, and Engram.

Only the standard library is needed here, so cost and presets can use configurations without torch.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields
from typing import Any

from workbench.errors import InputError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary frequencies of the compressed layers: base ``theta``, stretched by YaRN when ``factor`` is above 1."""

    theta: float = 160000.0
    factor: float = 1.0
    original_max_position_embeddings: int = 65536
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.theta <= 1 or self.factor < 1:
            raise InputError(f"rope needs theta > 1 and factor >= 1, got theta={self.theta}, factor={self.factor}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngramConfig:
    """Engram layers (reference/engram-and-overlap.md, section 1); part of released V4.1, not of V4.

    ``layer_ids`` count from zero; ``vocab_size`` is the base size of one (order, head) table, rounded up to distinct primes.
    ``conv_kernel_size`` 0 leaves out the short convolution, as V4.1 does (reference/deepseek-v41.md, section 6).
    """

    layer_ids: tuple[int, ...]
    vocab_size: int
    compressed_vocab_size: int  # distinct canonical ids after tokenizer compression; every hash multiplier depends on it
    max_ngram_size: int = 3
    n_heads: int = 8
    head_dim: int = 64
    pad_token_id: int = 0
    seed: int = 0
    conv_kernel_size: int = 4

    def __post_init__(self) -> None:
        if not self.layer_ids or self.max_ngram_size < 2 or min(self.n_heads, self.head_dim, self.conv_kernel_size + 1) < 1:
            raise InputError(f"engram needs a layer, n-grams of 2 or more, and positive sizes, got {self}")
        if self.vocab_size < 2:
            raise InputError(f"engram_vocab_size must be at least 2, got {self.vocab_size}")

    @property
    def rows_per_token(self) -> int:
        return (self.max_ngram_size - 1) * self.n_heads

    @property
    def memory_width(self) -> int:
        return self.rows_per_token * self.head_dim

    @property
    def conv_state_length(self) -> int:
        """Earlier positions the dilated causal convolution looks back at; its dilation is the largest n-gram order."""
        return max(0, self.conv_kernel_size - 1) * self.max_ngram_size


def check_positive(config: Any, *may_be_zero: str, minus_one: str = "") -> None:
    """Raises InputError for a whole-number setting below 1; ``may_be_zero`` and ``minus_one`` name those that may be less."""
    for field in fields(config):
        value, least = getattr(config, field.name), -1 if field.name == minus_one else int(field.name not in may_be_zero)
        if isinstance(value, int) and not isinstance(value, bool) and value < least:
            raise InputError(f"{field.name} must be {f'at least {least}' if least < 1 else 'positive'}, got {value}")


def check_fixed(config: dict[str, Any], **expected: Any) -> None:
    """Raises InputError if a ``config.json`` sets something that this library computes in one way only to something else."""
    for key, only in expected.items():
        if config.get(key) not in (None, only):
            raise InputError(f"config has {key}={config[key]!r}; this model uses {only!r}")


def read_rope(config: dict[str, Any]) -> RopeConfig:
    scaling = config.get("rope_parameters") or config.get("rope_scaling") or {}
    scaling = scaling.get("compress", scaling)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "yarn"):
        raise InputError(f"rope type {kind!r} is not supported; DeepSeek-V4 uses 'yarn' or 'default'")
    known = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    settings = {name: scaling[name] for name in known if scaling.get(name) is not None}
    if kind == "default":
        settings["factor"] = 1.0
    return RopeConfig(theta=config.get("compress_rope_theta", scaling.get("rope_theta", 160000.0)), **settings)


def read_fields(cls: Any, config: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The fields of a configuration class that ``config`` has under their own names, and those ``given`` here instead.

    Raises InputError for a field without a default that is missing in both.
    """
    names = [field.name for field in fields(cls) if field.name not in given]
    out = {name: config[name] for name in names if config.get(name) is not None} | given
    missing = [field.name for field in fields(cls) if field.default is MISSING and field.name not in out]
    if missing:
        raise InputError(f"config.json has no {', '.join(missing)}; is this a {cls.model_type} model folder?")
    return out


def read_token_rope(config: dict[str, Any], *kinds: str) -> tuple[RopeConfig, dict[str, Any]]:
    """The one rotation of a model whose layers are alike, and the settings it was read from: both spellings, new and old.

    Raises InputError for a rope type other than ``kinds``, a rotation of half a head, or two bases that disagree.
    """
    settings = dict(config.get("rope_scaling") or {}) | dict(config.get("rope_parameters") or {})
    kind = settings.get("rope_type", settings.get("type")) or "default"
    if kind not in kinds:
        raise InputError(f"rope type {kind!r} is not supported for this model; expected one of {kinds}")
    check_fixed(config | settings, partial_rotary_factor=1.0, truncate=True, rope_interleave=True)
    bases = {float(found["rope_theta"]) for found in (config, settings) if found.get("rope_theta") is not None}
    if len(bases) > 1:
        raise InputError(f"config.json gives two rotary bases, rope_theta {sorted(bases)}; keep one")
    theta = bases.pop() if bases else 10000.0
    if kind == "default":
        return RopeConfig(theta=theta), {}
    known = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
    missing = [name for name in known[:2] if settings.get(name) is None]
    if missing:
        raise InputError(f"rope type {kind!r} needs {' and '.join(missing)}, got {settings}")
    return RopeConfig(theta=theta, **{name: settings[name] for name in known if settings.get(name) is not None}), settings


def read_engram(config: dict[str, Any]) -> EngramConfig | None:
    if not config.get("engram_layer_ids"):
        return None
    names = [field.name for field in fields(EngramConfig) if field.name != "layer_ids"]
    settings = {name: config[f"engram_{name}"] for name in names if f"engram_{name}" in config}
    return EngramConfig(layer_ids=tuple(config["engram_layer_ids"]), **settings)


def write_engram(engram: EngramConfig | None) -> dict[str, Any]:
    """The settings of a ``config.json`` that ``read_engram`` reads; none without Engram."""
    if engram is None:
        return {}
    settings = {f"engram_{field.name}": getattr(engram, field.name) for field in fields(engram)}
    return settings | {"engram_layer_ids": list(engram.layer_ids)}


def write_rope(rope: RopeConfig) -> dict[str, Any]:
    """A ``rope_scaling`` entry that ``read_rope`` reads; ``theta`` has a key of its own."""
    return {
        "rope_type": "yarn" if rope.factor > 1 else "default",
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_position_embeddings,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
    }
