"""Weights of one rank: its slices of a Hugging Face checkpoint, or of a random model.

A program's PARAMETERS name the tensors of the checkpoint that each parameter is made of and how tp
shares them (plans/ops.py), so nothing here knows a model family. Files are mapped, and only this
rank's slices are read, one at a time.

Dtypes: a bundle may use another floating dtype than the checkpoint (fp32 from a bf16 file, bf16
from an fp32 file); values are rounded to nearest, said once in the log. fp8 and integer tensors are
refused, since they mean nothing without their scales.

Random weights are a function of (seed, tensor name, tensor shape, index) in integer arithmetic and
one rounding, so every layout, device and bundle of a model holds the same values.
"""

import contextlib
import hashlib
import json
import logging
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from plans.errors import BundleMismatch, UsageError
from plans.model import Model, RopeScaling
from plans.ops import Parameter, Source
from runtime.program import listed

TORCH_DTYPE: dict[str, torch.dtype] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
CONVERTIBLE = {"BF16": "bf16", "F16": "fp16", "F32": "fp32", "F64": "fp64"}
"""Checkpoint dtypes, as safetensors spells them, from which weights may be rounded."""

IGNORED_ENDINGS = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
"""Buffers that older versions of transformers saved: all of them follow from the configuration."""

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
BLOCK_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 24}
"""Random values made at a time: on a CPU the integer temporaries stay in its cache."""

log = logging.getLogger(__name__)


