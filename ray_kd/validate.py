"""Everything that can be refused before a process is started or a GPU is asked for.

Raises ConfigError (exit code 64) with one line: the key, the value seen, the values allowed.
"""

import importlib.util
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ray_kd import cluster, objectives, plugins, schedules, storage, trackers
from ray_kd.config import (
    SHARED,
    STRICT,
    Lora,
    Loss,
    OneOfTeachers,
    RunConfig,
    Student,
    StudentInit,
    Teacher,
    Train,
    each_teacher,
    has_frozen,
)
from ray_kd.errors import ConfigError
from ray_kd.payloads import FEATURES, HIDDEN_STATES, TOPK_LOGPROBS
from ray_kd.payloads.topk_logprobs import MAX_DRAWS, WIRES
from ray_kd.teacher.cache import DISABLED, MODES
from ray_kd.teacher.engine import SAMPLE, SELECTIONS, TOPK
from ray_kd.trainer.schedule import SCHEDULES

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_CHOICES = {
    "teacher.cache.mode": MODES,
    "teacher.payload": (TOPK_LOGPROBS, HIDDEN_STATES, FEATURES),
    "teacher.selection": SELECTIONS,
    "teacher.vocabulary": (STRICT, SHARED),
    "student.dtype": ("float32", "bfloat16", "float16"),
    "student.liger": ("auto", "never"),
    "teacher.dtype": ("auto", "float32", "bfloat16", "float16"),
    "teacher.wire": WIRES,
    "train.schedule": SCHEDULES,
    "train.zero_stage": (0, 1, 2, 3),
    "eval.kl": ("exact", "topk"),
}
_AT_LEAST = {
    "data.sequence_length": 2, "teacher.top_k": 1, "teacher.batch_size": 1, "teacher.batch_tokens": 1,
    "teacher.run_ahead_rows": 1, "teacher.threads": 1, "teacher.pool.min_actors": 1, "teacher.pool.max_actors": 1,
    "teacher.pool.num_gpus": 0, "teacher.cache.file_rows": 1, "loss.chunk_size": 1, "teacher.max_bytes_per_token": 1,
    "train.gpus_per_worker": 0, "train.micro_batch_size": 1, "train.global_batch_size": 1, "train.epochs": 1,
    "train.max_steps": 1, "train.warmup_steps": 0, "train.weight_decay": 0, "train.max_grad_norm": 0,
    "train.checkpoint_every": 0, "train.keep_checkpoints": 1, "train.eval_every": 0, "train.log_every": 1,
    "train.max_bad_steps": 0, "train.max_failures": 0, "train.threads_per_worker": 1, "eval.max_rows": 0,
    "eval.batch_size": 1, "eval.max_new_tokens": 1, "cluster.wait_s": 0, "run.seed": 0,
}  # fmt: skip
_POSITIVE = (
    "teacher.timeout_s", "teacher.pool.num_cpus", "train.cpus_per_worker", "train.resize_every_s",
    "train.learning_rate", "train.timeout_s",
)  # fmt: skip


@dataclass(frozen=True)
class Models:
    """What validation learned about the two models."""

    teacher: "PreTrainedConfig"
    student: "PreTrainedConfig | None"  # None when the student is made from the teacher
    vocab_size: int  # of the teacher's distributions


def check_values(config: RunConfig) -> None:
    """The values of keys that are no plug-ins, at once: what looks at plug-ins imports torch, which takes seconds."""
    for one, alone in each_teacher(config):
        with _named(one):
            _check_values(alone)


def check_settings(config: RunConfig) -> None:
    """What the config alone shows to be wrong: values, and which of them go together."""
    check_values(config)
    for one, alone in each_teacher(config):
        with _named(one):
            _check_pool(alone.teacher)
    _check_combinations(config)
    _check_teachers(config)
    _check_trackers(config)


