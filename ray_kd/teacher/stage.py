"""The teacher stage: a Ray Data actor that adds the teacher's answer to every row of a block.

Comes in: blocks of rows with `slot` and `weight`. Goes out: the same rows, in order, with `teacher_payload`,
`teacher_busy_s` and `teacher_error`. The engine is built once per actor and serves all epochs. Dummy rows
(weight 0) are passed through with an empty payload.

A row the teacher cannot answer usably keeps its slot, gets weight 0 and carries the reason: slots never shift and
a failed answer is never replaced by padding. An engine that raises for the whole block is retried by Ray
(`max_task_retries`) and then fails the run.
"""

import os
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from ray_kd import plugins, refusal, schema, storage
from ray_kd.config import Teacher
from ray_kd.teacher.engine import Engine, Request, RowError
from ray_kd.teacher.journal import Journal


@dataclass(frozen=True)
class EngineSpec:
    """What an actor needs to build its engine: small and picklable, never weights."""

    engine: Any  # the config value: a kind or {kind: ..., options}
    model: str
    revision: str | None
    dtype: str
    batch_size: int
    on_gpu: bool
    threads: int

    @classmethod
    def of(cls, teacher: Teacher, threads: int) -> "EngineSpec":
        """The configured engine, on a GPU when the pool's actors have one."""
        return cls(
            engine=teacher.engine,
            model=teacher.model,
            revision=teacher.revision,
            dtype=teacher.dtype,
            batch_size=teacher.batch_size,
            on_gpu=teacher.pool.num_gpus > 0,
            threads=threads,
        )

    def on(self, on_gpu: bool) -> "EngineSpec":
        """The same engine on a GPU, or not."""
        return replace(self, on_gpu=on_gpu)

    def build(self) -> Engine:
        """Construct the engine; loads the teacher."""
        import torch

        torch.set_num_threads(self.threads)
        module, config = plugins.options("teacher.engines", self.engine, "teacher.engine")
        return module.Engine(
            config,
            model=self.model,
            revision=self.revision,
            dtype=self.dtype,
            device="cuda" if self.on_gpu else "cpu",
            batch_size=self.batch_size,
        )


class TeacherStage:
    """The callable class for `map_batches(batch_format="pyarrow")`.

    run_dir: each actor appends one line per block to a journal there (slots through the engine, seconds), so that the
    teacher's work can be counted over every restart; a killed actor loses no line it finished.
    wire: how the payloads are encoded, one of their module's WIRES; who decodes them need not know.
    """

    def __init__(self, spec: EngineSpec, request: Request, run_dir: str, wire: str = "plain") -> None:
        self._run_dir = storage.path(run_dir)
        with refusal.reported(self._run_dir), storage.store_errors():
            self._engine = spec.build()
            self._journal = Journal(self._run_dir)
        self._request = request
        self._wire = wire

    def __call__(self, block: pa.Table) -> pa.Table:
        start = time.perf_counter()
        columns = schema.to_numpy(block.select([schema.SLOT, schema.WEIGHT]))
        slots, weight = columns[schema.SLOT], columns[schema.WEIGHT].copy()
        asked = np.flatnonzero(weight > 0)
        with refusal.reported(self._run_dir):  # a server says only when asked that it will never answer this
            answers = self._engine.annotate(_prepared(block, asked), self._request) if len(asked) else []
        assert len(answers) == len(asked), f"engine answered {len(answers)} of {len(asked)} rows"

        payloads: list[bytes] = [b""] * block.num_rows
        errors = [""] * block.num_rows
        for place, answer in zip(asked, answers, strict=True):
            if isinstance(answer, RowError):
                weight[place], errors[place] = 0.0, answer.reason
            else:
                payloads[place] = answer.encode(self._wire)

        busy_s = time.perf_counter() - start
        self._journal.add({"slots": [int(slots[i]) for i in asked], "busy_s": round(busy_s, 6), "pid": os.getpid()})
        share = np.full(block.num_rows, busy_s / block.num_rows, dtype=np.float32)
        block = block.set_column(block.schema.get_field_index(schema.WEIGHT), schema.WEIGHT, pa.array(weight))
        block = block.append_column(schema.TEACHER_PAYLOAD, pa.array(payloads, type=pa.binary()))
        block = block.append_column(schema.TEACHER_BUSY_S, pa.array(share))
        return block.append_column(schema.TEACHER_ERROR, pa.array(errors, type=pa.string()))


def _prepared(block: pa.Table, places: np.ndarray) -> dict[str, np.ndarray]:
    """The prepared columns of some rows: row_id [B] int64, the others [B, T] int32."""
    return schema.to_numpy(block.select(list(schema.PREPARED_COLUMNS)).take(pa.array(places)))
