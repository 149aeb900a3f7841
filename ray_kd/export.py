"""The trained student as a normal Hugging Face folder, written shard by shard as the parameters come in.

In: (name, tensor) pairs, for example one gathered ZeRO parameter at a time. Out: safetensors with an index when there
is more than one shard, config, generation config, tokenizer, README.md, and adapter/ where one was trained. Host
memory: one shard.
"""

import copy
import importlib.metadata
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig

from ray_kd.models import atomic_folder, load_tokenizer, local_folder, quiet, save_adapter, torch_dtype

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER = "adapter"
MAX_SHARD_BYTES = 4_000_000_000
_PACKAGES = ("ray_kd", "torch", "transformers", "peft", "deepspeed", "ray")


def write_final(
    folder: str | Path,
    parameters: Iterator[tuple[str, Tensor]],
    *,
    config: PreTrainedConfig,
    tokenizer_path: str,
    revision: str | None = None,
    dtype: str,
    card: str,
    adapter: "tuple[LoraConfig, dict[str, Tensor]] | None" = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the student so that AutoModelForCausalLM.from_pretrained(folder) gives these parameters in `dtype`.

    parameters: names as in the model's state_dict, each once; the duplicate of a tied weight is left out.
    tokenizer_path: model folder (or hub id) whose tokenizer and generation config go along.
    adapter: of `models.adapter_state`; the parameters have it in them, and adapter/ has it alone, in its own dtype.
    The folder appears complete or not at all, and replaces an older one.
    Raises ValueError, and writes nothing, when names or shapes are not exactly those of the architecture.
    """
    config = copy.deepcopy(config)
    with quiet(), torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    expected = {name: tensor.shape for name, tensor in skeleton.state_dict().items()}
    tied = set(skeleton.all_tied_weights_keys)
    tokenizer = load_tokenizer(tokenizer_path, revision)
    saved_dtype = torch_dtype(dtype)
    assert isinstance(saved_dtype, torch.dtype), f"export needs a dtype, not '{dtype}'"
    config.dtype = saved_dtype
    config.architectures = [type(skeleton).__name__]

    with atomic_folder(folder) as partial:
        shards = _Shards(partial, max_shard_bytes)
        for name, tensor in parameters:
            if name not in expected or tensor.shape != expected[name]:
                wanted = tuple(expected[name]) if name in expected else "no such parameter"
                raise ValueError(f"export: {name} {tuple(tensor.shape)}; {config.model_type} has {wanted}")
            if name not in tied:
                is_float = tensor.is_floating_point()
                shards.add(name, tensor.detach().to("cpu", saved_dtype if is_float else None, copy=True).contiguous())
        missing = sorted(expected.keys() - tied - shards.names)
        if missing:
            raise ValueError(f"export: {len(missing)} parameters were not given, first {missing[0]}")
        shards.close()
        with quiet():
            config.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            _generation_config(tokenizer_path, revision, config).save_pretrained(partial)
        if adapter is not None:
            save_adapter(*adapter, partial / ADAPTER)
        (partial / "README.md").write_text(card, encoding="utf-8")


def model_card(
    *,
    teachers: Mapping[str, str],
    student_init: str,
    data_identity: str,
    licences: Mapping[str, str],
    config_yaml: str,
    metrics: Mapping[str, Mapping[str, float]] | None,
) -> str:
    """README.md of the student: where it comes from, under which licences, how good it is.

    teachers: as it was named -> identity of its weights.
    student_init: how the student began, in words ("layers [0, 1, 5] of the teacher", or a model and its identity).
    licences: {"teacher": ..., "data": ...}, "unknown" where it is not known (see `models.licence_of`).
    metrics: {"before": {...}, "after": {...}} as in summary.json, or None without held-out data.
    The front matter names a licence only when the teacher's is known, and one; the student is a derivative of it.
    """
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES)
    front = ["library_name: transformers", "tags: [distillation, ray_kd]"]
    if "unknown" not in licences.get("teacher", "unknown") and "," not in licences["teacher"]:
        front.insert(0, f"license: {licences['teacher']}")
    parts = [
        "---\n" + "\n".join(front) + "\n---",
        "# Distilled student",
        "".join(f"- teacher: `{name}` ({identity})\n" for name, identity in teachers.items())
        + f"- student began as: {student_init}\n"
        f"- data: {data_identity}\n- made with: {versions}",
        "## Licences\n\n" + "\n".join(f"- {name}: {licence}" for name, licence in licences.items()),
    ]
    if metrics:
        parts.append("## Held-out metrics\n\nKL in nats per target token at T = 1.\n\n" + _metrics_table(metrics))
    parts.append(f"## Configuration\n\n```yaml\n{config_yaml.strip()}\n```")
    return "\n\n".join(parts) + "\n"


def _metrics_table(metrics: Mapping[str, Mapping[str, float]]) -> str:
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    lines = ["| metric | " + " | ".join(metrics) + " |", "|---" * (len(metrics) + 1) + "|"]
    for name in names:
        cells = [f"{values[name]:.6g}" if name in values else "" for values in metrics.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _generation_config(path: str, revision: str | None, config: PreTrainedConfig) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(local_folder(path), revision=revision or "main")
    except OSError:  # transformers' word for: this model has none
        return GenerationConfig.from_model_config(config)


class _Shards:
    """Safetensors files of at most `max_bytes`, named when their number is known, and their index."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.names: set[str] = set()
        self._folder, self._max_bytes = folder, max_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = self._total_bytes = 0
        self._written: list[list[str]] = []  # parameter names per shard

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a parameter until its shard is full. Raises ValueError for a name given twice."""
        if name in self.names:
            raise ValueError(f"export: {name} was given twice")
        if self._pending and self._pending_bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self.names.add(name)
        self._pending[name] = tensor
        self._pending_bytes += tensor.nbytes
        self._total_bytes += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the shards their final names, write the index when there are several."""
        self._flush()
        count = len(self._written)
        if count == 1:
            self._path(0).rename(self._folder / "model.safetensors")
            return
        weight_map: dict[str, str] = {}
        for index, names in enumerate(self._written):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            self._path(index).rename(self._folder / file)
            weight_map |= dict.fromkeys(names, file)
        content: dict[str, Any] = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")

    def _flush(self) -> None:
        if self._pending:
            save_file(self._pending, self._path(len(self._written)), metadata={"format": "pt"})
            self._written.append(list(self._pending))
            self._pending, self._pending_bytes = {}, 0

    def _path(self, index: int) -> Path:
        return self._folder / f"shard-{index}.partial"
