"""What of a student trains: everything, all but named parts, or low-rank adapters on a frozen base.

LoRA (https://arxiv.org/abs/2106.09685) replaces W x by W x + (alpha / r) B A x, with A [r, in] random and B [out, r]
zero; DoRA (https://arxiv.org/abs/2402.09353) by m * (W x + (alpha / r) B A x) / |W + (alpha / r) B A|, the norm being
that of each row [in], which is a constant to the gradient (section 4.3), and m [out] beginning as |W|. Either begins as
the base itself, and can be merged into W.
Only what trains is in the optimizer and in checkpoints: the base model has the rest.

Entries of `student.freeze`:
    embeddings, head    the input embeddings, the output projection
    layers.2            a decoder layer; layers.0-3 four of them
    *.mlp.*             anything else is a pattern of parameter names, as a shell has it
"""

import copy
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ray_kd import plugins
from ray_kd.config import Lora
from ray_kd.errors import ConfigError
from ray_kd.models.decoder import base_causal_lm, decoder_of
from ray_kd.models.load import quiet

if TYPE_CHECKING:  # seconds to import, which a run without adapters can do without
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

_ALL_LINEAR = Lora.target_modules
_LAYERS = re.compile(r"layers\.(\d+)(?:-(\d+))?")
_LINEAR = (nn.Linear, Conv1D)


def choose_trainable(model: nn.Module, lora: Lora | None, freeze: Sequence[str], seed: int = 0) -> nn.Module:
    """The loaded model with `requires_grad` set as `student.lora` and `student.freeze` say; for adapters in a wrapper.

    seed: of the adapters' initial values, equal on all ranks; the caller's random state is left as it was.
    Raises ConfigError for what the model does not have, and for freezing all of it. Also for a model on the meta
    device, which `check_trainable` makes of a config.
    """
    if lora is not None:
        return _with_adapters(model, lora, seed)
    if freeze:
        _freeze(model, freeze)
    return model


