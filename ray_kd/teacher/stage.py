"""The teacher stage: a Ray Data actor that adds the teacher's answer to every row of a block.

Comes in: blocks of rows with `slot` and `weight`. Goes out: the same rows, in order, with `teacher_payload`,
`teacher_busy_s` and `teacher_error`. The engine is built once per actor and serves all epochs. Dummy rows
(weight 0) are passed through with an empty payload.

A row the teacher cannot answer usably keeps its slot, gets weight 0 and carries the reason: slots never shift and
a failed answer is never replaced by padding. A block whose actor died comes again to the next one, which knows of the
death (`deaths.py`). An engine that raises for the whole block fails the attempt.

With a cache a row's answer is looked for when its block is here, not earlier: the reader runs far ahead, and another
actor may be computing it. What had to be computed is in the cache before the block leaves.
"""

import faulthandler
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ray_kd import plugins, refusal, schema, storage
from ray_kd.config import Teacher
from ray_kd.errors import DataError, RetryableError
from ray_kd.payloads import TOPK_LOGPROBS, TopKLogprobs
from ray_kd.ray_metrics import TEACHER, Exporter
from ray_kd.teacher.cache import Cache, cut
from ray_kd.teacher.deaths import Deaths
from ray_kd.teacher.engine import Engine, Request, RowError, Stats
from ray_kd.teacher.journal import Journal
from ray_kd.teacher.mixture import Part


@dataclass(frozen=True)
class EngineSpec:
    """What an actor needs to build its engine: small and picklable, never weights."""

    engine: Any  # the config value: a kind or {kind: ..., options}
    model: str
    revision: str | None
    dtype: str
    batch_size: int
    num_gpus: float
    threads: int
    batch_tokens: int | None = None
    timeout_s: float = 900.0

    @classmethod
    def of(cls, teacher: Teacher, threads: int) -> "EngineSpec":
        """The configured engine, on the GPUs that the pool's actors have."""
        return cls(
            engine=teacher.engine,
            model=teacher.model,
            revision=teacher.revision,
            dtype=teacher.dtype,
            batch_size=teacher.batch_size,
            num_gpus=teacher.pool.num_gpus,
            threads=threads,
            batch_tokens=teacher.batch_tokens,
            timeout_s=teacher.timeout_s,
        )

    def beside_student(self, on_gpu: bool) -> "EngineSpec":
        """The same answers in a train worker, on its one GPU or on none: vLLM would take the memory that is left."""
        module, _ = plugins.options("teacher.engines", self.engine, "teacher.engine")
        engine = "hf" if module.Engine.is_local_model else self.engine
        return replace(self, engine=engine, num_gpus=int(on_gpu))

    def build(self, request: Request | None = None) -> Engine:
        """Construct the engine; loads the teacher. request: what it will be asked, for whom it matters."""
        import torch

        torch.set_num_threads(self.threads)
        module, config = plugins.options("teacher.engines", self.engine, "teacher.engine")
        # One of a third party may be older than these.
        more = {"batch_tokens": self.batch_tokens} if getattr(module.Engine, "takes_batch_tokens", False) else {}
        more |= {"returns_attention": True} if request is not None and request.needs_attention else {}
        more |= {"is_spread": self.num_gpus > 1} if getattr(module.Engine, "spreads", False) else {}
        return module.Engine(
            config,
            model=self.model,
            revision=self.revision,
            dtype=self.dtype,
            device="cuda" if self.num_gpus > 0 else "cpu",
            batch_size=self.batch_size,
            **more,
        )