def _check_pool(teacher: Teacher) -> None:
    pool = teacher.pool
    _require(pool.max_actors >= pool.min_actors, "teacher.pool.max_actors", pool.max_actors,
             f"teacher.pool.min_actors={pool.min_actors} or more")  # fmt: skip
    _require(pool.num_gpus <= 1 or pool.num_gpus % 1 == 0, "teacher.pool.num_gpus", pool.num_gpus,
             "a fraction up to 1, or a whole number")  # fmt: skip
    _, options = plugins.options("teacher.engines", teacher.engine, "teacher.engine")
    split_over = getattr(options, "tensor_parallel_size", None)
    stages = (getattr(options, "options", None) or {}).get("pipeline_parallel_size", 1)
    is_right = split_over is None or split_over * stages == max(1, pool.num_gpus) or pool.num_gpus == 0
    _require(is_right, "teacher.engine.tensor_parallel_size", split_over,
             f"{max(1, pool.num_gpus) / stages:g} (teacher.pool.num_gpus / pipeline_parallel_size)")  # fmt: skip
    taken = getattr(options, "gpu_memory_utilization", None)
    if taken is not None and 0 < pool.num_gpus < min(1, taken):
        logger.warning("teacher.engine.gpu_memory_utilization=%g is more of the GPU than teacher.pool.num_gpus=%g: "
                       "what shares it may find no memory", taken, pool.num_gpus)  # fmt: skip


