"""The only module that knows all stages: config -> data -> teacher -> trainer -> checkpoint -> export -> eval.

`distill` reads top to bottom. What runs where: preparation as Ray Data tasks, student init as one Ray task on the
teacher pool, the ordered stream as a Ray Data execution under Ray Train's controller, training in its workers.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from ray_kd import (
    checkpoint,
    cluster,
    launch,
    objectives,
    redact,
    refusal,
    results,
    run_folder,
    schema,
    storage,
    submission,
    summary,
    teacher_cache,
)
from ray_kd import config as configuration
from ray_kd.config import Pool, RunConfig, Student, StudentInit
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.errors import EXIT_BUG, EXIT_DONE, RayKDError, RetryableError
from ray_kd.heldout import make_evaluate
from ray_kd.layout import common_labels
from ray_kd.locks import Held, Lost, driver_lock
from ray_kd.payloads import FEATURES, HIDDEN_STATES, hidden_states, topk_logprobs
from ray_kd.progress import Progress
from ray_kd.ray_metrics import Exporter
from ray_kd.teacher import deaths
from ray_kd.teacher.cache import DISABLED, WRITE_THROUGH, Cache
from ray_kd.teacher.engine import Request
from ray_kd.teacher.mixture import Part, parts_of
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from ray_kd.trainer.feed import Expected
from ray_kd.trainer.loop import (
    CHECKPOINTS,
    METRICS,
    QUARANTINE,
    RESIZE_FLAG,
    STOP_FLAG,
    TrainSpec,
    loss_options,
    train,
)
from ray_kd.validate import check_settings, check_values, validate

if TYPE_CHECKING:
    import ray.data

    from ray_kd.data.plan import Plan
    from ray_kd.models import HeadShape

logger = logging.getLogger(__name__)

T = TypeVar("T")

_MAX_BLOCK_NBYTES = 32 * 2**20
_MAX_CAUSE = 1000  # characters
_LAST_STEP = "raykd_train_last_step_timestamp_seconds"
_BLOCKS_A_PROCESS = 4  # being made, in the queue, on the way, being used


def distill(config: RunConfig) -> dict[str, Any]:
    """Run, or resume, a distillation and return its summary. At once for a run that is finished.

    Raises ConfigError, DataError or RetryableError (see errors.py) with one line for the user.
    """
    run_dir = run_folder.run_dir(config)
    run_folder.create(run_dir)
    logger.info("checking the config and the models")
    check_values(config)
    if (finished := run_folder.finished_summary(run_dir)) is not None:
        check_settings(config)  # before the next line calls a wrong value another run
        run_folder.check_identity(run_dir, config)
        if run_folder.has_moved(run_dir, config):
            run_folder.check_content(run_dir, content_of(config, plan_of(config)))
        logger.info("run %s is finished already; nothing to do", run_dir)
        if not (run_dir / run_folder.REPORT).exists():  # of a version that wrote none
            _write_report(run_dir)
        return finished
    with launch.interruptible(), driver_lock(run_dir) as held, cluster.connecting(config) as wait_for_ray:
        check_settings(config)
        run_folder.check_identity(run_dir, config)
        vocab_size = validate(config).vocab_size
        plan = plan_of(config)
        content = content_of(config, plan)
        run_folder.check_content(run_dir, content)  # before anything is written: the run may be another
        _sweep(run_dir)
        planned = None
        job = submission.Job()
        try:
            wait_for_ray()
            job.show(submission.describe(config))
            cluster.check_shared(run_dir, config.train.timeout_s)
            prepared = prepare(config, run_dir / QUARANTINE, plan)
            teachers = _teachers(config, prepared, vocab_size)  # which may refuse, so before it is recorded
            order = order_of(config, prepared.manifest.num_rows)
            planned = summary.Planned.of(prepared.manifest, order)
            warn_of_steps(config, order)  # which may refuse, too
            run_folder.record(run_dir, config, content)
            student_path = _student(config, run_dir, prepared)
            payload = _teacher_payload(config, run_dir, vocab_size, teachers)
            _fit(config, run_dir, held, job, prepared, order, student_path, payload)
            held.check()
            results.finish(config, run_dir)
            for teacher in teachers:
                if teacher.cache is not None and teacher.cache.is_written:
                    teacher_cache.merge(teacher.cache)
        except BaseException as error:
            if not isinstance(error, Lost):
                _write_failure(run_dir, planned, job, error)
            raise
        result = summary.write(run_dir, planned, EXIT_DONE)
        _write_report(run_dir)
        return result


def cache_teacher(config: RunConfig) -> list[teacher_cache.Filled]:
    """Fill each teacher's cache for the training rows of a config, whatever its mode. Starts or joins a Ray.

    Raises ConfigError, DataError or RetryableError with one line for the user.
    """
    config.teacher.cache.mode = WRITE_THROUGH
    vocab_size = validate(config).vocab_size
    with cluster.connected(config, trains=False), launch.interruptible():
        prepared = prepare(config)
        filled = []
        for alone, part in _alone(config, prepared, vocab_size):
            cache = teacher_cache.open_for(alone, prepared, part)
            assert cache is not None
            filled.append(teacher_cache.fill(alone, prepared, cache, part))
        return filled


def _write_failure(
    run_dir: Path, planned: summary.Planned | None, job: submission.Job, error: BaseException
) -> None:  # fmt: skip
    exit_code = error.exit_code if isinstance(error, RayKDError) else EXIT_BUG
    if storage.is_store_error(error) or storage.is_full(error):
        exit_code = RetryableError.exit_code
    text = str(error) if isinstance(error, RayKDError) else f"{type(error).__name__}: {error}"
    cause = redact.redact(" ".join(text.split()))[:_MAX_CAUSE]
    job.show({"cause": cause, "exit_code": str(exit_code)})
    try:
        summary.write(run_dir, planned, exit_code, cause=cause)
    except Exception as second:  # the first error is the one to report
        logger.error("summary.json could not be written: %s", second)
    else:
        _write_report(run_dir)


def _write_report(run_dir: Path) -> None:
    """For people: whatever goes wrong here is a warning, and the run's own outcome counts."""
    from ray_kd import report

    try:
        report.write(run_dir)
    except Exception as error:
        logger.warning("%s could not be written (%s: %s)", run_folder.REPORT, type(error).__name__, error)
        logger.debug("", exc_info=True)


