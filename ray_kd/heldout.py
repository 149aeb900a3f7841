"""The held-out evaluation as the trainer and the evaluate job call it: which rows, which teacher, which student.

Built in the process that runs it. The teacher goes over the rows once, here; evaluations after it cost the student's
forward and the two heads at target positions. Imports torch and transformers when called, not when imported: the
train function carries a reference to this module, and its first act is to start the stream.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ray_kd import plugins, schema
from ray_kd.data.prepared import PreparedData
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.engine import Request, RowError
from ray_kd.teacher.mixture import Part
from ray_kd.teacher.stage import EngineSpec, deadline

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ray_kd.eval import Evaluator, TeacherTargets


@dataclass(frozen=True)
class HeldOut:
    """What an evaluation needs, small and picklable. max_rows 0: all."""

    prepared_dir: str
    max_rows: int
    batch_size: int
    teachers: list[tuple[EngineSpec, Part | None]]
    """With its part in the answers, where it is one of several."""
    top_k: int
    is_exact: bool
    """KL over the whole vocabulary where there is one teacher and its model can be loaded; else, and without it, top k
    and a bucket."""
    vocab_size: int | None = None
    """Of the teachers' distributions, as in their `Request`."""


def make_evaluate(spec: HeldOut, device: "torch.device") -> Callable[[Any], dict[str, float]]:
    """For the trainer: DeepSpeed engine -> metrics, over all ranks. Every rank calls both, the same number of times."""
    import torch.distributed as dist

    from ray_kd.trainer.step import all_reduce

    with deadline(_teacher_s(spec)):
        evaluator = _evaluator(spec, device, dist.get_rank(), dist.get_world_size())

    def evaluate(engine: Any) -> dict[str, float]:
        engine.eval()
        try:
            return evaluator.evaluate(
                engine, lambda: _gathered_head(engine.module.student), lambda sums: all_reduce(sums, device)
            )
        finally:
            engine.train()

    return evaluate


def _teacher_s(spec: HeldOut) -> float:
    """The seconds that teachers may take for all held-out rows: for each batch what a block of the stream may take."""
    num_rows = PreparedData(spec.prepared_dir).manifest.eval_rows
    num_rows = min(num_rows, spec.max_rows or num_rows)
    return sum(teacher.timeout_s * (1 + num_rows // teacher.batch_size) for teacher, _ in spec.teachers)


def evaluate_model(spec: HeldOut, path: str, device: "torch.device") -> dict[str, Any]:
    """The metrics of a model folder and where they come from (`eval/breakdown.py`), in this process."""
    from ray_kd import models

    evaluator = _evaluator(spec, device, rank=0, world_size=1)
    breakdown = evaluator.new_breakdown()
    student = models.load_causal_lm(path, dtype="float32", device=device)
    metrics = evaluator.evaluate(
        lambda ids, positions: models.decoder_hidden(student, ids, positions),
        lambda: _gathered_head(student),
        breakdown=breakdown,
    )
    return metrics | breakdown.result()


def _evaluator(spec: HeldOut, device: "torch.device", rank: int, world_size: int) -> "Evaluator":
    from ray_kd.eval import Evaluator, rows_of_rank

    rows = rows_of_rank(PreparedData(spec.prepared_dir).read_eval(spec.max_rows), rank, world_size)
    return Evaluator(rows, _targets(spec, rows, device), batch_size=spec.batch_size, device=device)


def _targets(spec: HeldOut, rows: dict[str, Any], device: "torch.device") -> "TeacherTargets":
    """Exact where the engine's model can be loaded here, else what the engines say through their top k."""
    from ray_kd.eval import DenseTargets, TopKTargets

    teacher, part = spec.teachers[0]
    module, _ = plugins.options("teacher.engines", teacher.engine, "teacher.engine")
    if spec.is_exact and part is None and module.Engine.is_local_model:
        return DenseTargets.compute(
            rows,
            model=teacher.model,
            revision=teacher.revision,
            dtype=teacher.dtype,
            device=device,
            batch_size=spec.batch_size,
            vocab_size=spec.vocab_size,
        )
    routes = rows[schema.ROUTE]
    answers: list[TopKLogprobs | None] = [None] * len(routes)
    is_lost = np.zeros(len(routes), np.bool_)
    for teacher, part in spec.teachers:
        own = np.flatnonzero(np.ones_like(is_lost) if part is None else part.takes(routes))
        engine = teacher.build()
        try:
            said = engine.annotate(
                {name: rows[name][own] for name in schema.PREPARED_COLUMNS},
                Request(top_k=spec.top_k, temperature=1.0, vocab_size=spec.vocab_size),
            )
        finally:
            engine.close()
        for row, answer in zip(own, said, strict=True):
            if isinstance(answer, RowError):
                is_lost[row] = True
            else:
                answers[row] = answer if part is None else part.add(routes[row], answers[row], answer)
    return TopKTargets([None if lost else answer for lost, answer in zip(is_lost, answers, strict=True)])


@contextmanager
def _gathered_head(student: "nn.Module") -> Iterator[tuple["torch.Tensor", "torch.Tensor | None"]]:
    """lm_head's weight and bias, whole: under ZeRO-3 each rank holds a part between forwards."""
    from ray_kd import models

    head = models.base_causal_lm(student).get_output_embeddings()
    parameters = [p for p in (head.weight, head.bias) if p is not None]
    if not hasattr(head.weight, "ds_id"):
        yield head.weight, head.bias
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield head.weight, head.bias