@contextmanager
def _named(one: OneOfTeachers | None) -> Iterator[None]:
    """Say which of several teachers a ConfigError is about."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(str(error) if one is None else f"teachers: '{one.name}': {error}") from error


def _check_teachers(config: RunConfig) -> None:
    """What several teachers need of each other and of the rest."""
    if not config.teachers:
        return
    teacher = config.teacher
    _require(teacher.payload == TOPK_LOGPROBS, "teacher.payload", teacher.payload, f"{TOPK_LOGPROBS} with teachers")
    _require(teacher.selection == TOPK, "teacher.selection", teacher.selection, f"{TOPK} with teachers")
    names = [one.name or "" for one in config.teachers]
    for place, one in enumerate(config.teachers):
        key = f"teachers[{place}]"
        is_folder = re.fullmatch(r"\w[\w.-]*", names[place]) is not None
        _require(is_folder, f"{key}.name", one.name, "letters, digits, '_', '-' and '.': a folder has that name")
        _require(names.count(names[place]) == 1, f"{key}.name", one.name,
                 "a name that no other teacher has (by default the last part of its model)")  # fmt: skip
        _require(math.isfinite(one.weight) and one.weight > 0, f"{key}.weight", one.weight, "a positive number")
        _require(one.rows != [], f"{key}.rows", one.rows, "a list of values, or null for all rows")
        _require(one.rows is None or config.data.route_by is not None, f"{key}.rows", one.rows,
                 "null until data.route_by names the column")  # fmt: skip


def _check_trackers(config: RunConfig) -> None:
    """Each once, installed here, and with a disk where it writes to one."""
    kinds: list[str] = []
    for place, value in enumerate(config.run.trackers):
        key = f"run.trackers[{place}]"
        module, options = plugins.options(trackers.GROUP, value, key)
        kind = plugins.kind_of(value)
        _require(kind not in kinds, key, kind, "each tracker once")
        kinds.append(kind)
        missing = [name for name in ("Tracker", "PACKAGE", "writes_to_disk") if not hasattr(module, name)]
        if missing:
            raise ConfigError(f"{key}: kind '{kind}' is no tracker: the module has no {missing[0]}")
        if importlib.util.find_spec(module.PACKAGE) is None:
            raise ConfigError(
                f"{key} is '{kind}' and {module.PACKAGE} is not installed here: pip install '.[trackers]', "
                "or leave it out"
            )
        if module.writes_to_disk(options) and storage.is_remote(storage.path(config.run.dir, "run.dir")):
            raise ConfigError(
                f"{key} '{kind}' writes to a disk and run.dir is '{config.run.dir}': say where with an option of its "
                "own (--help lists them), or leave it out"
            )


def validate(config: RunConfig) -> Models:
    """Check the whole config: values, plug-ins, combinations, GPUs, models and vocabularies, in order of cost."""
    check_data(config)
    check_settings(config)
    check_engines(config)
    warn_without_effect(config)
    cluster.check_local(config)
    return check_models(config)


def check_engines(config: RunConfig) -> None:
    """Whether the engine of each teacher provides what the run needs, and is installed."""
    for one, alone in each_teacher(config):
        with _named(one):
            _check_engine(alone)


def check_data(config: RunConfig) -> None:
    """The data section alone: what `prepare_data` needs. Building the sources checks that their paths exist."""
    for key, value in (("data.source", config.data.source), ("data.eval_source", config.data.eval_source)):
        if value is not None or key == "data.source":
            module, options = plugins.options("data.sources", value, key)
            try:
                module.Source(options)
            except ConfigError as error:
                raise ConfigError(f"{key}: {error}") from error
    module, options = plugins.options("data.formats", config.data.format, "data.format")
    module.Format(options)
    storage.path(config.data.prepared_dir or "", "data.prepared_dir")
    _require(0 <= config.data.eval_fraction < 1, "data.eval_fraction", config.data.eval_fraction, "0 up to below 1")
    _require(0 <= config.data.max_bad_fraction <= 1, "data.max_bad_fraction", config.data.max_bad_fraction, "0 to 1")
    if config.data.eval_source is not None and config.data.eval_fraction > 0:
        raise ConfigError("data.eval_source and data.eval_fraction are both set: allowed is at most one")


def _check_values(config: RunConfig) -> None:
    for key, allowed in _CHOICES.items():
        value = _value(config, key)
        hint = " (YAML reads a bare off as false)" if value is False or value == "False" else ""
        _require(value in allowed, key, value, " | ".join(map(str, allowed)) + hint)
    for key, least in _AT_LEAST.items():
        value = _value(config, key)
        _require(value is None or (math.isfinite(value) and value >= least), key, value, f"{least} or more")
    for key in _POSITIVE:
        value = _value(config, key)
        _require(math.isfinite(value) and value > 0, key, value, "a positive number")


def _check_combinations(config: RunConfig) -> None:
    _require(config.run.seed < 2**32, "run.seed", config.run.seed, "0 up to below 2**32")
    train = config.train
    gpus = train.gpus_per_worker
    _require(gpus <= 1, "train.gpus_per_worker", gpus, "0 to 1: a fraction shares a GPU with teachers")
    _check_workers(train)
    # Two ranks on one GPU: NCCL refuses them.
    _require(gpus == 0 or gpus > 0.5 or train.num_workers == 1, "train.gpus_per_worker", gpus,
             f"0, or above 0.5 with train.num_workers={train.num_workers}: a GPU has room for one of them")  # fmt: skip
    if train.deepspeed:
        from ray_kd.trainer.zero import check_overrides

        check_overrides(train.deepspeed)
    storage.path(config.teacher.cache.path or "", "teacher.cache.path")
    if (config.student.model is None) == (config.student.init is None):
        seen = "neither is" if config.student.model is None else "both are"
        raise ConfigError(f"student.model and student.init: {seen} set, allowed is exactly one (the other null)")
    _check_lora(config.student)
    if config.student.dtype == "float16" and train.gpus_per_worker == 0:
        # Of the CPUs of a cluster nothing is known here.
        if cluster.address(config) is None and not _cpu_has_float16():
            raise ConfigError(
                "student.dtype is 'float16': allowed is float32 | bfloat16 with train.gpus_per_worker=0 on this CPU, "
                "which has no instructions for it"
            )
        logger.warning("student.dtype=float16 on CPU is slow and exists for tests; float32 or bfloat16 is better")

    objectives.check_terms(config)
    for key in objectives.idle_terms(config, train.max_steps):
        logger.warning("%s.weight is 0 at every step: the term has no effect", key)
    loss = config.loss
    if config.teacher.payload == HIDDEN_STATES:
        from ray_kd.losses.tail import TAILS

        _require(loss.tail in TAILS, "loss.tail", loss.tail, " | ".join(TAILS))
        wires = plugins.load("payloads", HIDDEN_STATES).WIRES
        _require(config.teacher.wire in wires, "teacher.wire", config.teacher.wire,
                 f"{' | '.join(wires)} with teacher.payload={HIDDEN_STATES}")  # fmt: skip
        _require(config.teacher.selection != SAMPLE, "teacher.selection", SAMPLE,
                 f"topk with teacher.payload={HIDDEN_STATES}, which sends everything")  # fmt: skip
    if config.teacher.selection == SAMPLE:
        kind = plugins.kind_of(loss.divergence)
        if (kind, loss.tail) != ("forward_kl", "drop"):
            raise ConfigError(
                f"teacher.selection is 'sample' with loss.divergence={kind} and loss.tail={loss.tail}: "
                "allowed is forward_kl with drop, the only gradient that draws leave unbiased"
            )
        _require(config.teacher.top_k <= MAX_DRAWS, "teacher.top_k", config.teacher.top_k, f"1 to {MAX_DRAWS} draws")


def _cpu_has_float16() -> bool:
    """What DeepSpeed's CPU accelerator asks of torch before it takes fp16; it is seconds to import."""
    import torch

    return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported())