def prepare(config: RunConfig, quarantine_path: Path | None = None, plan: "Plan | None" = None) -> PreparedData:
    """The prepared data of a config, made by Ray Data or reused. Ray must be initialised.

    Raises DataError when nothing usable is left or too many records are bad.
    """
    from ray_kd.data.manifest import report
    from ray_kd.data.prepare import prepare as prepare_data

    prepared = prepare_data(
        config.data,
        tokenizer_path=config.teacher.model,
        revision=config.teacher.revision,
        seed=config.run.seed,
        prepared_dir=str(run_folder.prepared_dir(config)),
        quarantine_path=quarantine_path,
        plan=plan,
    )
    logger.info("%s", report(prepared.manifest))
    return prepared


def plan_of(config: RunConfig) -> "Plan":
    """What would be prepared. Costs a pass over the sources; raises ConfigError."""
    from ray_kd.data.plan import plan_preparation

    return plan_preparation(config.data, config.teacher.model, config.teacher.revision, config.run.seed)


def _sweep(run_dir: Path) -> None:
    """Remove what a killed attempt left behind, before anything is read."""
    for name in checkpoint.sweep(run_dir / CHECKPOINTS):
        logger.info("removed the partial checkpoint %s", name)
    # Ray Train would restore its own list of checkpoints; ours are found by their manifests.
    for leftover in ("checkpoint_manager_snapshot.json", STOP_FLAG, RESIZE_FLAG, refusal.REFUSAL):
        (run_dir / leftover).unlink(missing_ok=True)
    if not storage.is_remote(run_dir):  # a store shows nothing before it is whole
        for path in storage.children(run_dir):
            if run_folder.is_draft(path.name):
                storage.remove(path) if path.is_dir() else path.unlink()


