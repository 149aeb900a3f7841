"""Load a causal LM and its tokenizer: safetensors only, no code from the model's folder, no progress bars."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from ray_kd.config import SHARED, STRICT, Teacher
from ray_kd.errors import ConfigError
from ray_kd.models.decoder import base_causal_lm
from ray_kd.models.folder import local_folder, why_not

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DTYPES = ("auto", "float32", "bfloat16", "float16")


def torch_dtype(dtype: str) -> torch.dtype | str:
    """ "auto" or the torch dtype of that name. Raises ConfigError for any other."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype '{dtype}' is unknown; allowed: {', '.join(DTYPES)}")
    return dtype if dtype == "auto" else getattr(torch, dtype)


def load_causal_lm(
    path: str,
    revision: str | None = None,
    dtype: str = "auto",
    device: str | torch.device = "cpu",
    device_map: str | Mapping[str, int | str] | None = None,
    attn_implementation: str | None = None,
) -> "PreTrainedModel":
    """The model in eval mode on `device`, with sdpa attention where the architecture has it, else eager.

    attn_implementation: of transformers, in place of that choice; "eager" is the one that gives attention maps.
    dtype: "auto" (as saved) | "float32" | "bfloat16" | "float16". device_map: spread over devices by accelerate, in
    place of `device`; "auto" and the like, or module -> device (https://huggingface.co/docs/accelerate). Input
    embeddings and head may then lie apart. Raises ConfigError when the weights cannot be read or do not fill the model:
    transformers would start missing ones at random and go on; and for a device_map that cannot be used.
    """
    source = local_folder(path)
    if device_map is not None and importlib.util.find_spec("accelerate") is None:
        raise ConfigError(f"spreading model '{path}' over devices needs accelerate: pip install '.[multi-gpu]'")
    with quiet():
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
            architecture: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                revision=revision,
                dtype=torch_dtype(dtype),
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation=attn_implementation or ("sdpa" if architecture._supports_sdpa else "eager"),
                output_loading_info=True,
                device_map=device_map,
            )
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"model '{path}' cannot be loaded: {why_not(error)}") from error
    model, info = loaded
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ConfigError(f"model '{path}': {len(wrong)} weights are missing or of another shape, first {wrong[0]}")
    if device_map is None:
        return model.to(device).eval()
    _check_placement(model, path, device_map)
    return model.eval()


def load_tokenizer(path: str, revision: str | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer of a model folder or hub id. Raises ConfigError when there is none."""
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(local_folder(path), revision=revision, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(f"model '{path}' has no usable tokenizer: {why_not(error)}") from error


def num_token_ids(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The largest id of a token, and one: rows of a head from there on are padding (Qwen2.5: 151665 of 151936)."""
    return max(tokenizer.get_vocab().values()) + 1


def shared_vocab_size(teacher: Teacher) -> int | None:
    """The ids that the teacher's distributions are over, where they are not all of its head's; reads its tokenizer."""
    if teacher.vocabulary != SHARED:
        return None
    return num_token_ids(load_tokenizer(teacher.model, teacher.revision))


def compare_vocabularies(
    teacher_tokenizer: "PreTrainedTokenizerBase",
    student_tokenizer: "PreTrainedTokenizerBase",
    teacher_vocab: int,
    student_vocab: int,
    names: tuple[str, str] = ("teacher", "student"),
    vocabulary: str = STRICT,
) -> list[str]:
    """Refuse a teacher and a student whose token ids mean different things; returns warnings.

    names: what the two are called in messages. vocabulary: `teacher.vocabulary`.

    teacher_vocab, student_vocab: rows of the models' heads (`config.vocab_size`), which may exceed the tokenizers'.
    Raises ConfigError (one line, both sizes and the first tokens that differ) when an id stands for different tokens,
    special ones included, when a head has no row for a token, and, if `strict`, when it has more rows than the other.
    Different *roles* of equal tokens (a base and an instruct model with another eos) are only warned about.
    """
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    if teacher != student:
        by_id = [{index: token for token, index in vocabulary.items()} for vocabulary in (teacher, student)]
        differing = [i for i in sorted(by_id[0].keys() | by_id[1].keys()) if by_id[0].get(i) != by_id[1].get(i)]
        shown = ", ".join(f"{i}: {by_id[0].get(i)!r} / {by_id[1].get(i)!r}" for i in differing[:3])
        raise ConfigError(
            f"{' and '.join(names)} have different vocabularies ({len(teacher)} and {len(student)} tokens;"
            f" {len(differing)} ids differ, {' / '.join(names)} {shown})"
        )
    needed = num_token_ids(student_tokenizer)
    for name, rows in zip(names, (teacher_vocab, student_vocab), strict=True):
        if needed > rows:
            raise ConfigError(f"the tokenizer has {needed} ids and the {name}'s head only {rows} rows")
    if teacher_vocab != student_vocab and vocabulary != SHARED:
        raise ConfigError(
            f"the {names[0]}'s head has {teacher_vocab} rows and the {names[1]}'s {student_vocab}, for the same "
            f"{needed} ids of tokens: teacher.vocabulary is '{vocabulary}', allowed is {SHARED} (the rest is left out)"
        )
    warnings = []
    for role in ("bos_token", "eos_token", "pad_token"):
        ours, theirs = getattr(student_tokenizer, role), getattr(teacher_tokenizer, role)
        if ours != theirs:
            warnings.append(f"{role} is {theirs!r} for the teacher and {ours!r} for the student")
    return warnings


def apply_liger(model: nn.Module) -> bool:
    """Replace norms, rotary embedding and MLP of a loaded student by Liger's Triton kernels; whether it was done.

    False without CUDA (the kernels need a GPU driver) and for architectures Liger does not know. Its fused linear
    cross-entropy stays off: the loss here has its own. Not run on a GPU by this project's tests.
    """
    if not torch.cuda.is_available():
        return False
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN, _apply_liger_kernel_to_instance

    base = base_causal_lm(model)
    if base.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        return False
    _apply_liger_kernel_to_instance(model=base, fused_linear_cross_entropy=False, cross_entropy=False)
    return True


def _check_placement(model: "PreTrainedModel", path: str, device_map: str | Mapping[str, int | str]) -> None:
    """Refuse weights that each forward would have to fetch from disk, or from the CPU's memory to a GPU.

    A mapping may say so of layers. Embeddings and head are used without accelerate's hooks, which fetch them.
    """
    num_offloaded = sum(weight.is_meta for weight in model.parameters())
    if num_offloaded and isinstance(device_map, str):
        raise ConfigError(
            f"model '{path}' does not fit: device_map '{device_map}' leaves {num_offloaded} weights to the CPU or the "
            "disk; give it more GPUs"
        )
    ends: tuple[Any, ...] = (model.get_input_embeddings(), model.get_output_embeddings())
    if any(module is not None and module.weight.is_meta for module in ends):
        raise ConfigError(
            f"model '{path}': device_map puts its embeddings or its head on disk, or on the CPU beside GPUs; "
            "give them a device that computes"
        )


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from transformers inside; errors still travel as exceptions."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()