def _check_lora(student: Student) -> None:
    if (lora := student.lora) is None:
        return
    _require(lora.r >= 1, "student.lora.r", lora.r, "1 or more")
    _require(lora.alpha >= 1, "student.lora.alpha", lora.alpha, "1 or more")
    _require(0 <= lora.dropout < 1, "student.lora.dropout", lora.dropout, "0 up to below 1")
    targets = lora.target_modules
    is_list = isinstance(targets, list) and bool(targets) and all(isinstance(name, str) for name in targets)
    _require(targets == Lora.target_modules or is_list, "student.lora.target_modules", targets,
             f"{Lora.target_modules}, or a list of linear layers' names, for example [q_proj, v_proj]")  # fmt: skip
    _require(not student.freeze, "student.freeze", student.freeze,
             "[] with student.lora, which freezes all but the adapters (target_modules places them)")  # fmt: skip


def _check_workers(train: Train) -> None:
    """Any number of workers that Ray may start has a whole part of the global batch."""
    number = train.num_workers
    numbers = number if isinstance(number, list) else [number]
    is_range = len(numbers) == (2 if isinstance(number, list) else 1)
    is_range = is_range and all(isinstance(n, int) and not isinstance(n, bool) for n in numbers)
    _require(is_range and 1 <= numbers[0] <= numbers[-1], "train.num_workers", number,
             "1 or more, or [min, max] of such, the smaller one first")  # fmt: skip
    if not isinstance(number, list):
        unit = number * train.micro_batch_size
        _require(train.global_batch_size % unit == 0, "train.global_batch_size", train.global_batch_size,
                 f"a multiple of num_workers x micro_batch_size = {unit}")  # fmt: skip
        return
    micro_batches = train.global_batch_size / train.micro_batch_size
    unfit = [n for n in range(numbers[0], numbers[1] + 1) if micro_batches % n]
    _require(not unfit, "train.num_workers", number,
             f"a range of which every number divides global_batch_size / micro_batch_size = {micro_batches:g}, since "
             f"Ray may start any of them; {', '.join(map(str, unfit))} {'do' if len(unfit) > 1 else 'does'} not",
    )  # fmt: skip


