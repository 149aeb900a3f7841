"""The models: are they there, do they go together, and how large is the student."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from ray_kd import cluster, validate
from ray_kd.errors import ConfigError
from ray_kd.preflight.report import FAILED, OK, Finding, Subject

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def check_models(subject: Subject) -> Iterator[Finding]:
    """Teachers and student exist, can be used, and mean the same by their ids."""
    subject.models = models = validate.check_models(subject.config)
    yield Finding("models", OK, f"teacher: {_in_words(models.teacher)}; its answers are over {models.vocab_size:,} ids")
    if models.student is not None:
        yield Finding("models", OK, f"student: {_in_words(models.student)}; the same tokenizer")


def check_trained(subject: Subject) -> Iterator[Finding]:
    """What of the student trains, in which type."""
    from ray_kd import models

    assert subject.models is not None
    student, found = subject.config.student, subject.models.student
    if found is None:
        assert student.init is not None  # check_models
        found = models.config_of_init(subject.models.teacher, student.init)
    subject.trained, subject.total = models.check_trainable(found, student.lora, student.freeze)
    made = f", made of the teacher: {_in_words(found, is_saved=False)}" if student.init is not None else ""
    yield Finding(
        "student", OK, f"{subject.trained / 1e6:,.1f} of {subject.total / 1e6:,.1f} million parameters train in "
        f"{student.dtype}{made}",
    )  # fmt: skip
    yield from _check_dtype(subject)


def _check_dtype(subject: Subject) -> Iterator[Finding]:
    """Of GPUs that are here; validation has looked at the CPU."""
    import torch

    config = subject.config
    on_gpu = config.train.gpus_per_worker > 0 and cluster.address(config) is None and torch.cuda.is_available()
    if on_gpu and config.student.dtype == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        name = torch.cuda.get_device_name(0)
        yield Finding(
            "student", FAILED, f"student.dtype is 'bfloat16': {name} has no instructions for it, float16 or float32 "
            "would do", ConfigError.exit_code,
        )  # fmt: skip


def _in_words(model: "PreTrainedConfig", is_saved: bool = True) -> str:
    text = model.get_text_config()
    saved = f", saved in {str(model.dtype).removeprefix('torch.')}" if model.dtype is not None and is_saved else ""
    return (
        f"{model.model_type}, {text.num_hidden_layers} layers of width {text.hidden_size}, "
        f"{text.vocab_size:,} rows in its head{saved}"
    )
