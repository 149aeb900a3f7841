"""The train function of one worker, top to bottom: feed, engine, resume, evaluate, then step by step to the end.

Comes in: a TrainSpec and the worker's shard of the ordered stream. Goes out, in the run folder: metrics.jsonl,
checkpoints/, quarantine.jsonl, and eval_before.json once. The last checkpoint holds what the driver needs to write
final/ and summary.json.
"""

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_kd import refusal, storage
from ray_kd.config import Loss, RunConfig, Student, Train
from ray_kd.errors import ConfigError
from ray_kd.locks import Held, writer_lock
from ray_kd.payloads import HIDDEN_STATES
from ray_kd.trainer.feed import Expected, Feed
from ray_kd.trainer.recorder import EVAL_S, Recorder
from ray_kd.trainer.schedule import learning_rate

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from ray_kd.losses.features import Term
    from ray_kd.trainer.collate import MicroBatch
    from ray_kd.trainer.ledger import Ledger
    from ray_kd.trainer.step import StepResult

EVAL_BEFORE = "eval_before.json"
METRICS = "metrics.jsonl"
QUARANTINE = "quarantine.jsonl"
STOP_FLAG = ".stop"
RESIZE_FLAG = ".resize"
CHECKPOINTS = "checkpoints"

Evaluate = Callable[[Any], dict[str, float]]
"""Engine -> metrics of the held-out rows. A collective: every rank calls it and gets the same numbers."""


@dataclass(frozen=True)
class TrainSpec:
    """What a worker needs, small and picklable."""

    run_dir: str
    config_yaml: str
    """The resolved config, secrets masked: it goes along with every checkpoint."""
    student_path: str
    student_identity: str | None
    """Of the model that frozen parts come from (`models.model_identity`); None when everything trains."""
    student: Student
    train: Train
    loss_options: dict[str, Any]  # keyword arguments of fused_linear_kd_loss, or of its dense sister
    trackers: list[Any]
    """Where metrics go beside metrics.jsonl, as `run.trackers` says."""
    loss: Loss
    """Its terms and temperature, which change over the steps."""
    make_features: "Callable[[], dict[str, Term]]"
    """Finds the layers of the feature terms, in the worker: what it returns imports torch."""
    seed: int
    expected: Expected
    """Of every payload of the stream."""
    teacher_head: str | None
    """Folder of the teacher's head (`models.load_head`), for a teacher that sends hidden states."""
    block_rows: int
    threads: int
    num_rows: int
    num_steps: int
    num_planned_rows: int
    make_evaluate: "Callable[[torch.device], Evaluate] | None"
    """Builds the evaluation in the worker; None when there are no held-out rows."""


def train(spec: TrainSpec) -> None:
    """Train the student from the newest verified checkpoint to the last step, or until asked to stop."""
    import ray.train

    # The first act: the data executor and the teacher start while torch, DeepSpeed and the student load.
    shard = ray.train.get_dataset_shard("train")
    world = ray.train.get_context().get_world_size()
    feed = Feed(
        lambda: shard.iter_batches(batch_size=spec.block_rows, batch_format="pyarrow", prefetch_batches=1),
        micro_batch_size=spec.train.micro_batch_size,
        accumulation=spec.train.global_batch_size // (world * spec.train.micro_batch_size),
        expected=spec.expected,
        timeout_s=spec.train.timeout_s,
    )
    run_dir = storage.path(spec.run_dir)
    rank = ray.train.get_context().get_world_rank()
    with contextlib.closing(feed), refusal.reported(run_dir), storage.store_errors(), writer_lock(run_dir) as held:
        try:
            _train(spec, feed, held, rank, world)
        finally:
            if rank == 0:  # who asked for it waits for this
                (run_dir / RESIZE_FLAG).unlink(missing_ok=True)