def warn_without_effect(config: RunConfig) -> None:
    """Warn of each setting that changes nothing. The settings have been checked."""
    from ray_kd import models
    from ray_kd.losses.objective import make_objective

    cache = config.teacher.cache
    idle: dict[str, str | bool] = {
        "teacher.cache.path": cache.path is not None and cache.mode == DISABLED and "teacher.cache.mode is disabled",
        "data.route_by": config.data.route_by is not None
        and all(one.rows is None for one in config.teachers)
        and f"{'none of teachers has rows' if config.teachers else 'there are no teachers'}, so it only keeps its "
        "values apart",
    }
    sections = [("teacher" if one is None else f"teachers.{one.name}", alone.teacher)
                for one, alone in each_teacher(config)]  # fmt: skip
    for name, teacher in sections:
        engine, _ = plugins.options("teacher.engines", teacher.engine, "teacher.engine")
        kind = plugins.kind_of(teacher.engine)
        idle[f"{name}.batch_tokens"] = (
            teacher.batch_tokens is not None
            and not getattr(engine.Engine, "takes_batch_tokens", False)
            and f"teacher.engine '{kind}' does not take it"
        )
        idle[f"{name}.dtype"] = (
            teacher.dtype != Teacher.dtype
            and not engine.Engine.is_local_model
            and f"teacher.engine '{kind}' loads no weights"
        )
    for one in config.teachers:
        others = [other for other in config.teachers if other is not one]
        idle[f"teachers.{one.name}.weight"] = (
            one.weight != OneOfTeachers.weight
            and not any(_share_rows(one, other) for other in others)
            and "no other teacher answers its rows"
        )
    models_of: list[tuple[str, Teacher | Student]] = [*sections, ("student", config.student)]
    for name, section in models_of:
        is_folder = section.model is not None and models.is_local(section.model)
        idle[f"{name}.revision"] = section.revision is not None and is_folder and f"{name}.model is a folder"
    is_dense = config.teacher.payload == HIDDEN_STATES
    idle["teacher.top_k"] = (
        is_dense
        and config.teacher.top_k != Teacher.top_k
        and config.eval.kl == "exact"
        and f"teacher.payload={HIDDEN_STATES} sends everything"
    )
    idle["loss.temperature"] = (
        schedules.parse(config.loss.temperature, "loss.temperature").values != (1.0,)
        and make_objective(config.loss.divergence, tail=None).compares_logits
        and f"a {plugins.kind_of(config.loss.divergence)} of logits is the same at any"
    )
    idle["loss.tail"] = is_dense and config.loss.tail != Loss.tail and f"teacher.payload={HIDDEN_STATES} leaves no tail"
    init = config.student.init
    idle["student.init.calibration_rows"] = (
        init is not None
        and init.calibration_rows != StudentInit.calibration_rows
        and isinstance(init.layers, list)
        and not models.asked_widths(init)
        and "the layers are listed and keep their widths"
    )
    joins = cluster.address(config) is not None
    is_elastic = isinstance(config.train.num_workers, list)
    idle["the range of train.num_workers"] = is_elastic and not joins and "a local Ray always has room for the most"
    idle["train.resize_every_s"] = (
        config.train.resize_every_s != Train.resize_every_s and not is_elastic and "train.num_workers is one number"
    )
    idle["cluster.dashboard"] = config.cluster.dashboard is not None and joins and "the cluster has its own"
    for key, reason in idle.items():
        if reason:
            logger.warning("%s has no effect: %s", key, reason)


def _share_rows(one: OneOfTeachers, other: OneOfTeachers) -> bool:
    return one.rows is None or other.rows is None or not set(one.rows).isdisjoint(other.rows)


def check_models(config: RunConfig) -> Models:
    """Whether all models are there, can be used, and go together. The settings have been checked."""
    from ray_kd import models

    teacher_key = config.teacher
    found = []
    for place, (one, alone) in enumerate(each_teacher(config)):
        with _named(one):
            found.append(_check_teacher(alone, lends_layers=config.student.init is not None and place == 0))
    teacher = found[0]
    _check_same_tokens(config, found)
    student = None
    if config.student.model is not None:
        student = models.check_model(config.student.model, config.student.revision, "student")
        for warning in models.compare_vocabularies(
            models.load_tokenizer(teacher_key.model, teacher_key.revision),
            models.load_tokenizer(config.student.model, config.student.revision),
            teacher.vocab_size,
            student.vocab_size,
            vocabulary=teacher_key.vocabulary,
        ):
            logger.warning("%s", warning)
        if models.model_identity(teacher_key.model, teacher_key.revision) == models.model_identity(
            config.student.model, config.student.revision
        ):
            logger.warning("teacher and student are the same model: the distillation loss starts at 0")
    elif config.student.init is not None:
        check_init(config.student.init, teacher)
    objectives.check_models(config, teacher, student)
    if has_frozen(config.student):
        _check_trainable(config.student, student or teacher)
    models.require_plain_head(student or teacher)  # a student made of the teacher's layers has its head
    for (one, _), model in zip(each_teacher(config), found, strict=True):
        _check_length(config.data.sequence_length, "teacher" if one is None else f"teacher '{one.name}'", model)
    if student is not None:
        _check_length(config.data.sequence_length, "student", student)
    return Models(teacher, student, _vocab_size(config, [*found, student or teacher]))


