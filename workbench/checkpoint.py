"""Model folders in the Hugging Face layout, in and out: config.json, safetensors weights, an optional tokenizer.json.

V4's weights may carry the names of the release, of a live ``transformers`` state dict, or the mixture that ``transformers``
5.23 writes; V3.2 and llama were released with the names that ``transformers`` uses, and are saved with them. FP8 and FP4
weights are dequantised on the way in. Only safetensors is read: a pickle can run code, so none is opened.
(names: reference/deepseek-v4.md, section 1.4; formats: section 0)
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import Tensor, nn

from workbench.config import read_config
from workbench.errors import InputError
from workbench.model.engram import canonical_ids, check_canonical_ids
from workbench.model.families import model_class
from workbench.model.language_model import LanguageModel
from workbench.model.quant import dequantise_fp4, dequantise_fp8_blocks
from workbench.runtime import available_bytes, pick_device, size_text

ASSETS = Path(__file__).parent / "assets"
CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE = "config.json", "model.safetensors", "tokenizer.json"
INDEX_FILE = WEIGHTS_FILE + ".index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# dtypes as safetensors headers spell them
FLOATS, INTEGERS = {"F64", "F32", "F16", "BF16"}, {"I64", "I32", "I16", "I8", "U8"}
FP8, FP4, PACKED_FP4 = "F8_E4M3", "F4", {"I8", "U8"}
CANONICAL = "engram_canonical_ids"
TABLE_BLOCK = (1, 32)  # an Engram row in FP8 brings a scale for each 32 of its channels

# Float32 in the release, and here whatever the model computes in. Norms are small too, so `save` spares them its rounding.
_FLOAT32 = re.compile(r"(^|\.)hc_|\.ape$|\.attn_sink$|\.gate\.bias$")
_STORED_FLOAT32 = re.compile(_FLOAT32.pattern + "|norm")
# Multi-token prediction and drafting; what V4.1 sees images with; tables we compute ourselves.
_IGNORED = re.compile(r"^mtp\.|^(vision|aligner)\.|^image_|\.bias_vl$|(^|\.)rotary_emb\.|inv_freq$")
_TRANSPOSED = re.compile(r"\.experts\.(gate_and_up|down)_projs$")  # stacked for x @ W, in V4.1's other implementation
_TABLE = re.compile(r"\.engram\.embed\.weight$")
_EXPERTS = re.compile(r"^(layers\.\d+\.ffn\.experts)\.(w13|w2)$")
# From any spelling (our modules' too) to the released one, in order; each rule leaves released names as they are.
_RENAMES = tuple(
    (re.compile(pattern), released)
    for pattern, released in (
        (r"^embed_tokens\.", "embed."),
        (r"^lm_head\.", "head."),
        (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."),
        (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.(attn|ffn)_hc\.", r".hc_\1."),
        (r"\bhc_(attn|ffn|head)\.(?:hc_)?(fn|base|scale)$", r"hc_\1_\2"),
        (r"\.sinks(_param\.weight)?$", ".attn_sink"),
        (r"\.position_bias$", ".ape"),
        (r"\.compressor\.indexer\.", ".indexer."),
        (r"\.indexer\.scorer\.", ".indexer."),
        (r"\.indexer\.(?=kv_|gate_|wkv|wgate|ape|norm)", ".indexer.compressor."),
        (r"\.compressor\.kv_norm\.", ".compressor.norm."),
        (r"\.compressor\.gate_proj\.", ".compressor.wgate."),
        (r"\.attn\.norm\.", ".attn.kv_norm."),
        (r"\.q_a_norm\.", ".q_norm."),
        (r"\.kv_proj\.", ".wkv."),
        (r"\.([qo])_([ab])_proj\.", r".w\1_\2."),
        (r"\.e_score_correction_bias$", ".bias"),
        (r"\.experts\.(gate_up_proj|gate_and_up_projs)$", ".experts.w13"),
        (r"\.experts\.down_projs?$", ".experts.w2"),
        (r"(experts(?:\.\d+)?)\.gate_proj\.", r"\1.w1."),
        (r"(experts(?:\.\d+)?)\.down_proj\.", r"\1.w2."),
        (r"(experts(?:\.\d+)?)\.up_proj\.", r"\1.w3."),
    )
)
# V3.2 and llama: (released = transformers, ours), replaced in this order on the way in and in reverse on the way out.
_HF_NAMES = (
    ("embed_tokens.", "embed."),
    ("lm_head.", "head."),
    (".self_attn.", ".attn."),
    (".mlp.", ".ffn."),
    (".input_layernorm.", ".attn_norm."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".gate.e_score_correction_bias", ".gate.bias"),
    (".experts.gate_up_proj", ".experts.w13"),
    (".experts.down_proj", ".experts.w2"),
    (".gate_proj.", ".w1."),
    (".down_proj.", ".w2."),
    (".up_proj.", ".w3."),
    (".o_proj.", ".wo."),
)
_DENSE_NAMES = (*_HF_NAMES, (".q_proj.", ".wq."), (".k_proj.", ".wk."), (".v_proj.", ".wv."))
_LATENT_NAMES = (
    *_HF_NAMES,
    (".attn.q_a_proj.", ".attn.wq_a."),
    (".attn.q_a_layernorm.", ".attn.q_norm."),
    (".attn.q_b_proj.", ".attn.wq_b."),
    (".attn.kv_a_proj_with_mqa.", ".attn.wkv_a."),
    (".attn.kv_a_layernorm.", ".attn.kv_norm."),
    (".attn.kv_b_proj.", ".attn.wkv_b."),
)
_NAMES_OF_FAMILY = {"llama": _DENSE_NAMES, "deepseek_v32": _LATENT_NAMES}


def shipped_names() -> list[str]:
    """Names of the trained checkpoints that come with the workbench."""
    return sorted(path.parent.name for path in ASSETS.glob(f"*/{CONFIG_FILE}"))


def load(source: str | Path, *, device: str = "auto", dtype: torch.dtype | None = None) -> LanguageModel:
    """A model, ready for inference, from a shipped checkpoint's name or a folder in the Hugging Face layout.

    ``dtype`` is what the large matrices compute in, float32 unless given; sinks, mHC and other sensitive terms never
    compute in less. ``model.tokenizer`` is None for a folder without ``tokenizer.json``.
    Raises InputError for an unknown source, a folder that is incomplete, damaged, pickled or does not match its own
    config.json, numbers that are NaN or infinite, and a model that would not fit in memory.
    """
    dtype = dtype or torch.float32
    _check_dtype(dtype)
    folder, where = _find_folder(source), pick_device(device)
    settings = _read_json(folder / CONFIG_FILE)
    config = read_config(settings)
    with ExitStack() as stack:
        weights = _Weights(folder, stack, config.model_type)
        weights.leave_out_layers_from(config.num_hidden_layers, settings.get("num_nextn_predict_layers"))
        if config.num_hidden_layers > len(weights.stored):  # before building anything of the size a config claims
            raise InputError(
                f"{folder} has {len(weights.stored)} tensors for {config.num_hidden_layers} layers; is a shard missing?"
            )
        try:
            with torch.device("meta"):  # names and shapes without memory
                expected = model_class(config)(config).state_dict()
        except (RuntimeError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"{folder / CONFIG_FILE} describes no model that can be built: {error}") from None
        if settings.get("tie_word_embeddings"):
            weights.tie_head()
        tokenizer = _read_tokenizer(folder, config.vocab_size)
        derived = None
        if tokenizer and CANONICAL in expected and CANONICAL not in weights.stored:  # a release leaves them to its tokenizer
            derived = torch.from_numpy(canonical_ids(tokenizer))
            expected.pop(CANONICAL)
        weights.check(expected)
        _check_memory(expected, where, dtype)
        model = model_class(config)(config)
        if dtype is not torch.float32:
            convert(model, dtype)
        targets = model.state_dict()
        if derived is not None:
            targets.pop(CANONICAL).zero_()[: len(derived)] = derived
        weights.fill(targets, _fp8_block(settings))
    _check_tables(model)
    model.name, model.what = folder.resolve().name, "toy, trained" if folder.parent == ASSETS else "weights from a folder"
    model.tokenizer = tokenizer
    return model.to(where).eval()


def save(
    model: LanguageModel,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    extra: Mapping[str, str | dict] | None = None,
) -> Path:
    """Write the model as a folder that ``load`` reads, and return it.

    Names are those of the family's release, one tensor per expert. Matrices are stored in ``dtype``, tables of integers as they
    are, small terms in float32. ``extra`` maps further file names to text, or to a dict written as JSON. All files are complete
    before the first one gets its final name.
    Raises InputError if a value is not finite in ``dtype``, or an extra file's name is not plain or already used.
    """
    folder, extra = Path(folder), extra or {}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give a folder to save the model in")
    for name in extra:
        if not _is_plain(name) or name in (CONFIG_FILE, WEIGHTS_FILE, TOKENIZER_FILE, INDEX_FILE):
            raise InputError(f"extra file {name!r} must be a plain file name that the model itself does not use")
    _check_dtype(dtype)
    tensors = {}
    for name, tensor in model.state_dict().items():
        stored = torch.float32 if _STORED_FLOAT32.search(name) else dtype
        for canonical, part in _pieces(name, tensor, model.config.model_type).items():
            piece = saved_name(canonical, model.config.model_type)
            copy = part.to("cpu", stored if part.is_floating_point() else part.dtype, copy=True).contiguous()
            if not copy.isfinite().all():
                raise InputError(f"tensor {piece!r} has values that are not finite in {stored}; choose another dtype")
            tensors[piece] = copy
    texts = {CONFIG_FILE: model.config.to_dict(), **extra}
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        unfinished = Path(temporary)
        safetensors.torch.save_file(tensors, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        if model.tokenizer is not None:
            model.tokenizer.save(str(unfinished / TOKENIZER_FILE))
        for name, content in texts.items():
            text = content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (unfinished / name).write_text(text, encoding="utf-8")
        for path in unfinished.iterdir():
            path.replace(folder / path.name)
    return folder


def released_name(name: str, family: str = "deepseek_v4") -> str | None:
    """A weight's name as DeepSeek releases it, from any of the three spellings; None for weights this model does not use.

    Stacked experts, which only ``transformers`` has, become ``layers.N.ffn.experts.w13`` and ``.w2`` as in our own model. For
    families released with the names of ``transformers`` it is the name in our model; ``saved_name`` leads back.
    """
    name = name.removeprefix("model.")
    if _IGNORED.search(name):
        return None
    if family in _NAMES_OF_FAMILY:
        for theirs, ours in _NAMES_OF_FAMILY[family]:
            name = name.replace(theirs, ours)
        return name
    if ".engram." in name:
        return name.replace(".engram.table.", ".engram.embed.")  # V4 has no Engram, so all of it goes by V4.1's names
    for pattern, released in _RENAMES:
        name = pattern.sub(released, name)
    return name


def saved_name(name: str, family: str) -> str:
    """The name that ``save`` gives a tensor: as the family's release has it."""
    if family not in _NAMES_OF_FAMILY:
        return name
    for theirs, ours in reversed(_NAMES_OF_FAMILY[family]):
        name = name.replace(ours, theirs)
    return name if name.startswith("lm_head.") else f"model.{name}"


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor in a file, not yet read; ``shape`` as the model has it, should the file hold it the other way round."""

    file: Any  # an open safetensors file
    name: str
    dtype: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        values = self.file.get_tensor(self.name)
        return values.mT if _TRANSPOSED.search(self.name) else values


class _Weights:
    """The tensors of a folder by released name: headers first, contents one tensor at a time."""

    def __init__(self, folder: Path, stack: ExitStack, family: str) -> None:
        self.folder, self.family = folder, family
        self.stored: dict[str, _Stored] = {}
        self.scales: dict[str, _Stored] = {}  # by the name of the tensor they scale
        for path in _weight_files(folder):
            file = stack.enter_context(_open(path))
            for raw in file.keys():  # noqa: SIM118 - not a dict
                header = file.get_slice(raw)
                shape = tuple(header.get_shape())
                if _TRANSPOSED.search(raw):
                    shape = (*shape[:-2], *reversed(shape[-2:]))
                self._add(_Stored(file, raw, header.get_dtype(), shape))

    def _add(self, entry: _Stored) -> None:
        scaled = _scaled_name(entry.name)
        name = released_name(scaled or entry.name, self.family)
        if name is None:
            return
        group = self.scales if scaled else self.stored
        if name in group:
            raise InputError(f"{self.folder} holds {name!r} twice, once as {group[name].name!r} and once as {entry.name!r}")
        group[name] = entry

    def leave_out_layers_from(self, layers: int, more: int | None) -> None:
        """Forget the ``more`` layers after the last one, which the release of V3.2 adds for multi-token prediction."""
        prefixes = tuple(f"layers.{layers + i}." for i in range(more or 0))
        for group in (self.stored, self.scales) if prefixes else ():
            for name in [name for name in group if name.startswith(prefixes)]:
                del group[name]

    def tie_head(self) -> None:
        """Let the embedding serve as the head where no head is stored."""
        if "head.weight" not in self.stored:
            for group in (self.stored, self.scales):
                if "embed.weight" in group:
                    group["head.weight"] = group["embed.weight"]

    def check(self, expected: Mapping[str, Tensor]) -> None:
        """Compare names, shapes and formats with the model's, from the headers alone; raises one InputError for all of it."""
        wanted = self._wanted(expected)
        wrong = [text for name, tensor in wanted.items() if name in self.stored and (text := self._misfit(name, tensor))]
        problems = {
            "missing": [name for name in wanted if name not in self.stored],
            "unexpected": [entry.name for name, entry in self.stored.items() if name not in wanted]
            + [entry.name for name, entry in self.scales.items() if name not in self.stored],
            "unfit": wrong,
        }
        found = [
            f"{len(names)} {what}: {', '.join(names[:3])}{', ...' * (len(names) > 3)}"
            for what, names in problems.items()
            if names
        ]
        if found:
            raise InputError(f"the weights in {self.folder} do not match its {CONFIG_FILE}: {'; '.join(found)}")

    def fill(self, targets: Mapping[str, Tensor], fp8_block: tuple[int, int] | None) -> None:
        """Copy every tensor into its place, stacked experts one at a time. Raises InputError for values that cannot be used."""
        for name, target in self._wanted(targets).items():
            entry, scale = self.stored[name], self.scales.get(name)
            try:
                values = entry.read()
                if scale and entry.dtype == FP8:
                    values = dequantise_fp8_blocks(values, scale.read(), TABLE_BLOCK if _TABLE.search(name) else fp8_block)
                elif scale:
                    values = dequantise_fp4(values, scale.read())
            except (InputError, SafetensorError) as error:
                raise InputError(f"tensor {entry.name!r} in {self.folder}: {error}") from None
            target.copy_(values)
            if not target.isfinite().all():
                raise InputError(f"tensor {entry.name!r} in {self.folder} holds NaN or infinity (as {target.dtype})")

    def _wanted(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's tensors under the names this folder uses: experts one by one, unless it has them stacked."""
        wanted: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            wanted |= {name: tensor} if name in self.stored else _pieces(name, tensor, self.family)
        return wanted

    def _misfit(self, name: str, target: Tensor) -> str:
        """Why a stored tensor cannot become ``target``, or an empty string."""
        entry, scaled = self.stored[name], name in self.scales
        shape = list(entry.shape)
        if scaled and entry.dtype in PACKED_FP4 and shape:
            shape[-1] *= 2  # a header counts bytes; two values each
        if shape != list(target.shape):
            return f"{entry.name} has shape {shape} instead of {list(target.shape)}"
        usable = {FP8, FP4, *PACKED_FP4} if scaled else FLOATS if target.is_floating_point() else INTEGERS
        if entry.dtype not in usable or (scaled and not target.is_floating_point()):
            return f"{entry.name} is stored as {entry.dtype} {'with' if scaled else 'without'} scales"
        return ""


def _pieces(name: str, tensor: Tensor, family: str) -> dict[str, Tensor]:
    """Views of one of our tensors under its released names: itself, or every expert's matrices."""
    match = _EXPERTS.match(name)
    if not match:
        return {released_name(name, family) or name: tensor}
    experts, kind = match.groups()
    views: dict[str, Tensor] = {}
    for number, expert in enumerate(tensor):
        gate_up = expert.chunk(2) if kind == "w13" else ()  # gate rows first, then up
        parts = zip(("w1", "w3"), gate_up, strict=True) if gate_up else [("w2", expert)]
        views |= {f"{experts}.{number}.{part}.weight": view for part, view in parts}
    return views


def _scaled_name(name: str) -> str | None:
    """The tensor that a companion named ``name`` scales, in the same spelling; None if ``name`` is no companion."""
    if name.endswith("_scale_inv"):
        return name.removesuffix("_scale_inv")
    if name.endswith(".scale") and not re.search(r"(_hc|hc_(attn|ffn|head))\.scale$", name):  # an mHC scale is a weight
        return name.removesuffix(".scale").removesuffix(".weight") + ".weight"
    return None


def _find_folder(source: str | Path) -> Path:
    if str(source) in shipped_names():
        return ASSETS / source
    folder = Path(source).expanduser()
    if not folder.is_dir():
        shipped = ", ".join(map(repr, shipped_names())) or "none"
        raise InputError(
            f"no model {str(source)!r}: give a folder with {CONFIG_FILE}, or one of the shipped models ({shipped})"
        )
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path.parent} has no {path.name}; a model folder needs {CONFIG_FILE} and *.safetensors") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def _weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights: the single one, those an index lists, or every *.safetensors there is."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / INDEX_FILE).is_file():
        shards = _read_json(folder / INDEX_FILE).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise InputError(f"{folder / INDEX_FILE} has no weight_map; it should map tensor names to files")
        for shard in shards.values():
            if not isinstance(shard, str) or not _is_plain(shard) or not shard.endswith(".safetensors"):
                raise InputError(f"{folder / INDEX_FILE} lists {shard!r}; expected the name of a *.safetensors file beside it")
            if not (folder / shard).is_file():
                raise InputError(f"{folder} lacks {shard}, which its index lists; copy the missing shard")
        return [folder / shard for shard in sorted(set(shards.values()))]
    files = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    if files:
        return files
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder} has only pickled weights ({pickles[0]}), which are never opened; convert them to safetensors"
        )
    raise InputError(f"{folder} has no *.safetensors file")


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        with path.open("rb") as file:
            start = file.read(9)
        # A safetensors header is its length in 8 bytes, which may look like a pickle's first ones, and then JSON.
        if start.startswith((b"PK", b"\x80")) and not start.endswith(b"{"):
            raise InputError(f"{path} is a pickle or zip, which is never opened; convert the weights to safetensors") from None
        raise InputError(f"{path} is damaged, truncated or no safetensors file ({error}); copy it again") from None