def _train(spec: TrainSpec, feed: Feed, held: Held, rank: int, world: int) -> None:
    import torch

    from ray_kd.losses.terms import Schedules, parse_terms
    from ray_kd.trainer import zero
    from ray_kd.trainer.notice import Notice
    from ray_kd.trainer.saver import Saver
    from ray_kd.trainer.step import Flags, train_step

    run_dir, options = storage.path(spec.run_dir), spec.train
    names = [STOP_FLAG, RESIZE_FLAG] if isinstance(options.num_workers, list) else [STOP_FLAG]
    stop_flags = [storage.Flag(run_dir / name) for name in names]
    torch.set_num_threads(spec.threads)
    engine, device = _build_engine(spec, rank, world)
    evaluate = spec.make_evaluate(device) if spec.make_evaluate else None
    ledger, first_step = _restore(spec, engine, rank)
    if evaluate is not None and first_step == 1:
        _evaluate_before(run_dir, engine, evaluate, rank)

    schedules = Schedules.of(parse_terms(spec.loss.terms), spec.loss.temperature)
    notice = Notice()
    metrics: dict[str, Any] = {}
    with Recorder(spec, run_dir / METRICS, first_step, rank, world) as recorder:
        saver = Saver(
            run_dir / CHECKPOINTS, engine, options, spec.config_yaml, held, saved_step=first_step - 1,
            on_commit=recorder.committed,
        )  # fmt: skip

        def save(step: int, metrics: dict[str, Any]) -> None:
            held.check()
            recorder.publish()
            finite = _finite(metrics)
            base = {"student_path": spec.student_path, "student_identity": spec.student_identity}
            state = {"ledger": ledger.state(), "metrics": finite} | base
            saver.start(step, state, loss=finite["train/loss"])

        def is_asked_to_stop() -> bool:
            return any(flag.is_set() for flag in stop_flags)

        for step in range(first_step, spec.num_steps + 1):
            start = time.perf_counter()
            micro_batches, wait_s = feed.next_step(is_asked_to_stop)
            _check_slots(micro_batches, step, options.global_batch_size)
            rate = learning_rate(
                step, peak=options.learning_rate, schedule=options.schedule,
                warmup_steps=options.warmup_steps, num_steps=spec.num_steps,
            )  # fmt: skip
            zero.set_learning_rate(engine, rate)
            flags = Flags(is_asked_to_stop(), not micro_batches, saver.is_written, ask_for_notice=notice.is_due())
            result = train_step(engine, micro_batches, device, flags, schedules.at(step))
            if result is None:
                saver.commit()
                if saver.saved_step < step - 1:
                    save(step - 1, metrics)
                    saver.commit()
                break
            _check_all_slots(result.slots, step, options.global_batch_size)
            if result.has_refused:
                _quarantine_refused(run_dir, micro_batches, rank)
            if result.is_bad and rank == 0:
                _quarantine_step(run_dir, step, result)
            # The first step of an attempt waits for the teacher to load: it is not the teacher being slow.
            ledger.add(result, step_s=time.perf_counter() - start, wait_s=wait_s, is_timed=step > first_step)

            is_last = step == spec.num_steps or result.flags.stop > 0
            is_noticed = result.flags.ask_for_notice > 0 and notice.is_new()
            metrics = _metrics(step, result, rate, wait_s, spec) | schedules.metrics(step)
            is_evaluated = evaluate is not None and _is_due(step, options.eval_every, spec.num_steps)
            if evaluate is not None and is_evaluated:
                eval_start = time.perf_counter()
                metrics |= {f"eval/{name}": value for name, value in evaluate(engine).items()}
                metrics[EVAL_S] = time.perf_counter() - eval_start
            is_notable = is_last or is_evaluated or result.is_bad
            timed_wait_s = wait_s if step > first_step else None
            recorder.add(metrics, result, wait_s=timed_wait_s, is_logged=is_notable or step % options.log_every == 0)
            ledger.totals.wall_s += time.perf_counter() - start
            if result.flags.is_written == world:
                saver.commit()
            if len(ledger.bad_in_a_row) > options.max_bad_steps:
                saver.commit()
                raise _too_many_bad(ledger.bad_in_a_row, options.max_bad_steps, result, saver.saved_step)
            if is_last or is_noticed or _is_due(step, options.checkpoint_every, spec.num_steps):
                save(step, metrics)
            if is_last or is_noticed:
                saver.commit()
            if is_last:
                break


def loss_options(config: RunConfig, payload_temperature: float) -> dict[str, Any]:
    """Keyword arguments of `fused_linear_kd_loss`, or of its dense sister, but for those that may change over the
    steps: temperature and weights. payload_temperature: the teacher's."""
    loss = config.loss
    of_topk = {"tail": loss.tail, "payload_temperature": payload_temperature}
    return ({} if config.teacher.payload == HIDDEN_STATES else of_topk) | {
        "divergence": loss.divergence,
        "chunk_size": loss.chunk_size,
    }