def _vocab_size(config: RunConfig, found: "Sequence[PreTrainedConfig]") -> int:
    """Of the teachers' distributions; found: of all models, a teacher first."""
    from ray_kd import models

    shared = models.shared_vocab_size(config.teacher)
    if shared is None:
        return int(found[0].vocab_size)
    if all(model.vocab_size == shared for model in found):
        logger.warning("teacher.vocabulary has no effect: all heads have one row for each of the %d ids", shared)
    return shared


def _check_engine(config: RunConfig) -> None:
    """Whether the engine of a single teacher provides what the run needs, and is installed."""
    teacher = config.teacher
    engine, _ = plugins.options("teacher.engines", teacher.engine, "teacher.engine")
    _check_needs(config, engine.Engine)
    is_by_topk = _is_evaluated_by_topk(config, engine.Engine)
    _require(not is_by_topk or TOPK_LOGPROBS in engine.Engine.provides, "eval.kl", config.eval.kl,
             f"exact with teacher.engine '{plugins.kind_of(teacher.engine)}', which sends no {TOPK_LOGPROBS}",
    )  # fmt: skip
    package = getattr(engine.Engine, "package", None)
    # Of a cluster's nodes nothing is known here.
    if package is not None and cluster.address(config) is None and importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"teacher.engine is '{plugins.kind_of(teacher.engine)}' and {package} is not installed here: "
            f"pip install '.[{package}]', or another engine"
        )


def _is_evaluated_by_topk(config: RunConfig, engine: Any) -> bool:
    return config.eval.kl == "topk" or not engine.is_local_model


def _check_teacher(config: RunConfig, lends_layers: bool) -> "PreTrainedConfig":
    """The model of a single teacher."""
    from ray_kd import models

    teacher = config.teacher
    engine, _ = plugins.options("teacher.engines", teacher.engine, "teacher.engine")
    needs_weights = engine.Engine.is_local_model or lends_layers
    found = models.check_model(teacher.model, teacher.revision, "teacher", needs_weights)
    vocab_size = models.shared_vocab_size(teacher) or found.vocab_size
    _require(vocab_size <= found.vocab_size, "teacher.vocabulary", teacher.vocabulary,
             f"{STRICT}: the tokenizer has {vocab_size} ids and the teacher's head only {found.vocab_size} rows",
    )  # fmt: skip
    check_top_k(config, vocab_size)
    return found


def check_top_k(config: RunConfig, vocab_size: int) -> None:
    """Whether a single teacher's distribution has as many tokens as it is asked for, if it is."""
    engine, _ = plugins.options("teacher.engines", config.teacher.engine, "teacher.engine")
    needs_topk = config.teacher.payload != HIDDEN_STATES or _is_evaluated_by_topk(config, engine.Engine)
    _require(not needs_topk or config.teacher.top_k <= vocab_size, "teacher.top_k", config.teacher.top_k,
             f"at most the teacher's vocabulary of {vocab_size}")  # fmt: skip