def _fp8_block(settings: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns per FP8 scale, if config.json says; else they follow from the shapes."""
    quantization = settings.get("quantization_config")
    block = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if block is None:
        return None
    if not isinstance(block, list) or len(block) != 2 or not all(type(side) is int and side > 0 for side in block):
        raise InputError(f"weight_block_size must be two positive numbers, got {block!r}")
    return block[0], block[1]


def _read_tokenizer(folder: Path, vocab_size: int) -> Tokenizer | None:
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"{path} cannot be read: {error}") from None
    largest = max(tokenizer.get_vocab().values(), default=0)
    if largest >= vocab_size:
        raise InputError(f"{path} uses token id {largest}, but the model knows {vocab_size} tokens; is it another model's?")
    return tokenizer


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype}")


def _check_tables(model: LanguageModel) -> None:
    """Raises InputError for tables of numbers that point outside what they index."""
    experts = getattr(model.config, "n_routed_experts", 0)
    for name, table in model.named_buffers():
        if name.endswith(".tid2eid") and not 0 <= int(table.min()) <= int(table.max()) < experts:
            raise InputError(f"{name} must hold experts 0..{experts - 1}, got {int(table.min())}..{int(table.max())}")
    if model.config.engram:
        check_canonical_ids(model.get_buffer("engram_canonical_ids"), model.config.engram)


def convert(model: nn.Module, dtype: torch.dtype) -> None:
    """Compute in ``dtype``, in place; below float32 the sensitive terms keep their precision."""
    for name, parameter in model.named_parameters():
        if dtype is torch.float64 or not _FLOAT32.search(name):
            parameter.data = parameter.data.to(dtype)
    if dtype is torch.float64:
        model.double()


def _check_memory(expected: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Raises InputError, with both numbers, if the model cannot fit where it is built (float32, host) or where it will run."""
    built = sum(tensor.nbytes for tensor in expected.values()) * max(1, dtype.itemsize // 4)
    needs = [("memory", built, available_bytes())]
    if device.type == "cuda":  # Engram tables stay on the host
        moved = sum(tensor.numel() for name, tensor in expected.items() if ".engram.table." not in name) * dtype.itemsize
        needs.append((f"memory on {device}", moved, available_bytes(device)))
    for place, needed, available in needs:
        if needed > available:
            raise InputError(f"the model needs {size_text(needed)} of {place} but {size_text(available)} are free")


def _is_plain(name: str) -> bool:
    """True for a file name without any folder part, on any system."""
    return bool(name) and name not in (".", "..") and not set(name) & set("/\\:\0")
