"""What was measured of one true-size layer, as plain values: no torch, so that figures and tables can read it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from workbench.errors import InputError

ONE_LAYER, OVER_LAYERS = "one layer, measured", "measured per layer x layers"


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMeasurement:
    """Decoding with one attention layer whose cache holds ``length`` tokens, on ``device``.

    ``held``: part -> bytes this layer's own cache held, without a stream that another layer owns. ``read``: part -> bytes that
    the last step was handed to read, counted. ``weight_bytes``: the layer's weights, which it reads too. ``step_s``: seconds of
    one decode step, the median of ``steps``. ``bandwidth_bytes_per_s``: what copying memory reaches on the same device, reading
    and writing together. ``layers`` above 1 means that bytes and seconds were multiplied, see ``over_layers``.
    """

    preset: str
    kind: str
    length: int
    storage: str
    device: str
    held: Mapping[str, int]
    read: Mapping[str, int]
    weight_bytes: int
    step_s: float
    steps: int
    bandwidth_bytes_per_s: float
    layers: int = 1
    origin: Literal["measured", "recorded"] = "measured"

    def __post_init__(self) -> None:
        if self.length < 0 or self.steps < 1 or self.layers < 1:
            raise InputError(f"length {self.length}, steps {self.steps} and layers {self.layers} are no measurement")
        if not (self.step_s > 0 and self.bandwidth_bytes_per_s > 0):
            raise InputError(f"step_s {self.step_s} and bandwidth {self.bandwidth_bytes_per_s} must be above 0")

    @property
    def label(self) -> str:
        """What a picture must say of it."""
        return ONE_LAYER if self.layers == 1 else f"{OVER_LAYERS} ({self.layers})"

    @property
    def held_bytes(self) -> int:
        return sum(self.held.values())

    @property
    def read_bytes(self) -> int:
        """Bytes of the cache that one step must read."""
        return sum(self.read.values())

    @property
    def floor_s(self) -> float:
        """Seconds that reading those bytes and the weights would take at the bandwidth, were there nothing else to do."""
        return (self.read_bytes + self.weight_bytes) / self.bandwidth_bytes_per_s

    @property
    def over_floor(self) -> float:
        """How many times longer than ``floor_s`` a step took."""
        return self.step_s / self.floor_s

    def over_layers(self, layers: int) -> LayerMeasurement:
        """The same for ``layers`` layers of this kind, as if each cost what this one did. InputError for a total."""
        if self.layers != 1:
            raise InputError(f"this is already a total over {self.layers} layers; multiply the measurement of one")
        return replace(
            self,
            layers=layers,
            held={part: layers * nbytes for part, nbytes in self.held.items()},
            read={part: layers * nbytes for part, nbytes in self.read.items()},
            weight_bytes=layers * self.weight_bytes,
            step_s=layers * self.step_s,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, with the label and the sums beside them."""
        derived = ("label", "held_bytes", "read_bytes", "floor_s", "over_floor")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> LayerMeasurement:
        """Read what ``to_dict`` gave, now "recorded". InputError if something is missing or of the wrong kind."""
        try:
            return cls(**{field.name: stored[field.name] for field in fields(cls)} | {"origin": "recorded"})
        except (KeyError, TypeError) as error:
            raise InputError(f"this is no stored layer measurement: {type(error).__name__} {error}") from None
