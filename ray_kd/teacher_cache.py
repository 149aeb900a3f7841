"""The teacher's cache as a run uses it: which one, whether it has all that is left, filling it without a student."""

import hashlib
import itertools
import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_kd import cluster, launch, objectives, run_folder, schema, storage
from ray_kd.config import RunConfig
from ray_kd.data.order import DUMMY_ROW, SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.errors import ConfigError
from ray_kd.payloads import TOPK_LOGPROBS
from ray_kd.teacher.cache import DISABLED, Cache, Contents, open_cache
from ray_kd.teacher.engine import Engine, Request, RowError
from ray_kd.teacher.mixture import Part
from ray_kd.teacher.stage import EngineSpec

logger = logging.getLogger(__name__)

_SLOTS_AT_A_TIME = 2**20
_REPORT_EVERY_S = 10.0


def asked_of_teacher(config: RunConfig) -> Request:
    """What the student needs to know of every target position."""
    from ray_kd.models import shared_vocab_size

    return Request(
        kind=config.teacher.payload,
        top_k=config.teacher.top_k,
        temperature=objectives.payload_temperature(config),
        selection=config.teacher.selection,
        seed=config.run.seed,
        vocab_size=shared_vocab_size(config.teacher),
        features=objectives.asked_features(config),
    )


def folder(config: RunConfig) -> Path:
    """teacher.cache.path, or its default beside the run folder."""
    path = config.teacher.cache.path
    found = run_folder.run_dir(config).parent / "teacher_cache" if path is None else storage.path(path)
    if storage.is_remote(found):
        raise ConfigError(f"teacher.cache.path is '{found}': allowed is a folder on a disk that all nodes share")
    return found


def open_for(config: RunConfig, prepared: PreparedData, part: Part | None = None) -> Cache | None:
    """The cache of the configured teacher's answers to the prepared data; None when it is disabled.

    part: its own, where it is one of several; they have a folder each.
    Raises ConfigError naming what differs when its answers are of no use to this run.
    """
    if config.teacher.cache.mode == DISABLED:
        return None
    from ray_kd.data.tokenizer import tokenizer_identity
    from ray_kd.models import model_identity

    teacher, manifest = config.teacher, prepared.manifest
    tokenizer = json.dumps(tokenizer_identity(teacher.model, teacher.revision))
    asked = Contents.of(
        asked_of_teacher(config),
        data=manifest.fingerprint,
        num_rows=manifest.num_rows,
        tokenizer=hashlib.sha256(tokenizer.encode()).hexdigest()[:16],
        model=teacher.model,
        revision=teacher.revision,
        teacher=model_identity(teacher.model, teacher.revision),
        dtype=teacher.dtype,
        engine=json.dumps(run_folder.engine_identity(config, with_address=True), sort_keys=True),
        wire=teacher.wire,
    )
    can_rescale = teacher.payload == TOPK_LOGPROBS and config.loss.tail == "renormalize" and part is None
    path = folder(config) if part is None else folder(config) / part.name
    cache = open_cache(path, asked, teacher.cache.mode, any_temperature=can_rescale)
    if cache.is_written:
        cluster.check_shared(cache.folder, config.train.timeout_s, "teacher.cache.path")
    own = rows_of(part, prepared)
    rows = int(cache.has(np.flatnonzero(own)).sum())
    logger.info("teacher cache '%s': answers to %d of %d rows", cache.folder, rows, own.sum())
    return cache


def rows_of(part: Part | None, prepared: PreparedData) -> NDArray[np.bool_]:
    """bool [training rows]: those that a teacher answers."""
    return np.ones(prepared.num_rows, np.bool_) if part is None else part.takes(prepared.routes())