class Checkpoint:
    """The safetensors files of a folder, mapped; shapes and slices by tensor name."""

    def __init__(self, folder: str | Path, files: contextlib.ExitStack) -> None:
        """Opens model.safetensors or the shards of its index; raises BundleMismatch."""
        self.folder = Path(folder)
        self._tensors: dict[str, Any] = {}
        for path in _weight_files(self.folder):
            try:
                opened: Any = files.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise BundleMismatch(f"{path}: cannot be read as safetensors: {error}") from None
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                self._tensors[name] = opened.get_slice(name)

    def names(self) -> set[str]:
        """Tensors of all files."""
        return set(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Whole shape."""
        return tuple(self._tensors[name].get_shape())

    def dtype(self, name: str) -> str:
        """As safetensors spells it, such as BF16."""
        return str(self._tensors[name].get_dtype())

    def read(self, name: str, index: tuple[slice, ...] = (slice(None),)) -> Tensor:
        """A slice, or all of it, on the CPU, in the file's dtype."""
        tensor: Tensor = self._tensors[name][index]
        return tensor


def _weight_files(folder: Path) -> list[Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
            names = sorted(set(map(Path, weight_map.values())))
        except (OSError, RecursionError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise BundleMismatch(f"{index}: is no safetensors index: {error!r}") from None
        strange = [name for name in names if Path(name.name) != name]
        missing = [name for name in names if not (folder / name).is_file()]
        if strange or missing:
            problems = [f"{name}: named by the index, missing" for name in strange or missing]
            raise BundleMismatch(f"{folder}: weights are incomplete:\n{listed(problems)}")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    what = "is no folder" if not folder.is_dir() else "holds no model.safetensors and no index"
    hint = ""
    if any(folder.glob("*.bin")):
        hint = "; *.bin files are not read: save_pretrained(safe_serialization=True) converts them"
    raise BundleMismatch(f"weights {folder}: {what}{hint}")


def sources(parameters: Iterable[Parameter]) -> dict[str, Source]:
    """Checkpoint tensors by name, in order of first use; stages may share one (a tied head)."""
    found: dict[str, Source] = {}
    for parameter in parameters:
        for source in parameter.sources:
            found.setdefault(source.name, source)
    return found


def load_weights(
    folder: str | Path,
    parameters: Sequence[Parameter],
    *,
    tp: int = 1,
    tp_rank: int = 0,
    device: str | torch.device = "cpu",
    whole: Collection[str] = (),
) -> dict[str, Tensor]:
    """This rank's weights by parameter name, on `device`, in each parameter's dtype.

    parameters  of the stage that this rank runs
    whole       tensors that the other stages read, so that they are not taken for strangers
    errors      BundleMismatch that lists all missing, unexpected, misshapen and inconvertible ones
    """
    with contextlib.ExitStack() as files:
        checkpoint = Checkpoint(folder, files)
        _check(checkpoint, sources(parameters), whole)
        _log_conversions(checkpoint, parameters)
        return {
            parameter.name: _assemble(
                parameter,
                (
                    checkpoint.read(source.name, parameter.source_slice(source, tp, tp_rank))
                    for source in parameter.sources
                ),
                device,
            )
            for parameter in parameters
        }


def _check(checkpoint: Checkpoint, wanted: Mapping[str, Source], whole: Collection[str]) -> None:
    held = checkpoint.names()
    problems = []
    for name, source in wanted.items():
        if name not in held:
            tied = name == HEAD and EMBEDDING in held
            hint = " (the checkpoint ties its head: plan with tie_embeddings: true)" if tied else ""
            problems.append(f"missing: {name} {list(source.shape)}{hint}")
        elif checkpoint.shape(name) != source.shape:
            shape = list(checkpoint.shape(name))
            problems.append(f"misshapen: {name} is {shape}, the plan has {list(source.shape)}")
        elif checkpoint.dtype(name) not in CONVERTIBLE:
            known = ", ".join(CONVERTIBLE)
            problems.append(f"dtype: {name} is {checkpoint.dtype(name)}; readable are {known}")
    for name in sorted(held - set(wanted) - set(whole)):
        if name.endswith(IGNORED_ENDINGS) or (name == HEAD and _repeats_embedding(checkpoint)):
            continue
        problems.append(f"unexpected: {name} {list(checkpoint.shape(name))}")
    if problems:
        raise BundleMismatch(
            f"weights {checkpoint.folder} do not fit the plan's model:\n{listed(problems)}\n"
            "give the folder of the model that the bundle was planned for, or plan for this one: "
            "medha-plan --model FOLDER"
        )


def _repeats_embedding(checkpoint: Checkpoint) -> bool:
    """Whether a stored head is the embedding again: some tools save the tied matrix twice."""
    if EMBEDDING not in checkpoint.names() or checkpoint.shape(HEAD) != checkpoint.shape(EMBEDDING):
        return False
    return torch.equal(checkpoint.read(HEAD), checkpoint.read(EMBEDDING))


def _log_conversions(checkpoint: Checkpoint, parameters: Sequence[Parameter]) -> None:
    changed = {
        (CONVERTIBLE[checkpoint.dtype(source.name)], parameter.dtype)
        for parameter in parameters
        for source in parameter.sources
    }
    for old, new in sorted(changed):
        if old != new:
            log.warning("weights %s: %s tensors rounded to %s", checkpoint.folder, old, new)


def _assemble(parameter: Parameter, pieces: Iterable[Tensor], device: str | torch.device) -> Tensor:
    """Pieces joined on dim 0, copied one by one so that no second whole copy exists."""
    dtype = TORCH_DTYPE[parameter.dtype]
    whole = torch.empty(parameter.shape, dtype=dtype, device=device)
    row = 0
    for piece in pieces:
        target = whole[row : row + piece.shape[0]]
        target.copy_(piece)
        if dtype is torch.float16 and not target.isfinite().all():
            raise BundleMismatch(
                f"{parameter.name}: values of the checkpoint exceed fp16; plan with bf16 weights"
            )
        row += piece.shape[0]
    if row != parameter.shape[0]:  # the rest would be whatever memory held
        raise BundleMismatch(f"{parameter.name}: its sources hold {row} rows of {whole.shape[0]}")
    return whole


def random_weights(
    parameters: Sequence[Parameter],
    *,
    seed: int = 0,
    tp: int = 1,
    tp_rank: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Tensor]:
    """This rank's share of the random model, by parameter name."""
    return {
        parameter.name: _assemble(
            parameter,
            (
                random_tensor(
                    source, parameter.source_slice(source, tp, tp_rank), seed=seed, device=device
                )
                for source in parameter.sources
            ),
            device,
        )
        for parameter in parameters
    }


def random_tensor(
    source: Source,
    index: tuple[slice, ...] | None = None,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Tensor:
    """A slice of a random tensor of the checkpoint, fp32.

    Norm weights are 1. Everything else is uniform with mean 0; a matrix [O, I] has the standard
    deviation 1 / sqrt(I), which keeps activations and logits near 1 at any depth; a bias 0.02.
    """
    index = index or (slice(None),) * len(source.shape)
    ranges = [part.indices(size)[:2] for part, size in zip(index, source.shape, strict=True)]
    shape = [stop - start for start, stop in ranges]
    out = torch.empty(shape, dtype=torch.float32, device=device)
    if source.name.endswith("norm.weight"):
        return out.fill_(1.0)
    digest = hashlib.sha256(f"{seed} {source.name} {source.shape}".encode()).digest()
    keys = int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")
    deviation = 0.02 if len(source.shape) == 1 else source.shape[-1] ** -0.5
    (first, _), columns = ranges[0], ranges[1:]
    width = math.prod(source.shape[1:])
    column = torch.zeros(1, dtype=torch.int64, device=device)
    stride = width
    for (start, stop), size in zip(columns, source.shape[1:], strict=True):
        stride //= size
        steps = torch.arange(start, stop, device=device) * stride
        column = (column[:, None] + steps).flatten()
    block = max(1, BLOCK_ELEMENTS[out.device.type] // len(column))
    for at in range(0, shape[0], block):
        rows = torch.arange(at, min(at + block, shape[0]), device=device) + first
        bits = _hash((rows[:, None] * width + column) & 0xFFFFFFFF, keys)
        # 24 bits, so that the float and its doubling are exact; one rounding, by the deviation
        unit = ((bits >> 8) * 2 + 1 - (1 << 24)).float() * 2.0**-24
        out[at : at + block] = (unit * (deviation * math.sqrt(3))).view(-1, *shape[1:])
    return out


def _hash(bits: Tensor, keys: tuple[int, int]) -> Tensor:
    """32 mixed bits of each index, in int64.

    Two rounds of multiply and xor-shift with constants from Wellons's search of hash functions
    (github.com/skeeto/hash-prospector, public domain); both multipliers are below 2^31, so that a
    product with 32 bits stays inside int64.
    """
    bits = bits ^ keys[0]
    for key in (keys[1], 0):  # in place: the temporaries are most of the time
        bits.bitwise_xor_(bits >> 16).mul_(0x21F0AAAD).bitwise_and_(0xFFFFFFFF)
        bits.bitwise_xor_(bits >> 15).mul_(0x735A2D97).bitwise_and_(0xFFFFFFFF)
        bits.bitwise_xor_(bits >> 15).add_(key).bitwise_and_(0xFFFFFFFF)
    return bits


def write_random_checkpoint(
    folder: str | Path,
    model: Model,
    parameters: Sequence[Parameter],
    *,
    seed: int = 0,
    shard_bytes: int = 2 << 30,
) -> None:
    """Writes the random model as a Hugging Face checkpoint: config.json and safetensors shards.

    parameters  of all stages, at any tp; the checkpoint is the same
    errors      UsageError where the folder already holds weights
    """
    target = Path(folder)
    if target.is_dir() and any(target.glob("*.safetensors")):
        raise UsageError(f"{target} already holds weights; name a new folder")
    target.mkdir(parents=True, exist_ok=True)
    dtype = TORCH_DTYPE[model.weight_dtype]
    shards = list(_shards(sources(parameters).values(), dtype.itemsize, shard_bytes))
    names = [f"model-{at:05}-of-{len(shards):05}.safetensors" for at in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        tensors = {source.name: random_tensor(source, seed=seed).to(dtype) for source in shard}
        partial = target / f"{name}.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.replace(target / name)
    if len(shards) > 1:
        weight_map = {
            source.name: name for name, shard in zip(names, shards, strict=True) for source in shard
        }
        total = sum(math.prod(each.shape) for shard in shards for each in shard) * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        _write_json(target / "model.safetensors.index.json", index)
    _write_json(target / "config.json", hugging_face_config(model))


def _shards(tensors: Iterable[Source], item_bytes: int, shard_bytes: int) -> Iterator[list[Source]]:
    shard: list[Source] = []
    held = 0
    for source in tensors:
        size = math.prod(source.shape) * item_bytes
        if shard and held + size > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append(source)
        held += size
    yield shard


def _write_json(path: Path, value: dict[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def hugging_face_config(model: Model) -> dict[str, Any]:
    """config.json of a model, as transformers reads it."""
    kind, name = "llama", "LlamaForCausalLM"
    if model.qk_norm:
        kind, name = "qwen3", "Qwen3ForCausalLM"
    elif model.qkv_bias:
        kind, name = "qwen2", "Qwen2ForCausalLM"
    dtypes = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3fn"}
    config: dict[str, Any] = {
        "architectures": [name],
        "model_type": kind,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab,
        "max_position_embeddings": model.context_limit,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope.theta,
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": dtypes[model.weight_dtype],
        "hidden_act": "silu",
        "attention_bias": False,
    }
    scaling = model.rope.scaling
    if scaling is not None and not scaling.assumed:
        config["rope_scaling"] = _rope_scaling(scaling)
    return config


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    common = {"rope_type": scaling.kind, "factor": scaling.factor}
    own: dict[str, dict[str, Any]] = {
        "linear": {},
        "llama3": {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_tokens,
        },
        "yarn": {
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "original_max_position_embeddings": scaling.original_context_tokens,
        },
    }
    return {**common, **own[scaling.kind]}