def content_of(config: RunConfig, plan: "Plan") -> dict[str, str]:
    """Fingerprints of the data and of the models, which identify a run: what -> fingerprint."""
    from ray_kd.models import model_identity

    content = {
        "prepared data": plan.fingerprint,
        "teacher weights": model_identity(config.teacher.model, config.teacher.revision),
    }
    if config.student.model is not None:
        content["student weights"] = model_identity(config.student.model, config.student.revision)
    for place, one in enumerate(config.teachers[1:], start=1):
        content[f"weights of teachers[{place}]"] = model_identity(one.model, one.revision)
    return content


def order_of(config: RunConfig, num_rows: int) -> SlotOrder:
    """What the run trains of so many prepared rows, and when."""
    return SlotOrder(
        num_rows=num_rows,
        global_batch_size=config.train.global_batch_size,
        epochs=config.train.epochs,
        max_steps=config.train.max_steps,
        seed=config.run.seed,
    )


def warn_of_steps(config: RunConfig, order: SlotOrder) -> None:
    """Say what has no effect, and what repeated epochs cost. Raises ConfigError when no term of the loss has any."""
    train_options = config.train
    known = objectives.idle_terms(config, train_options.max_steps)  # validation said so
    for key in objectives.idle_terms(config, order.num_steps):
        if key not in known:
            logger.warning("%s.weight is 0 at each of the run's %d steps: the term has no effect", key, order.num_steps)
    if train_options.warmup_steps > order.num_steps:
        logger.warning(
            "train.warmup_steps=%d is longer than the run of %d steps: the learning rate ends at %.2g of %.2g",
            train_options.warmup_steps, order.num_steps,
            train_options.learning_rate * order.num_steps / train_options.warmup_steps, train_options.learning_rate,
        )  # fmt: skip
    for key in ("checkpoint_every", "eval_every"):
        value = getattr(train_options, key)
        if value > order.num_steps:
            logger.warning("train.%s=%d has no effect: the run has %d steps", key, value, order.num_steps)
    passes = order.num_planned_rows / order.num_rows
    if passes > 1 and config.teacher.cache.mode == DISABLED:
        logger.warning(
            "the teacher computes every row again in each epoch, %.1f passes over the data: "
            "teacher.cache.mode=write_through makes it one", passes,
        )  # fmt: skip
    if configuration.worker_range(train_options)[1] == 1 and train_options.zero_stage > 0:
        logger.info("train.zero_stage=%d on one worker: stage 0 is cheaper there", train_options.zero_stage)