def _is_due(step: int, every: int, num_steps: int) -> bool:
    return step == num_steps or (every > 0 and step % every == 0)


def _build_engine(spec: TrainSpec, rank: int, world: int) -> tuple[Any, "torch.device"]:
    import ray.train.torch
    import torch

    from ray_kd import models
    from ray_kd.trainer import zero
    from ray_kd.trainer.step import DistillModule

    options = spec.train
    device = ray.train.torch.get_device() if options.gpus_per_worker > 0 else torch.device("cpu")
    torch.manual_seed(spec.seed + rank)  # dropout differs between ranks
    features = spec.make_features()
    looks_at_attention = any(term.attention_layers for term in features.values())
    base = models.load_causal_lm(
        spec.student_path, revision=spec.student.revision, dtype="float32",
        attn_implementation="eager" if looks_at_attention else None,
    )  # fmt: skip
    models.check_architecture(base)
    if looks_at_attention:
        models.check_attentions(base)
    student = models.choose_trainable(base, spec.student.lora, spec.student.freeze, seed=spec.seed)
    student.train()
    # After the adapters: peft would make the embeddings' output want a gradient, which only reentrant ones need.
    if spec.student.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if spec.student.liger == "auto" and device.type == "cuda":
        models.apply_liger(student)
    teacher_head = None if spec.teacher_head is None else models.load_head(spec.teacher_head, device)
    module = DistillModule(student, spec.loss_options, teacher_head, features, spec.seed)
    engine = zero.initialize(
        module,
        zero.deepspeed_config(
            zero_stage=options.zero_stage,
            micro_batch_size=options.micro_batch_size,
            gradient_accumulation_steps=options.global_batch_size // (world * options.micro_batch_size),
            dtype=spec.student.dtype,
            max_grad_norm=options.max_grad_norm,
            on_gpu=device.type == "cuda",
            overrides=options.deepspeed,
        ),
        learning_rate=options.learning_rate,
        weight_decay=options.weight_decay,
        on_gpu=device.type == "cuda",
        learning_rates=module.learning_rates,
    )
    return engine, device


def _restore(spec: TrainSpec, engine: Any, rank: int) -> tuple["Ledger", int]:
    """The ledger and the next step, from the newest verified checkpoint: the rule the stream's start follows too."""
    import torch.distributed as dist

    from ray_kd import checkpoint
    from ray_kd.trainer.fragments import load_fragments
    from ray_kd.trainer.ledger import Ledger
    from ray_kd.trainer.rng import load_rng

    # Rank 0 verifies for all: every byte is hashed once, and ranks cannot disagree.
    newest = [checkpoint.recover(storage.path(spec.run_dir) / CHECKPOINTS) if rank == 0 else None]
    dist.broadcast_object_list(newest, src=0)
    if newest[0] is None:
        return Ledger(spec.num_rows, spec.num_planned_rows), 1
    folder = checkpoint.local_copy(newest[0], of_writer=True)
    document = checkpoint.read_state(folder)
    if (identity := document["state"].get("student_identity")) != spec.student_identity:
        raise ConfigError(
            f"'{spec.student_path}' is not the model that the checkpoint's student was trained on "
            f"({spec.student_identity}, then {identity}): put that model back there, or name another run.dir"
        )
    load_fragments(engine, engine.module, folder)
    load_rng(folder, rank)
    ledger = Ledger.from_state(spec.num_rows, spec.num_planned_rows, document["state"]["ledger"])
    return ledger, int(document["next_slot"]) // spec.train.global_batch_size + 1


def _evaluate_before(run_dir: Path, engine: Any, evaluate: Evaluate, rank: int) -> None:
    """Measure the untrained student once a run; a restart before the first checkpoint finds the file and goes on."""
    import torch.distributed as dist

    path = run_dir / EVAL_BEFORE
    is_known = [path.exists() if rank == 0 else None]
    dist.broadcast_object_list(is_known, src=0)  # shared storage may show the file to one rank and not to another
    if is_known[0]:
        return
    metrics = evaluate(engine)
    if rank == 0:
        storage.write_text(path, json.dumps(_finite(metrics)))