class TeacherStage:
    """The callable class for `map_batches(batch_format="pyarrow")`.

    run_dir: each actor appends one line per block to a journal there (slots through the engine, seconds), so that the
    teacher's work can be counted over every restart; a killed actor loses no line it finished.
    wire: how the payloads are encoded, one of their module's WIRES; who decodes them need not know.
    cache: where answers are looked for first, made for the same request. While it is empty the engine is built at
    once, else for the first row that is not there.
    spec None: there is no engine, and a row that is not in the cache raises RetryableError.
    top_k: tokens a position that the student asked for, where the request, and so the cache, may have more.
    part: this teacher's, where there are several. The stages of those before it may have added to the rows.
    attempt: as of `deaths.begin`; None: a row that ends the process is asked again as long as Ray does.
    """

    def __init__(
        self, spec: EngineSpec | None, request: Request, run_dir: str, wire: str = "plain",
        cache: Cache | None = None, top_k: int | None = None, part: Part | None = None, attempt: str | None = None,
    ) -> None:  # fmt: skip
        self._spec, self._request, self._wire, self._cache, self._part = spec, request, wire, cache, part
        is_topk = request.kind == TOPK_LOGPROBS
        self._top_k = request.top_k if top_k is None else top_k
        self._cuts_to = top_k if is_topk and top_k is not None and top_k < request.top_k else None
        self._folder = storage.path(run_dir)
        self._built: Engine | None = None
        with self._guarded():
            if cache is None or cache.is_empty:
                self._engine()
            self._journal = Journal(self._folder)
            name = "" if part is None else part.name
            self._deaths = Deaths(self._folder, attempt, name)
            self._exporter = Exporter(self._folder.name, pool=TEACHER, teacher=name)
        self._stopped = time.perf_counter()

    def __call__(self, block: pa.Table) -> pa.Table:
        with self._guarded():
            return self._answer(block)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Nothing in here takes for ever, and what no other try would change reaches the driver."""
        timeout_s = None if self._spec is None else self._spec.timeout_s
        with deadline(timeout_s), refusal.reported(self._folder), storage.store_errors():
            yield

    def _answer(self, block: pa.Table) -> pa.Table:
        start = time.perf_counter()
        idle_s = start - self._stopped
        before = replace(self._stats())
        block = block if schema.TEACHER_PAYLOAD in block.column_names else _unanswered(block)
        columns = schema.to_numpy(block.select([schema.SLOT, schema.WEIGHT, schema.ROW_ID, schema.TEACHER_BUSY_S]))
        slots, row_ids, weight = columns[schema.SLOT], columns[schema.ROW_ID], columns[schema.WEIGHT].copy()
        routes = self._routes(block)
        wanted = np.flatnonzero((weight > 0) & (True if self._part is None else self._part.takes(routes)))
        payloads: list[bytes] = [b""] * block.num_rows
        errors = block.column(schema.TEACHER_ERROR).to_pylist()
        asked = self._look_up(row_ids, wanted, payloads)
        answers: list[Any] = []
        if len(asked):
            before_s = time.perf_counter()
            self._engine()
            start += time.perf_counter() - before_s  # loading the model, if that was now, is no work on these rows
            answers = self._ask(block, slots, row_ids, asked)
        for place, answer in zip(asked, answers, strict=True):
            try:
                payloads[place] = b"" if isinstance(answer, RowError) else answer.encode(self._wire_of(routes[place]))
            except DataError as error:  # NaN, or ids of no vocabulary: of an engine that did not look itself
                answer = RowError(str(error))
            if isinstance(answer, RowError):
                weight[place], errors[place] = 0.0, self._named(answer.reason)
        self._keep(row_ids, [place for place in asked if payloads[place]], payloads)
        if self._cuts_to is not None:
            payloads = [cut(payload, self._cuts_to, self._wire) if payload else payload for payload in payloads]
        known = block.column(schema.TEACHER_PAYLOAD).to_pylist()
        payloads = [
            self._sum(route, so_far, own) if own else so_far
            for route, so_far, own in zip(routes, known, payloads, strict=True)
        ]

        self._stopped = time.perf_counter()
        busy_s = self._stopped - start
        work = {name: value - getattr(before, name) for name, value in asdict(self._stats()).items()}
        self._journal.add(
            {
                "teacher": "" if self._part is None else self._part.name,
                "node": os.uname().nodename,
                "pid": os.getpid(),
                "time": time.time(),
                "slots": [int(slots[i]) for i in asked],
                "cached": len(wanted) - len(asked),
                "busy_s": round(busy_s, 6),
                "idle_s": round(idle_s, 6),
                **work,
            }
        )
        self._export(len(asked), len(wanted) - len(asked), busy_s, idle_s, work)
        busy = columns[schema.TEACHER_BUSY_S] + np.float32(busy_s / block.num_rows)
        return _with_columns(
            block,
            {
                schema.WEIGHT: pa.array(weight),
                schema.TEACHER_PAYLOAD: pa.array(payloads, type=pa.binary()),
                schema.TEACHER_BUSY_S: pa.array(busy),
                schema.TEACHER_ERROR: pa.array(errors, type=pa.string()),
            },
        )

    def _ask(self, block: pa.Table, slots: np.ndarray, row_ids: np.ndarray, places: np.ndarray) -> list[Any]:
        """An answer for each place. All are asked for at once, but for rows that actors died of."""
        answers: dict[int, Any] = {
            int(place): self._deaths.error(int(slots[place]), int(row_ids[place])) for place in places
        }
        left = [place for place, error in answers.items() if error is None]
        for group in self._deaths.groups(slots, left):
            with self._deaths.noted(slots[group].tolist()):
                said = self._engine().annotate(_prepared(block, np.array(group)), self._request)
            assert len(said) == len(group), f"engine answered {len(said)} of {len(group)} rows"
            over = self._request.vocab_size  # which an engine that is older than it does not know
            logprobs = [getattr(one, "topk", one) for one in said]  # of features; hidden states have no ids
            assert over is None or all(getattr(one, "vocab_size", over) == over for one in logprobs), (
                f"engine answered over other ids than the {over} it was asked for"
            )
            answers.update(zip(group, said, strict=True))
        return list(answers.values())

    def _export(self, computed: int, cached: int, busy_s: float, idle_s: float, work: dict[str, int]) -> None:
        send = self._exporter.send
        send("raykd_teacher_rows_computed_total", computed)
        send("raykd_teacher_rows_from_cache_total", cached)
        send("raykd_teacher_busy_seconds_total", busy_s)
        send("raykd_teacher_idle_seconds_total", idle_s)
        send("raykd_teacher_retries_total", work["retries"])
        send("raykd_tokens_total", work["tokens"])
        send("raykd_tokens_per_second", work["tokens"] / busy_s if computed else None)

    def _stats(self) -> Stats:
        return getattr(self._built, "stats", None) or Stats()  # an engine of a third party may have none

    def _routes(self, block: pa.Table) -> np.ndarray:
        if self._part is None:
            return np.zeros(block.num_rows, dtype=np.int32)
        routes: np.ndarray = schema.to_numpy(block.select([schema.ROUTE]))[schema.ROUTE]
        return routes

    def _named(self, reason: str) -> str:
        return reason if self._part is None else f"teacher '{self._part.name}': {reason}"

    def _wire_of(self, route: int) -> str:
        """Of this teacher's own answer. The grid of compact is for what is cached and for what leaves the last one."""
        return self._wire if self._cache is not None or self._is_all(route) else "plain"

    def _is_all(self, route: int) -> bool:
        """Whether this teacher's answer to rows of the route is what the student gets."""
        part = self._part
        return part is None or (part.shares[route] == 1.0 and part.width == self._top_k)

    def _sum(self, route: int, so_far: bytes, own: bytes) -> bytes:
        """The payload of a row: this teacher's, or its part and that of those before it."""
        part = self._part
        if part is None or self._is_all(route):
            return own
        known = TopKLogprobs.decode(so_far) if so_far else None
        return part.add(route, known, TopKLogprobs.decode(own)).encode(self._wire if part.is_last[route] else "plain")

    def _engine(self) -> Engine:
        if self._built is None:
            if self._spec is None:
                raise RetryableError("a row that was in the teacher cache is not there any more: it will be computed")
            self._built = self._spec.build(self._request)
        return self._built

    def _look_up(self, row_ids: np.ndarray, places: np.ndarray, payloads: list[bytes]) -> np.ndarray:
        """Fill in the payloads that the cache has for rows at these places; returns the places it has none for."""
        if self._cache is None:
            return places
        found = self._cache.read(row_ids[places].tolist())
        for place, payload in zip(places, found, strict=True):
            payloads[place] = payload or b""
        return places[[payload is None for payload in found]]

    def _keep(self, row_ids: np.ndarray, places: list[int], payloads: list[bytes]) -> None:
        if self._cache is not None and self._cache.is_written and places:
            self._cache.add(row_ids[places].tolist(), [payloads[place] for place in places])


