"""A student made of some of the teacher's layers, whole or narrower (ShortGPT, https://arxiv.org/abs/2403.03853).

Block influence of layer i = 1 - cos(h_i, h_{i+1}), averaged over tokens: how much the layer turns the hidden state.
The layers that turn it least are left out; the rest, the embeddings, the norm and the head are copied.
"""

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ray_kd.config import StudentInit
from ray_kd.errors import ConfigError
from ray_kd.models.decoder import base_causal_lm, decoder_hidden, decoder_of
from ray_kd.models.folder import atomic_folder, read_config
from ray_kd.models.load import load_causal_lm, load_tokenizer, quiet
from ray_kd.models.rows import real_tokens
from ray_kd.models.widths import Kept, asked_widths, check_widths, config_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.no_grad()
def block_influence(
    model: nn.Module, input_ids: NDArray[np.integer], position_ids: NDArray[np.integer], batch_size: int = 4
) -> NDArray[np.float64]:
    """Score [L] of each decoder layer on packed rows (input_ids, position_ids [n, T]); higher matters more.

    Padding does not count: it is the last document of a row when all its ids are the same.
    One forward over the rows, and the hidden states of one layer at a time.
    """
    layers = _layers_of(model)
    device = base_causal_lm(model).device
    sums = torch.zeros(len(layers), dtype=torch.float64)
    mask = torch.empty(0)

    def score(index: int, before: Tensor, after: Tensor) -> None:
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        sums[index] += ((1.0 - cosine) * mask).sum(dtype=torch.float64).cpu()

    def hook_for(index: int) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            score(
                index, args[0] if args else kwargs["hidden_states"], output[0] if isinstance(output, tuple) else output
            )

        return hook

    real = real_tokens(input_ids, position_ids)
    handles = [layer.register_forward_hook(hook_for(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            mask = torch.from_numpy(real[rows]).to(device)
            decoder_hidden(
                model, torch.from_numpy(input_ids[rows]).to(device), torch.from_numpy(position_ids[rows]).to(device)
            )
    finally:
        for handle in handles:
            handle.remove()
    return sums.numpy() / max(int(real.sum()), 1)


def choose_layers(scores: NDArray[np.floating], count: int) -> list[int]:
    """The `count` layers of highest score in increasing order, the last layer always among them.

    Raises ConfigError when count is not within 1..L.
    """
    total = len(scores)
    if not 1 <= count <= total:
        raise ConfigError(f"student.init.layers is {count}; the teacher has {total} layers, allowed: 1 to {total}")
    others = np.argsort(-np.asarray(scores[:-1]), kind="stable")[: count - 1]
    return sorted([*map(int, others), total - 1])


def check_layers(layers: Sequence[int], total: int) -> list[int]:
    """An explicit list of layers of a teacher that has `total`; ConfigError with the allowed range if it is none."""
    allowed = f"the teacher has {total} layers, allowed: different indices from 0 to {total - 1} in increasing order"
    chosen = list(layers)
    if not chosen or any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < total for i in chosen):
        raise ConfigError(f"student.init.layers is {chosen}; {allowed}")
    if any(a >= b for a, b in itertools.pairwise(chosen)):
        raise ConfigError(f"student.init.layers {chosen} repeats a layer or is out of order; {allowed}")
    return chosen


def init_from_layers(
    teacher_path: str,
    layers: Sequence[int],
    out_dir: str,
    dtype: str = "float32",
    revision: str | None = None,
    kept: Kept | None = None,
) -> None:
    """Save a student with the teacher's embeddings, norm, head and the given layers as a Hugging Face folder.

    Weights (safetensors, in `dtype`), config, generation config and tokenizer; complete or not there at all.
    kept: what stays of each weight; None: all of it. With all layers and widths it is the teacher. Raises ConfigError
    for a bad list, and for an architecture whose layers cannot be taken apart this way. Costs the teacher's weights in
    host memory once.
    """
    config = read_config(teacher_path, revision, "teacher")
    chosen = check_layers(layers, _num_layers(config))
    teacher = load_causal_lm(teacher_path, revision, dtype)
    prefix = _layers_prefix(teacher)
    new_index = {old: new for new, old in enumerate(chosen)}
    weights: dict[str, Tensor] = {}
    for name, tensor in teacher.state_dict().items():
        if name.startswith(prefix):
            old, rest = name.removeprefix(prefix).split(".", 1)
            if int(old) in new_index:
                cut = tensor if kept is None else kept.cut(name, tensor, int(old))
                weights[f"{prefix}{new_index[int(old)]}.{rest}"] = cut
        else:
            weights[name] = tensor if kept is None else kept.cut(name, tensor, None)

    # A fresh model numbers its own layers (self_attn.layer_idx); copies of the teacher's would keep the old numbers.
    with quiet(), torch.device("meta"):
        student = AutoModelForCausalLM.from_config(_cut_config(config, chosen, kept), dtype=teacher.dtype)
    try:
        student.load_state_dict(weights, strict=True, assign=True)
    except RuntimeError as error:
        raise ConfigError(
            f"{type(teacher).__name__}: layers {chosen} do not fit together: {' '.join(str(error).split())[:300]}"
        ) from error
    student.tie_weights()
    if teacher.generation_config is not None:
        student.generation_config = teacher.generation_config
    tokenizer = load_tokenizer(teacher_path, revision)
    with atomic_folder(out_dir) as folder, quiet():
        student.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def config_of_layers(config: PreTrainedConfig, layers: int | Sequence[int]) -> PreTrainedConfig:
    """The config of a student made of these of the teacher's layers, or of a number of them not yet chosen.

    The widths are the teacher's: what has a name in a student of other widths has it in this one.
    """
    return _cut_config(config, list(range(layers)) if isinstance(layers, int) else list(layers), kept=None)


def config_of_init(config: PreTrainedConfig, init: StudentInit) -> PreTrainedConfig:
    """The config of the student that is made of a teacher with this config, layers and widths."""
    values = config_of_layers(config, init.layers).to_dict()
    if asked := asked_widths(init):
        values |= config_values(config, check_widths(config, asked))
    return type(config).from_dict(values)


def _cut_config(config: PreTrainedConfig, chosen: list[int], kept: Kept | None) -> PreTrainedConfig:
    """A fresh config with the chosen layers; per-layer lists (layer_types, no_rope_layers, ...) are cut alike.

    Marks of a quantised origin (GGUF) are left behind: a config copied with them cannot be saved.
    """
    total = _num_layers(config)
    values = config.to_dict()
    count_key = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    values[count_key] = len(chosen)
    for name in ("quantization_config", "_pre_quantization_dtype"):
        values.pop(name, None)
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == total:
            values[name] = [value[i] for i in chosen]
    if kept is not None:
        values |= config_values(config, kept.widths)
    return type(config).from_dict(values)


def _num_layers(config: PreTrainedConfig) -> int:
    if config.get_text_config() is not config or not hasattr(config, "num_hidden_layers"):
        raise ConfigError(
            f"student.init does not know the layers of model_type '{config.model_type}'; use student.model"
        )
    return int(config.num_hidden_layers)


def _layers_of(model: nn.Module) -> nn.ModuleList:
    layers = getattr(decoder_of(model), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise ConfigError(f"{type(base_causal_lm(model)).__name__} has no list of decoder layers; use student.model")
    return layers


def _layers_prefix(model: "PreTrainedModel") -> str:
    layers = _layers_of(model)
    return next(name for name, module in model.named_modules() if module is layers) + "."