def _check_slots(micro_batches: Sequence["MicroBatch"], step: int, global_batch_size: int) -> None:
    """The alarm of the ordered stream: every row of step k lies in slots [(k-1) G, k G)."""
    for micro_batch in micro_batches:
        is_right = micro_batch.slots // global_batch_size == step - 1
        assert is_right.all(), f"step {step} got slots {micro_batch.slots.tolist()} at batch size {global_batch_size}"


def _check_all_slots(slots: "NDArray[np.int64]", step: int, global_batch_size: int) -> None:
    """Each slot of step k on one rank, once: before its checkpoint, so that the one before is good."""
    expected = range((step - 1) * global_batch_size, step * global_batch_size)
    assert slots.tolist() == list(expected), f"step {step} got slots {slots.tolist()}"


def _quarantine_refused(run_dir: Path, micro_batches: Sequence["MicroBatch"], rank: int) -> None:
    """Append the rows whose teacher answer was refused, once each, from all ranks. A collective."""
    import torch.distributed as dist

    own = [
        {"source": "teacher", "slot": int(slot), "row_id": int(row_id), "reason": error}
        for m in micro_batches
        for slot, row_id, error in zip(m.slots, m.row_ids, m.errors, strict=True)
        if error
    ]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if rank == 0:
        _append_new(run_dir / QUARANTINE, [record for records in everyone for record in records])


def _quarantine_step(run_dir: Path, step: int, result: "StepResult") -> None:
    """Append the rows of a bad step: which of them it was is not known."""
    # No numbers: a step done again after a resume, perhaps on another number of workers, must give the same lines.
    what = "gradient" if math.isfinite(result.metrics["loss"]) else "loss"
    rows = zip(result.slots[result.is_trained], result.row_ids[result.is_trained], strict=True)
    records = [
        {"source": "step", "step": step, "slot": int(slot), "row_id": int(row_id),
         "reason": f"the {what} of its step is not finite"}
        for slot, row_id in rows
    ]  # fmt: skip
    _append_new(run_dir / QUARANTINE, records)


def _append_new(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Append the records that the file does not have yet: a resumed run comes by its rows again."""
    known = set(storage.read_lines(path))
    lines = [json.dumps(record) + "\n" for record in records]
    storage.append_text(path, "".join(line for line in lines if line not in known))


def _too_many_bad(steps: Sequence[int], allowed: int, result: "StepResult", saved_step: int) -> ConfigError:
    """The same command would come to the same numbers: it is the user who can change something."""
    rows = result.row_ids[result.is_trained].tolist()
    checkpoint = f"the checkpoint of step {saved_step} is good" if saved_step else "there is no checkpoint yet"
    return ConfigError(
        f"loss or gradient were not finite in more than train.max_bad_steps={allowed} steps in a row: {_some(steps)} "
        f"(the last: loss {result.metrics['loss']:.4g}, gradient norm {result.grad_norm:.4g}, rows {_some(rows)}); "
        f"{checkpoint}. No weights were changed by them; {QUARANTINE} lists their rows. With a larger "
        f"train.max_bad_steps the run goes on; with other data, learning rate or dtype it is a new one"
    )


def _some(numbers: Sequence[int], most: int = 8) -> str:
    return ", ".join(map(str, numbers[:most])) + (", ..." if len(numbers) > most else "")


def _metrics(step: int, result: "StepResult", rate: float, wait_s: float, spec: TrainSpec) -> dict[str, Any]:
    start = (step - 1) * spec.train.global_batch_size
    busy_s = result.teacher_busy_s
    return {
        "step": step,
        "time": time.time(),
        "epoch": start // spec.num_rows,
        **{f"train/{name}": value for name, value in result.metrics.items() if name != "teacher_topk_mass"},
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": rate,
        "train/is_applied": result.is_applied,
        "train/target_tokens": result.num_valid_tokens,
        "train/data_wait_s": wait_s,
        "teacher/tokens_per_second": result.num_tokens / busy_s if busy_s > 0 else 0.0,
        "teacher/topk_mass": result.metrics["teacher_topk_mass"],
        # Features may be of all tokens that are not padding, which is what teacher.max_bytes_per_token counts then.
        "teacher/bytes_per_token": result.payload_nbytes
        / max(1, result.num_valid_tokens if spec.expected.features is None else result.num_tokens),
        "data/slot_start": start,
        "data/row_ids_sha256": result.row_ids_sha256(),
    }


def _finite(metrics: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