@contextmanager
def deadline(seconds: float | None) -> Iterator[None]:
    """End this process if the block takes longer, its stacks in its log: Ray gives what it did to another process.

    Python's own threads could not: what hangs may hold the GIL.
    """
    if seconds is not None:
        assert sys.__stderr__ is not None  # an actor's is its log; sys.stderr may have no file behind it
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


def _unanswered(block: pa.Table) -> pa.Table:
    """With the columns that the stages of teachers fill in."""
    count = block.num_rows
    return _with_columns(
        block,
        {
            schema.TEACHER_PAYLOAD: pa.array([b""] * count, type=pa.binary()),
            schema.TEACHER_BUSY_S: pa.array(np.zeros(count, np.float32)),
            schema.TEACHER_ERROR: pa.array([""] * count, type=pa.string()),
        },
    )


def _with_columns(block: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    """The table with these columns in place of those of their names, or behind the others."""
    for name, values in columns.items():
        place = block.schema.get_field_index(name)
        block = block.append_column(name, values) if place < 0 else block.set_column(place, name, values)
    return block


def _prepared(block: pa.Table, places: np.ndarray) -> dict[str, np.ndarray]:
    """The prepared columns of some rows: row_id [B] int64, the others [B, T] int32."""
    return schema.to_numpy(block.select(list(schema.PREPARED_COLUMNS)).take(pa.array(places)))
