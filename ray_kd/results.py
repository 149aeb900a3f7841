"""What a run leaves for people: the student as a model folder, its held-out metrics, and samples of its text.

Works from a run folder alone, without Ray: the jobs `export` and `evaluate` call it on a finished or running run.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_kd import checkpoint, cluster, run_folder, storage, summary
from ray_kd.config import RunConfig, Student, StudentInit, each_teacher, has_frozen, to_yaml
from ray_kd.data.prepared import PreparedData
from ray_kd.errors import ConfigError, DataError
from ray_kd.heldout import HeldOut, evaluate_model
from ray_kd.teacher.mixture import parts_of
from ray_kd.teacher.stage import EngineSpec
from ray_kd.trainer import best
from ray_kd.trainer.loop import CHECKPOINTS

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor

logger = logging.getLogger(__name__)


def finish(config: RunConfig, run_dir: Path) -> None:
    """Write final/ and samples.json from the last checkpoint, unless an earlier attempt did."""
    final = run_dir / run_folder.FINAL
    if not (final / "config.json").exists():
        export(config, final, of_writer=True)
    path = run_dir / run_folder.SAMPLES
    if config.eval.prompts and not path.exists():
        run_folder.write_json(path, {"samples": sample(config, str(final))})


def best_step(run_dir: Path) -> int:
    """Step of the run's checkpoint with the lowest held-out KL. Raises ConfigError when none was evaluated."""
    step = best.best_step(run_dir / CHECKPOINTS)
    if step is None:
        raise ConfigError(
            f"run '{run_dir}' has no checkpoint whose step was evaluated: export the newest, or one with --step"
        )
    return step


def export(
    config: RunConfig, out_dir: Path, *, step: int | None = None, dtype: str | None = None, of_writer: bool = False
) -> int:
    """Write the student of a checkpoint of this run as a Hugging Face folder; returns its step.

    step: None for the newest verified checkpoint. dtype: None for the type it was trained in.
    out_dir: of `storage.path`. of_writer: as of `checkpoint.local_copy`.
    Raises ConfigError when there is no such checkpoint or out_dir exists, and for a student of which a part was frozen
    when the model it began as is another one now.
    Host memory: one shard of 4 GB; with frozen parts the model in float32 as well.
    """
    from ray_kd import models
    from ray_kd.export import write_final
    from ray_kd.trainer.fragments import read_parameters

    # In a store a folder counts once its last file is there.
    if (out_dir / "config.json" if storage.is_remote(out_dir) else out_dir).exists():
        raise ConfigError(f"'{out_dir}' exists already: name a new folder")
    with storage.refused_if_unwritable(out_dir):
        storage.make_folder(out_dir.parent)
    run_dir = run_folder.run_dir(config)
    folder = checkpoint.local_copy(_checkpoint(run_dir, step), of_writer=of_writer)
    document = checkpoint.read_state(folder)
    student_path = document["state"]["student_path"]
    parameters, adapter = read_parameters(folder, prefix="student."), None
    if has_frozen(config.student):
        parameters, adapter = _with_frozen(config.student, document["state"], parameters)
    with storage.drafted_folder(out_dir, last="config.json") as draft:
        write_final(
            draft,
            parameters,
            config=models.read_config(student_path, config.student.revision, "student"),
            tokenizer_path=student_path,
            revision=config.student.revision,
            dtype=dtype or config.student.dtype,
            card=_card(config, run_dir, int(document["step"])),
            adapter=adapter,
        )
    return int(document["step"])


def _with_frozen(
    student: Student, state: dict[str, Any], trained: "Iterator[tuple[str, Tensor]]"
) -> "tuple[Iterator[tuple[str, Tensor]], tuple[LoraConfig, dict[str, Tensor]] | None]":
    """All parameters of a student of which a checkpoint holds a part, adapters merged, and the adapters alone."""
    from ray_kd import models

    path = state["student_path"]
    identity = models.model_identity(models.local_folder(path), student.revision)
    if identity != state["student_identity"]:
        raise ConfigError(
            f"'{path}' is not the model that the student was trained on ({identity}, then "
            f"{state['student_identity']}): its frozen parts are not in the checkpoint; put that model back there"
        )
    model = models.choose_trainable(
        models.load_causal_lm(path, student.revision, "float32"), student.lora, student.freeze
    )
    models.load_trained(model, trained)
    if student.lora is None:
        return model.named_parameters(), None
    adapter = models.adapter_state(model, path, student.revision)
    return models.merge_adapters(model).named_parameters(), adapter


def evaluate(config: RunConfig, *, model: str | None = None, max_rows: int | None = None) -> dict[str, Any]:
    """What `heldout.evaluate_model` says of a run's final/ (or of another model folder) on the run's held-out rows.

    Raises ConfigError when there is no such model, DataError when the run has no held-out rows.
    """
    import torch

    from ray_kd import models

    run_dir = run_folder.run_dir(config)
    if model is not None:
        models.check_model(model, None, "student")
    if config.data.eval_source is None and not config.data.eval_fraction:
        raise ConfigError(f"run '{run_dir}' was made without held-out rows: only a run in a new run.dir can have them")
    prepared = PreparedData(run_folder.prepared_of(run_dir, config))
    if prepared.manifest.eval_rows == 0:
        raise DataError(f"run '{run_dir}' has no held-out rows: set data.eval_source or data.eval_fraction")
    threads, on_gpu = cluster.physical_cores(), torch.cuda.is_available()
    torch.set_num_threads(threads)
    spec = held_out(config, prepared, threads, on_gpu=on_gpu, max_rows=max_rows)
    return evaluate_model(spec, student_of(config, model), torch.device("cuda" if on_gpu else "cpu"))