def _student(config: RunConfig, run_dir: Path, prepared: PreparedData) -> str:
    """The student's folder: the configured model, or one made of the teacher's layers, made once and kept."""
    if config.student.model is not None:
        return config.student.model

    from ray_kd.models import asked_widths, model_identity

    init = config.student.init
    assert init is not None  # validate: exactly one of model and init
    teacher, widths = config.teacher, asked_widths(init)
    # An explicit list of whole layers does not depend on the data.
    is_measured = widths or not isinstance(init.layers, list)
    key = {
        "teacher": model_identity(teacher.model, teacher.revision),
        "layers": init.layers,
        "widths": widths,
        "measured": [init.select, init.calibration_rows, prepared.manifest.fingerprint] if is_measured else None,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = run_dir.parent / "student_init" / digest
    if not (folder / "config.json").exists():
        start = time.perf_counter()
        make = partial(
            _make_student, teacher.model, teacher.revision, init, str(prepared.folder), str(folder),
            cluster.physical_cores(), teacher.pool.num_gpus > 0,
        )  # fmt: skip
        layers = _on_teacher_pool(config, make, "the student's init")
        narrower = "".join(f", {name} {size}" for name, size in widths.items())
        logger.info("student: the teacher's layers %s%s (%.1f s)", layers, narrower, time.perf_counter() - start)
    return str(folder)


def _frozen_identity(student: Student, student_path: str) -> str | None:
    """Of the model that has the frozen parts, which no checkpoint holds; None when everything trains."""
    from ray_kd.models import local_folder, model_identity

    if not configuration.has_frozen(student):
        return None
    return model_identity(local_folder(student_path), student.revision)


def _on_teacher_pool(config: RunConfig, function: Callable[[], T], what: str) -> T:
    """The result of a function that loads the teacher, run where the teachers will; nothing else runs yet."""
    import ray

    pool = config.teacher.pool
    task: Any = ray.remote(_call).options(
        num_cpus=pool.num_cpus, num_gpus=pool.num_gpus, label_selector=pool.label_selector or None
    )
    try:
        result: T = ray.get(task.remote(function), timeout=config.train.timeout_s)
    except ray.exceptions.RayError as error:
        if not isinstance(error, ray.exceptions.GetTimeoutError):
            raise launch.of_task(error, what) from error
        raise RetryableError(
            f"{what} did not end within train.timeout_s={config.train.timeout_s:g} s: "
            f"is there a node for teacher.pool ({pool.num_cpus:g} CPUs, {pool.num_gpus:g} GPUs, labels "
            f"{dict(pool.label_selector)})?"
        ) from None
    return result


def _call(function: Callable[[], T]) -> T:
    return function()


def _make_student(
    teacher: str, revision: str | None, init: StudentInit, prepared_dir: str, out_dir: str, threads: int, on_gpu: bool
) -> list[int]:
    import torch

    from ray_kd import models

    torch.set_num_threads(threads)
    layers: int | list[int] = init.layers
    kept, asked = None, models.asked_widths(init)
    if asked or isinstance(layers, int):
        prepared = PreparedData(prepared_dir)
        rows = schema.to_numpy(prepared.read_rows(np.arange(min(init.calibration_rows, prepared.num_rows))))
        columns = rows[schema.INPUT_IDS], rows[schema.POSITION_IDS]
        model = models.load_causal_lm(teacher, revision, device="cuda" if on_gpu else "cpu")
        if isinstance(layers, int):
            layers = models.choose_layers(models.block_influence(model, *columns), layers)
        if asked:
            widths = models.check_widths(model.config, asked)
            kept = models.choose_widths(model.config, models.width_importance(model, *columns), widths, layers)
        del model
    with storage.store_errors(), storage.drafted_folder(storage.path(out_dir), last="config.json") as draft:
        models.init_from_layers(teacher, layers, str(draft), revision=revision, kept=kept)
    return layers


@dataclass(frozen=True)
class _Teacher:
    """What one teacher of the stream is, where it runs, and what it is asked."""

    engine: EngineSpec
    pool: Pool
    part: Part | None
    """Of the answers; None for a single teacher."""
    cache: Cache | None
    request: Request
    """Of the cache, where there is one: its K may be larger, its temperature another."""


def _teachers(config: RunConfig, prepared: PreparedData, vocab_size: int) -> list[_Teacher]:
    """In the order of the config; those that have no row are left out."""
    threads = cluster.Threads.of(config)
    teachers = []
    for alone, part in _alone(config, prepared, vocab_size):
        cache = teacher_cache.open_for(alone, prepared, part)
        request = teacher_cache.asked_of_teacher(alone) if cache is None else cache.contents.request
        spec = EngineSpec.of(alone.teacher, threads.of_teacher(alone.teacher))
        teachers.append(_Teacher(spec, alone.teacher.pool, part, cache, request))
    return teachers


def _alone(config: RunConfig, prepared: PreparedData, vocab_size: int) -> list[tuple[RunConfig, Part | None]]:
    """Each teacher with a row to answer: the config in which it is the only one, and its part in the answers."""
    found: list[tuple[RunConfig, Part | None]] = []
    routes = prepared.manifest.routes
    for (one, alone), part in zip(
        configuration.each_teacher(config), parts_of(config, routes, vocab_size), strict=True
    ):  # fmt: skip
        if one is not None and (unknown := sorted(set(one.rows or []) - set(routes))):
            logger.warning("teachers: '%s' has rows of %s, and no row's %s is that: there are %s",
                           one.name, ", ".join(unknown), config.data.route_by, ", ".join(routes))  # fmt: skip
        if part is None or part.shares.any():
            found.append((alone, part))
    return found


@dataclass(frozen=True)
class _TeacherPayload:
    """Who answers, and what of the answers the student will be sent."""

    teachers: list[_Teacher]
    expected: Expected
    nbytes_per_token: int
    head: str | None
    """Folder of the head that makes log-probabilities of hidden states."""


def _teacher_payload(
    config: RunConfig, run_dir: Path, vocab_size: int, teachers: list[_Teacher]
) -> _TeacherPayload:  # fmt: skip
    """The payloads of the run. For hidden states the teacher is loaded once a run, to save its head."""
    teacher = config.teacher
    if teacher.payload != HIDDEN_STATES:
        part, request = teachers[0].part, teachers[0].request
        width = teacher.top_k if part is None else part.width
        expected = Expected(teacher.payload, width, request.temperature, objectives.expected_features(config))
        nbytes = topk_logprobs.nbytes_per_token(width, vocab_size)
        if teacher.payload == FEATURES:
            nbytes = objectives.planned_nbytes_per_token(config)
        return _TeacherPayload(teachers, expected, nbytes, None)
    from ray_kd import models

    folder = run_dir / run_folder.TEACHER_HEAD
    shape = models.head_shape(folder)
    if shape is None:
        start = time.perf_counter()
        make = partial(
            _make_head, teacher.model, teacher.revision, teacher.dtype, str(folder), cluster.physical_cores(),
            teacher.pool.num_gpus > 0, models.shared_vocab_size(teacher),
        )  # fmt: skip
        shape = _on_teacher_pool(config, make, "saving the teacher's head")
        logger.info("the teacher's head of %d x %d is saved (%.1f s)", shape.vocab_size, shape.width,
                    time.perf_counter() - start)  # fmt: skip
    if shape.dtype != "bfloat16":
        logger.warning(
            "the teacher's %s hidden states travel as bfloat16, which moves its answers by about 2e-5 nats a token",
            shape.dtype,
        )
    nbytes = hidden_states.nbytes_per_token(shape.width)
    expected = Expected(HIDDEN_STATES, shape.width, temperature=1.0)
    return _TeacherPayload(teachers, expected, nbytes, str(folder))


def _make_head(
    teacher: str, revision: str | None, dtype: str, out_dir: str, threads: int, on_gpu: bool,
    vocab_size: int | None = None,
) -> "HeadShape":  # fmt: skip
    """Save the teacher's head, of vocab_size rows or all; the shape of it.

    Raises ConfigError for a model whose logits are not those of a head that could be rebuilt.
    """
    import torch

    from ray_kd import models

    torch.set_num_threads(threads)
    model = models.load_causal_lm(teacher, revision, dtype, device="cuda" if on_gpu else "cpu")
    models.check_architecture(model)
    with storage.store_errors(), storage.drafted_folder(storage.path(out_dir), last="head.json") as draft:
        return models.save_head(models.head_of(model).over(vocab_size), draft)


@dataclass(frozen=True)
class _StreamSpec:
    """What Ray Train's controller needs to build the stream at each start of the worker group."""

    run_dir: str
    prepared_dir: str
    order: SlotOrder
    block_rows: int
    teachers: list[_Teacher]
    top_k: int
    wire: str


def _stream(spec: _StreamSpec) -> "ray.data.Dataset":
    """The rest of the run as one ordered dataset: from the slot after the newest verified checkpoint to the last."""
    import ray.data

    from ray_kd.data.stream import PausedSteps, ordered_rows
    from ray_kd.teacher.pool import PoolKeeper

    run_dir = storage.path(spec.run_dir)
    with storage.store_errors():
        newest = checkpoint.newest_verified(run_dir / CHECKPOINTS)
        start_slot = int(checkpoint.read_state(newest)["next_slot"]) if newest else 0
        if (run_dir / run_folder.ATTEMPTS).exists():
            Exporter(run_dir.name).send("raykd_worker_group_restarts_total", 1)
        _note_attempt(run_dir, start_slot)
    attempt = deaths.begin(run_dir)

    # The controller has a DataContext of its own: what the driver set does not reach it.
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.custom_execution_callback_classes = [PausedSteps, PoolKeeper]
    context.execution_options.preserve_order = True
    covered, computing = _covered(spec.teachers, spec.prepared_dir, spec.order, start_slot)
    context.execution_options.label_selector = _common_labels(computing)
    PoolKeeper.announce(context, run_dir, ["" if t.part is None else t.part.name for t in computing])
    rows = ordered_rows(
        spec.order, spec.prepared_dir, start_slot=start_slot, block_rows=spec.block_rows,
        make_transforms=[partial(TeacherStage, None, *_stage_arguments(spec, teacher)) for teacher in covered],
    )  # fmt: skip
    for teacher in computing:
        rows = rows.map_batches(
            _named_stage(teacher.part),
            fn_constructor_args=(teacher.engine, *_stage_arguments(spec, teacher), attempt),
            batch_size=spec.block_rows,
            batch_format="pyarrow",
            **cluster.actor_pool(teacher.pool),
        )
    rows.set_name(run_dir.name)
    return rows


def _named_stage(part: Part | None) -> type[TeacherStage]:
    """The stage under the name that its operator and actors have in the dashboard: Ray takes it from the class.

    A dot would be the end of a module there.
    """
    name = "Teacher" if part is None else f"Teacher {part.name.replace('.', '_')}"
    return type(name, (TeacherStage,), {"__doc__": TeacherStage.__doc__})


def _stage_arguments(spec: _StreamSpec, teacher: _Teacher) -> tuple[Any, ...]:
    return teacher.request, spec.run_dir, spec.wire, teacher.cache, spec.top_k, teacher.part


def _covered(
    teachers: list[_Teacher], prepared_dir: str, order: SlotOrder, start_slot: int
) -> tuple[list[_Teacher], list[_Teacher]]:
    """(the first teachers, whose caches have all that is left, the others).

    The readers add the answers of the former: no actor is started for them and no model loaded. Their order is that of
    the config, so that a mixture is summed as it was before.
    """
    prepared = PreparedData(prepared_dir)
    for count, teacher in enumerate(teachers):
        if teacher.cache is None:
            return teachers[:count], teachers[count:]
        own = teacher_cache.rows_of(teacher.part, prepared)
        if not teacher_cache.covers(teacher.cache, own, order, start_slot):
            return teachers[:count], teachers[count:]
    return teachers, []


def _common_labels(teachers: list[_Teacher]) -> dict[str, str] | None:
    return common_labels([teacher.pool.label_selector for teacher in teachers]) or None


def _note_attempt(run_dir: Path, start_slot: int) -> None:
    attempt = {"start_slot": start_slot, "time": time.time()}
    storage.append_text(run_dir / run_folder.ATTEMPTS, json.dumps(attempt) + "\n")


def _fit(
    config: RunConfig, run_dir: Path, held: Held, job: submission.Job, prepared: PreparedData, order: SlotOrder,
    student_path: str, payload: _TeacherPayload,
) -> None:  # fmt: skip
    """Train to the last step. Raises RetryableError when the run was stopped before it."""
    steps = _trained_steps(run_dir)
    if steps == order.num_steps:
        _note_attempt(run_dir, order.num_slots)  # a restart all the same, of the driver
        return
    import ray.data
    import ray.train
    from ray.train.torch import TorchConfig

    from ray_kd.elastic import Resizing

    options = config.train
    workers = configuration.worker_range(options)
    is_elastic = workers[0] < workers[1]
    threads = cluster.Threads.of(config)
    max_targets = prepared.manifest.max_targets_per_row
    block_rows, run_ahead_nbytes = stream_sizes(config, max_targets, payload.nbytes_per_token)
    stream = _StreamSpec(
        run_dir=str(run_dir),
        prepared_dir=str(prepared.folder),
        order=order,
        block_rows=block_rows,
        teachers=payload.teachers,
        top_k=config.teacher.top_k,
        wire=config.teacher.wire,
    )
    _, computing = _covered(payload.teachers, stream.prepared_dir, order, steps * options.global_batch_size)
    warn_of_spilling(config, run_ahead_nbytes, cluster.Joined().object_store_nbytes())
    held_out = results.held_out(config, prepared, threads.worker, on_gpu=options.gpus_per_worker > 0)
    spec = TrainSpec(
        run_dir=str(run_dir),
        config_yaml=configuration.to_yaml(config),
        student_path=student_path,
        student_identity=_frozen_identity(config.student, student_path),
        student=config.student,
        train=options,
        trackers=config.run.trackers,
        loss_options=loss_options(config, payload.expected.temperature),
        loss=config.loss,
        make_features=objectives.features_of(config),
        seed=config.run.seed,
        expected=payload.expected,
        teacher_head=payload.head,
        block_rows=block_rows,
        threads=threads.worker,
        num_rows=order.num_rows,
        num_steps=order.num_steps,
        num_planned_rows=order.num_planned_rows,
        make_evaluate=partial(make_evaluate, held_out) if prepared.manifest.eval_rows else None,
    )
    callbacks: list[Any] = [Resizing(run_dir / RESIZE_FLAG, options.timeout_s)] if is_elastic else []
    storage_path, storage_filesystem = storage.for_arrow(run_dir.parent)
    trainer = launch.trainer_class(starts_ray=cluster.address(config) is None)(
        partial(train, spec),
        scaling_config=ray.train.ScalingConfig(
            num_workers=workers if is_elastic else workers[0],  # type: ignore[arg-type] # typed as Train v1's
            elastic_resize_monitor_interval_s=options.resize_every_s,
            use_gpu=options.gpus_per_worker > 0,
            resources_per_worker={"CPU": options.cpus_per_worker}
            | ({"GPU": options.gpus_per_worker} if options.gpus_per_worker > 0 else {}),
            label_selector=options.label_selector or None,  # type: ignore[call-arg] # typed as Train v1's
        ),
        torch_config=TorchConfig(timeout_s=math.ceil(options.timeout_s)),
        # The run folder is Train's experiment directory: its name is the run's in the dashboard, and a checkpoint
        # that was written into it is reported without a copy.
        run_config=ray.train.RunConfig(
            name=run_dir.name,
            storage_path=storage_path,
            storage_filesystem=storage_filesystem,
            callbacks=callbacks,
            failure_config=ray.train.FailureConfig(
                max_failures=options.max_failures,
                controller_failure_limit=options.max_failures,  # type: ignore[call-arg] # typed as Train v1's
            ),
        ),
        datasets={"train": partial(_stream, stream)},
        dataset_config=ray.train.DataConfig(
            execution_options=ray.data.ExecutionOptions(
                preserve_order=True,
                label_selector=_common_labels(computing),
                resource_limits=ray.data.ExecutionResources.for_limits(object_store_memory=run_ahead_nbytes),
            ),
            enable_shard_locality=False,  # ignored with preserve_order
        ),
    )
    logger.info(
        "training: step %d to %d, %d rows each, on %s worker(s) and up to %d teacher(s), which load first",
        steps + 1, order.num_steps, options.global_batch_size, " to ".join(map(str, sorted(set(workers)))),
        sum(teacher.pool.max_actors for teacher in computing),
    )  # fmt: skip
    progress = Progress(run_dir / METRICS, order.num_steps)
    head = cluster.Head(ray.get_runtime_context().gcs_address, is_own=cluster.address(config) is None)

    exporter, started = Exporter(run_dir.name), time.time()

    def show_step(at_once: bool = False) -> None:
        job.show({"step": f"{progress.step}/{order.num_steps}"}, at_once=at_once)
        exporter.send(_LAST_STEP, progress.step_time or started)

    try:
        launch.fit(
            trainer.fit,
            on_poll=[held.check, progress.update, refusal.Reported(run_dir).check, head.check, show_step],
            request_stop=(run_dir / STOP_FLAG).touch,
        )
    finally:
        progress.close()
        show_step(at_once=True)
        exporter.forget(_LAST_STEP)
    (run_dir / STOP_FLAG).unlink(missing_ok=True)
    if (steps := _trained_steps(run_dir)) < order.num_steps:
        raise RetryableError(f"stopped after step {steps} of {order.num_steps}; the same command goes on from there")


def stream_sizes(config: RunConfig, max_targets_per_row: int, nbytes_per_token: int) -> tuple[int, int]:
    """(rows in a block of the stream, bytes of object store that bound the teacher's run-ahead)."""
    options, teacher = config.train, config.teacher
    # Features may be sent of every token, attention of all before it.
    has_features = teacher.payload == FEATURES
    payload_nbytes = nbytes_per_token * (config.data.sequence_length if has_features else max_targets_per_row)
    row_nbytes = int(12 * config.data.sequence_length + payload_nbytes + 128)
    least, most = configuration.worker_range(options)
    processes = most + cluster.max_teachers(config)
    block_rows = _block_rows(
        # What divides a rank's share with any number of workers.
        math.gcd(*(options.global_batch_size // number for number in range(least, most + 1))),
        options.micro_batch_size,
        max_rows=min(_MAX_BLOCK_NBYTES // row_nbytes, teacher.run_ahead_rows // (_BLOCKS_A_PROCESS * processes)),
    )
    # The least that keeps every process busy; below it the stream could starve.
    least = block_rows * _BLOCKS_A_PROCESS * processes
    if least > teacher.run_ahead_rows:
        logger.warning(
            "teacher.run_ahead_rows=%d is too few for %d processes of %d-row micro-batches: %d are used",
            teacher.run_ahead_rows, processes, options.micro_batch_size, least,
        )  # fmt: skip
    return block_rows, max(teacher.run_ahead_rows, least) * row_nbytes


def warn_of_spilling(config: RunConfig, run_ahead_nbytes: int, held: int) -> None:
    """Warn when the run-ahead is too large for an object store of `held` bytes."""
    if run_ahead_nbytes > held / 2:  # the rest is for rows on their way
        logger.warning(
            "teacher.run_ahead_rows=%d may fill %.1f GB, and Ray's object store has %.1f GB: it will spill to disk; "
            "fewer rows do as well where the teacher is the faster one",
            config.teacher.run_ahead_rows, run_ahead_nbytes / 1e9, held / 1e9,
        )  # fmt: skip


def _block_rows(rows_per_rank: int, micro_batch_size: int, max_rows: int) -> int:
    """Rows in a block of the stream: the largest multiple of the micro-batch that divides a rank's share of the
    global batch and is at most max_rows, or the micro-batch. Large, since the executor's cost is per block; a divisor,
    so that the equal split between workers falls on batch edges."""
    fitting = [
        rows for rows in range(micro_batch_size, min(rows_per_rank, max_rows) + 1, micro_batch_size)
        if rows_per_rank % rows == 0
    ]  # fmt: skip
    return max(fitting, default=micro_batch_size)


def _trained_steps(run_dir: Path) -> int:
    folder = checkpoint.newest_verified(run_dir / CHECKPOINTS)
    return int(checkpoint.read_state(folder)["step"]) if folder else 0