def covers(cache: Cache, own: NDArray[np.bool_], order: SlotOrder, start_slot: int) -> bool:
    """Whether the cache has the answer to every one of its `rows_of` from this slot on.

    Looks for what others did to it meanwhile.
    """
    cache.refresh()
    # To the end of the next epoch, which has every row; those after it have no other.
    stop = min(order.num_slots, (start_slot // order.num_rows + 2) * order.num_rows)
    for start in range(start_slot, stop, _SLOTS_AT_A_TIME):
        row_ids = order.rows(start, min(start + _SLOTS_AT_A_TIME, stop))
        row_ids = row_ids[row_ids != DUMMY_ROW]
        if not cache.has(row_ids[own[row_ids]]).all():
            return False
    return True


def merge(cache: Cache) -> None:
    """Leave few files, for whoever reads next. That it could not be done is a warning: the run is finished."""
    try:
        cache.merge()
    except OSError as error:
        logger.warning("the files of the teacher cache '%s' stay as many as they are: %s", cache.folder, error)


@dataclass
class Filled:
    """What filling a cache came to."""

    folder: Path
    rows: int
    """Training rows of the prepared data that the teacher answers."""
    computed: int = 0
    """Rows whose answers were computed now."""
    refused: int = 0
    """Rows that the teacher has no usable answer to; they are not cached."""
    seconds: float = 0.0
    """From the start of the teachers on, which load their model first."""

    @property
    def rows_per_second(self) -> float:
        """Through the teachers."""
        return (self.computed + self.refused) / self.seconds if self.seconds else 0.0


def fill(config: RunConfig, prepared: PreparedData, cache: Cache, part: Part | None = None) -> Filled:
    """Compute the answers that the cache of a teacher does not have yet. Ray must be initialised.

    Whoever kills it loses the files that were not put yet, and the same call then ends with the same bytes: a file has
    always the same rows, but for those that were refused or were there before.
    """
    import ray

    teacher, num_rows = config.teacher, prepared.num_rows
    own = rows_of(part, prepared)
    is_missing = own & ~cache.has(np.arange(num_rows))
    edges = itertools.pairwise([*range(0, num_rows, teacher.cache.file_rows), num_rows])
    missing = [(start, stop) for start, stop in edges if is_missing[start:stop].any()]
    left = int(is_missing.sum())
    filled = Filled(cache.folder, int(own.sum()))
    if not missing:
        return filled
    spec = EngineSpec.of(teacher, cluster.Threads.of(config).of_teacher(teacher))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.label_selector = teacher.pool.label_selector or None
    done = ray.data.from_items(
        [{"start": start, "stop": stop} for start, stop in missing], override_num_blocks=min(len(missing), 1000)
    ).map_batches(
        _Filler,
        fn_constructor_args=(spec, cache, prepared, part),
        batch_size=1,
        **cluster.actor_pool(teacher.pool),
    )
    done.set_name("cache_teacher")  # in the dashboard
    start_s = reported_s = time.monotonic()
    try:
        for batch in done.iter_batches(batch_size=None, prefetch_batches=0):
            filled.computed += int(batch["computed"].sum())
            filled.refused += int(batch["refused"].sum())
            filled.seconds = time.monotonic() - start_s
            for reason in batch["reason"]:
                if reason:
                    logger.warning("the teacher refused rows, which are not cached: %s", reason)
            if time.monotonic() > reported_s + _REPORT_EVERY_S:
                reported_s = time.monotonic()
                logger.info("cached %d of %d rows (%.3g rows/s)", filled.computed, left, filled.rows_per_second)
    except ray.exceptions.RayError as error:
        raise launch.of_task(error, "filling the teacher cache") from error
    return filled


class _Filler:
    """The actor that answers the rows of one file after another."""

    def __init__(self, spec: EngineSpec, cache: Cache, prepared: PreparedData, part: Part | None) -> None:
        self._cache, self._prepared, self._own = cache, prepared, rows_of(part, prepared)
        self._engine: Engine = spec.build(cache.contents.request)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        (start,), (stop,) = batch["start"], batch["stop"]
        cache = self._cache
        cache.refresh()  # another may be filling it too
        row_ids = np.arange(start, stop)
        row_ids = row_ids[self._own[row_ids] & ~cache.has(row_ids)]
        rows = schema.to_numpy(self._prepared.read_rows(row_ids).select(list(schema.PREPARED_COLUMNS)))
        answers = self._engine.annotate(rows, cache.contents.request)
        refused = [answer.reason for answer in answers if isinstance(answer, RowError)]
        answered = {
            row_id: answer.encode(cache.contents.wire)
            for row_id, answer in zip(row_ids.tolist(), answers, strict=True)
            if not isinstance(answer, RowError)
        }
        if answered:
            cache.add(list(answered), list(answered.values()), name=f"{row_ids[0]:012d}-{row_ids[-1]:012d}")
        return {"computed": [len(answered)], "refused": [len(refused)], "reason": [refused[0] if refused else ""]}