def sample(config: RunConfig, final: str) -> list[dict[str, str]]:
    """What the student answers to `eval.prompts`, as it began and as it is: prompt, before, after. Greedy."""
    import torch

    torch.set_num_threads(cluster.physical_cores())
    prompts, length = config.eval.prompts, config.eval.max_new_tokens
    before = answers(first_student(config), config.student.revision, prompts, length)
    after = answers(final, None, prompts, length)
    return [
        {"prompt": prompt, "before": first, "after": last}
        for prompt, first, last in zip(prompts, before, after, strict=True)
    ]


def answers(path: str, revision: str | None, prompts: Sequence[str], max_new_tokens: int) -> list[str]:
    """A model's greedy answer to each prompt, in float32."""
    from ray_kd import models
    from ray_kd.eval import generate_samples

    model = models.load_causal_lm(path, revision, dtype="float32")
    return generate_samples(model, models.load_tokenizer(path, revision), prompts, max_new_tokens)


def first_student(config: RunConfig) -> str:
    """The model that the run began with, as its newest checkpoint names it. Raises ConfigError without one."""
    document = checkpoint.read_state(_checkpoint(run_folder.run_dir(config), step=None))
    return str(document["state"]["student_path"])


def student_of(config: RunConfig, model: str | None) -> str:
    """A model folder, or where none is named the run's final/. Raises ConfigError where that is not there yet."""
    return model or str(_final(run_folder.run_dir(config)))


def held_out(
    config: RunConfig, prepared: PreparedData, threads: int, *, on_gpu: bool, max_rows: int | None = None
) -> HeldOut:
    """The evaluation of a config; max_rows replaces the configured number."""
    from ray_kd import models

    teacher = config.teacher
    shared = models.shared_vocab_size(teacher)
    whole = models.check_model(teacher.model, teacher.revision, "teacher", needs_weights=False).vocab_size
    parts = parts_of(config, prepared.manifest.routes, shared or whole)
    return HeldOut(
        prepared_dir=str(prepared.folder),
        max_rows=config.eval.max_rows if max_rows is None else max_rows,
        batch_size=config.eval.batch_size,
        teachers=[
            (EngineSpec.of(alone.teacher, threads).beside_student(on_gpu), part)
            for (_, alone), part in zip(each_teacher(config), parts, strict=True)
            if part is None or part.shares.any()
        ],
        top_k=config.teacher.top_k,
        is_exact=config.eval.kl == "exact",
        vocab_size=shared,
    )


def describe_samples(run_dir: Path) -> str:
    """samples.json for a person to read; empty when the run has none."""
    path = run_dir / run_folder.SAMPLES
    samples: list[dict[str, Any]] = json.loads(storage.read_text(path))["samples"] if path.exists() else []
    return "\n".join(
        f"\nprompt:  {s['prompt']}\nbefore:  {_one_line(s['before'])}\nafter:   {_one_line(s['after'])}"
        for s in samples
    )


def _checkpoint(run_dir: Path, step: int | None) -> Path:
    root = run_dir / CHECKPOINTS
    if step is None:
        newest = checkpoint.newest_verified(root)
        if newest is None:
            raise ConfigError(f"run '{run_dir}' has no checkpoint yet")
        return newest
    steps = {checkpoint.step_of(folder): folder for folder in checkpoint.folders(root)}
    if step not in steps:
        raise ConfigError(f"run '{run_dir}' has no checkpoint of step {step}: it has {sorted(steps) or 'none'}")
    try:
        checkpoint.verify(steps[step], full=not storage.is_remote(root))  # else as it is copied
    except checkpoint.CorruptCheckpoint as error:
        raise ConfigError(f"the checkpoint of step {step} is damaged ({error}): choose another") from error
    return steps[step]


def _final(run_dir: Path) -> Path:
    final = run_dir / run_folder.FINAL
    if not (final / "config.json").exists():
        raise ConfigError(f"run '{run_dir}' has no final/ yet: finish it, or name a model with --model")
    return final


def _card(config: RunConfig, run_dir: Path, step: int) -> str:
    from ray_kd import models
    from ray_kd.export import model_card

    content = run_folder.content_of(run_dir)
    init = config.student.init
    teachers = [alone.teacher for _, alone in each_teacher(config)]
    weights = ["teacher weights", *(f"weights of teachers[{place}]" for place in range(1, len(teachers)))]
    return model_card(
        teachers={one.model: content[of] for one, of in zip(teachers, weights, strict=True)},
        student_init=(_init_in_words(init) if init else f"{config.student.model} ({content['student weights']})")
        + _trained_in_words(config.student),
        data_identity=f"prepared data {content['prepared data']}",
        licences={
            "teacher": ", ".join(dict.fromkeys(models.licence_of(one.model, one.revision) for one in teachers)),
            "data": config.data.license or "unknown",
        },
        config_yaml=to_yaml(config),
        metrics=summary.evaluation(run_dir, last_step=step),
    )


def _init_in_words(init: StudentInit) -> str:
    from ray_kd.models import asked_widths

    layers = init.layers
    kept = f"layers {layers}" if isinstance(layers, list) else f"{layers} of the layers ({init.select})"
    narrower = ", ".join(f"{name} {size}" for name, size in asked_widths(init).items())
    return f"{kept} of the teacher{f', cut by activation to {narrower}' if narrower else ''}"


def _trained_in_words(student: Student) -> str:
    if (lora := student.lora) is not None:
        kind = "DoRA" if lora.use_dora else "LoRA"
        return f"; trained: {kind} adapters of rank {lora.r}, merged here and alone in adapter/"
    return f"; not trained: {', '.join(student.freeze)}" if student.freeze else ""


def _one_line(text: str) -> str:
    return " ".join(text.split()) or "(ends at once)"