def check_trainable(config: PreTrainedConfig, lora: Lora | None, freeze: Sequence[str]) -> tuple[int, int]:
    """(parameters that would train, all parameters) of a model with this config; raises as `choose_trainable` does.

    Makes its modules without their weights: milliseconds to a second.
    """
    with quiet(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
        total = sum(p.numel() for p in model.parameters())
        chosen = choose_trainable(model, lora, freeze)
    return sum(p.numel() for p in chosen.parameters() if p.requires_grad), total


@torch.no_grad()
def load_trained(model: nn.Module, trained: Iterable[tuple[str, Tensor]]) -> None:
    """Put what a checkpoint holds, (name, tensor), into the parameters of the model that train.

    Raises ConfigError when these are not exactly the ones given.
    """
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, tensor in trained:
        parameter = wanted.pop(name, None)
        if parameter is None or parameter.shape != tensor.shape:
            raise ConfigError(f"the checkpoint has {name} {list(tensor.shape)}, which does not train in this student")
        parameter.copy_(tensor)
    if wanted:
        raise ConfigError(f"the checkpoint lacks {len(wanted)} parameters that train, first {next(iter(wanted))}")


def adapter_state(model: nn.Module, base: str, revision: str | None) -> "tuple[LoraConfig, dict[str, Tensor]]":
    """Configuration and weights (copies, named as peft saves them) of a model's adapters, without the base.

    base, revision: the model they belong to, as the configuration names it.
    """
    from peft import get_peft_model_state_dict

    wrapper: Any = model
    config = copy.deepcopy(wrapper.peft_config["default"])
    config.base_model_name_or_path, config.revision, config.inference_mode = base, revision, True
    config.target_modules = sorted(config.target_modules)  # a set, saved in an order of its own in each process
    state = get_peft_model_state_dict(wrapper, save_embedding_layers=False)
    return config, {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in state.items()}


def save_adapter(config: "LoraConfig", weights: dict[str, Tensor], folder: Path) -> None:
    """Write what `adapter_state` returned so that `peft.PeftModel.from_pretrained(base, folder)` reads it."""
    folder.mkdir()
    config.save_pretrained(str(folder))
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_adapters(model: nn.Module) -> "PreTrainedModel":
    """The transformers model with each update added to its weight, in place: the wrapper is of no use afterwards."""
    wrapper: Any = model
    return base_causal_lm(wrapper.merge_and_unload())


def _with_adapters(model: nn.Module, options: Lora, seed: int) -> "PeftModel":
    _check_targets(model, options.target_modules)
    from peft import LoraConfig, get_peft_model

    base = base_causal_lm(model)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.r,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.target_modules,
        use_dora=options.use_dora,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return get_peft_model(base, config)


def _check_targets(model: nn.Module, targets: Any) -> None:
    """Refuse names that are of no linear layer of the decoder: peft is content if one of several matches."""
    if targets == _ALL_LINEAR:
        return
    base = base_causal_lm(model)
    modules, head = dict(base.named_modules()), base.get_output_embeddings()
    linear = [name for name, module in modules.items() if isinstance(module, _LINEAR) and module is not head]
    last_parts = sorted({name.rpartition(".")[2] for name in linear})
    allowed = f"allowed is {_ALL_LINEAR}, or a list of linear layers' names: {', '.join(last_parts)}"
    for target in targets:
        named = [modules[name] for name in modules if name == target or name.endswith(f".{target}")]
        if not named:
            why = f"which matches nothing in {type(base).__name__}{plugins.nearest(target, last_parts)}"
        elif any(module is head for module in named):
            why = "the head: it stays frozen, since the loss reads its weight alone"
        elif other := [module for module in named if not isinstance(module, _LINEAR)]:
            why = f"a {type(other[0]).__name__}"
        else:
            continue
        raise ConfigError(f"student.lora.target_modules has '{target}', {why}; {allowed}")


def _freeze(model: nn.Module, parts: Sequence[str]) -> None:
    frozen = {id(p) for part in parts for p in _parameters_of(model, part)}
    base = base_causal_lm(model)
    embeddings: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    is_tied = head is not None and head.weight is embeddings.weight
    if is_tied and id(head.weight) in frozen and not {"embeddings", "head"} <= set(parts):
        raise ConfigError(
            f"student.freeze is {list(parts)}: this student's head is its embeddings (they are tied); allowed is both "
            "of 'embeddings' and 'head', or neither"
        )
    if all(id(p) in frozen for p in model.parameters()):
        raise ConfigError(f"student.freeze is {list(parts)}, which is all of the student: nothing would be trained")
    for p in model.parameters():
        if id(p) in frozen:
            p.requires_grad_(False)


def _parameters_of(model: nn.Module, part: str) -> list[nn.Parameter]:
    """The parameters that an entry of `student.freeze` names. Raises ConfigError when it names none."""
    base = base_causal_lm(model)
    layers = getattr(decoder_of(model), "layers", None)
    num_layers = len(layers) if isinstance(layers, nn.ModuleList) else 0
    if part in ("embeddings", "head"):
        module: Any = base.get_input_embeddings() if part == "embeddings" else base.get_output_embeddings()
        found = [] if module is None else list(module.parameters())
    elif (match := _LAYERS.fullmatch(part)) is not None:
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise ConfigError(
                f"student.freeze has '{part}': allowed is layers.0 to layers.{num_layers - 1}, or layers.FIRST-LAST"
                if num_layers
                else f"student.freeze has '{part}', and {type(base).__name__} has no list of decoder layers: "
                "allowed is a pattern of parameter names"
            )
        assert isinstance(layers, nn.ModuleList)
        found = [p for layer in layers[first : last + 1] for p in layer.parameters()]
    else:
        found = [p for name, p in model.named_parameters() if fnmatchcase(name, part)]
    if not found:
        raise ConfigError(
            f"student.freeze has '{part}', which matches nothing in {type(base).__name__}; allowed is embeddings, "
            f"head, layers.N, layers.FIRST-LAST, or a pattern of parameter names such as '*.mlp.*'"
        )
    return found