def _check_same_tokens(config: RunConfig, found: "Sequence[PreTrainedConfig]") -> None:
    """Refuse teachers that mean other tokens by the same ids."""
    from ray_kd import models

    for one, model in zip(config.teachers[1:], found[1:], strict=True):
        first = config.teachers[0]
        if model.vocab_size != found[0].vocab_size and config.teacher.vocabulary == STRICT:
            raise ConfigError(
                f"teachers: '{one.name}' has a vocabulary of {model.vocab_size}: allowed is that of '{first.name}', "
                f"{found[0].vocab_size}"
            )
        models.compare_vocabularies(
            models.load_tokenizer(first.model, first.revision), models.load_tokenizer(one.model, one.revision),
            found[0].vocab_size, model.vocab_size, names=(f"teacher '{first.name}'", f"teacher '{one.name}'"),
            vocabulary=config.teacher.vocabulary,
        )  # fmt: skip


def _check_needs(config: RunConfig, engine: Any) -> None:
    """What payload and loss need is what the engine provides; the message says which engine would do."""
    needs: list[tuple[str, Any, Callable[[Any], list[Any]]]] = [("teacher.payload", config.teacher.payload, _payloads)]
    if config.teacher.payload != HIDDEN_STATES:
        needs.append(("teacher.selection", config.teacher.selection, _selections))
        if (temperature := objectives.payload_temperature(config)) != 1:
            needs.append(("loss.temperature", temperature, partial(_temperatures, temperature)))
    for key, value, provided in needs:
        if value not in provided(engine):
            group = "teacher.engines"
            kinds = [kind for kind in plugins.available(group) if kind != "fake"]  # which is for tests
            others = [kind for kind in kinds if value in provided(plugins.load(group, kind).Engine)]
            hint = f"; teacher.engine {' or '.join(map(repr, others))} would do" if others else ""
            raise ConfigError(
                f"{key} is {value!r}: allowed is {' | '.join(map(str, provided(engine)))} with teacher.engine "
                f"'{plugins.kind_of(config.teacher.engine)}'{hint}"
            )


def _payloads(engine: Any) -> list[str]:
    """Hidden states are of use beside the head that they go through, which is taken from a model that is here."""
    return sorted(engine.provides if engine.is_local_model else engine.provides - {HIDDEN_STATES})


def _selections(engine: Any) -> list[str]:
    return sorted(getattr(engine, "selections", {TOPK}))  # an engine of a third party may be older than the draws


def _temperatures(temperature: float, engine: Any) -> list[float]:
    return [1, temperature] if getattr(engine, "any_temperature", True) else [1]


def check_init(init: StudentInit, teacher: "PreTrainedConfig") -> None:
    """Whether a student can be made of a teacher with this config."""
    from ray_kd import models

    _require(init.calibration_rows >= 1, "student.init.calibration_rows", init.calibration_rows, "1 or more")
    layers, total = init.layers, teacher.num_hidden_layers
    if isinstance(layers, list):
        models.check_layers(layers, total)
    else:
        is_count = isinstance(layers, int) and not isinstance(layers, bool) and 1 <= layers <= total
        _require(is_count, "student.init.layers", layers, f"1 to {total}, or a list of layer indices")
        _require(init.select == "block_influence", "student.init.select", init.select, "block_influence")
    if asked := models.asked_widths(init):
        models.check_widths(teacher, asked)


def _check_trainable(student: Student, model: "PreTrainedConfig") -> None:
    """model: the student's config, or that of the teacher whose layers it is made of."""
    from ray_kd import models

    if student.init is not None:
        model = models.config_of_layers(model, student.init.layers)
    trained, total = models.check_trainable(model, student.lora, student.freeze)
    logger.info("student: %.3g million of %.4g million parameters train", trained / 1e6, total / 1e6)


def _check_length(sequence_length: int, name: str, model: "PreTrainedConfig") -> None:
    longest = getattr(model, "max_position_embeddings", None)
    if longest is not None and sequence_length > longest:
        logger.warning("data.sequence_length=%d is more than the %s's %d positions", sequence_length, name, longest)


def _value(config: RunConfig, key: str) -> Any:
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def _require(is_right: bool, key: str, value: Any, allowed: str) -> None:
    if not is_right:
        raise ConfigError(f"{key} is {value!r}: allowed is {allowed}")
