"""With --load: one real row through each teacher's engine and the student's loss, on this machine.

Costs: teachers and student in memory, one after the other; three forwards of each teacher, two steps of the student
without its optimiser. A student that is still to be made of the teacher has random weights here: its sizes count.
"""

import resource
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_kd import cluster, objectives, plugins, schema
from ray_kd.config import RunConfig, each_teacher
from ray_kd.errors import EXIT_BUG, ConfigError, DataError
from ray_kd.payloads import TOPK_LOGPROBS
from ray_kd.preflight.alignment import as_columns, as_table, one_row
from ray_kd.preflight.report import FAILED, OK, SKIPPED, Finding, Subject
from ray_kd.teacher.engine import Request, RowError
from ray_kd.teacher.mixture import parts_of
from ray_kd.teacher.stage import EngineSpec

if TYPE_CHECKING:
    import torch

_TIES = {"float32": 1e-3, "float64": 1e-3}
"""Most that the logits of two tokens differ where a forward may name either as the likeliest, by the weights' type."""
_TIES_OF_HALVES = 0.25  # two steps of bfloat16 at 16 to 32


def check_forward(subject: Subject) -> Iterator[Finding]:
    """Each teacher's likeliest tokens are those of a plain forward, and the student's loss and gradient are finite."""
    if not subject.loads:
        yield Finding("forward", SKIPPED, "no model was loaded: --load was not given")
        return
    config, rows = subject.config, as_columns(one_row(subject))
    answers: list[Any] = []
    for one, alone in each_teacher(config):
        name = "teacher" if one is None else f"teacher '{one.name}'"
        module, _ = plugins.options("teacher.engines", alone.teacher.engine, "teacher.engine")
        if not module.Engine.is_local_model:
            yield Finding("forward", SKIPPED, f"{name} was not loaded: its weights are not here")
            answers.append(None)
            continue
        finding, answer = _try_teacher(subject, alone, rows, name)
        answers.append(answer)
        yield finding
    if any(answer is None for answer in answers):
        yield Finding("forward", SKIPPED, "the student's loss: there is no answer to try it with")
    elif config.teacher.payload != TOPK_LOGPROBS:
        yield Finding("forward", SKIPPED, f"the student's loss is tried with teacher.payload={TOPK_LOGPROBS} alone")
    else:
        import torch

        torch.set_num_threads(cluster.Threads.of(config).worker)
        yield _train(subject, rows, *_mixed(subject, answers))


def _try_teacher(subject: Subject, alone: RunConfig, rows: dict[str, NDArray[Any]], name: str) -> tuple[Finding, Any]:
    """What is seen of one teacher, and its answer to the row, where there is one."""
    import torch

    assert subject.models is not None
    teacher = alone.teacher
    spec = EngineSpec.of(teacher, cluster.Threads.of(subject.config).of_teacher(teacher))
    engine = spec.beside_student(on_gpu=teacher.pool.num_gpus > 0 and torch.cuda.is_available()).build()
    request = Request(
        top_k=teacher.top_k, temperature=objectives.payload_temperature(alone), vocab_size=subject.models.vocab_size
    )
    answer, seconds = _timed(lambda: engine.annotate(rows, request)[0])
    engine.close()
    if isinstance(answer, RowError):
        return Finding("forward", FAILED, f"{name}: {answer.reason}", DataError.exit_code), None
    speed = f"{_num_tokens(rows) / seconds:,.0f} tokens/s, {_peak(torch)}"
    return _compare(subject, alone, rows, answer.ids[:, 0], name, speed), answer


def _mixed(subject: Subject, answers: list[Any]) -> tuple[bytes, int]:
    """(the payload that the student gets of the row, tokens a position in it)."""
    config = subject.config
    assert subject.models is not None
    assert subject.sample is not None
    routes = [] if config.data.route_by is None else [subject.sample.usable[0].route]
    parts = parts_of(config, routes, subject.models.vocab_size)
    width, mixture = config.teacher.top_k, None
    for part, answer in zip(parts, answers, strict=True):
        if part is None:
            mixture = answer
        elif part.shares[0] > 0:
            width, mixture = part.width, part.add(0, mixture, answer)
    assert mixture is not None  # parts_of: every route has a teacher
    return mixture.encode(config.teacher.wire), width


def _timed(function: Callable[[], Any]) -> tuple[Any, float]:
    """What a second call gives, and its seconds: the first one warms up."""
    function()
    start = time.perf_counter()
    result = function()
    return result, time.perf_counter() - start


def _num_tokens(rows: dict[str, NDArray[Any]]) -> int:
    return int(schema.real_positions(rows[schema.LABELS], rows[schema.POSITION_IDS]).sum())


def _peak(torch: Any) -> str:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 1e9:,.1f} GB of GPU memory at most"
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:,.1f} GB of memory at most"


def _compare(
    subject: Subject, alone: RunConfig, rows: dict[str, NDArray[Any]], likeliest: NDArray[np.int64], name: str,
    speed: str,
) -> Finding:  # fmt: skip
    """The engine's likeliest tokens [M] against a forward of the document alone, without packing and padding."""
    import torch

    from ray_kd import models

    teacher, found = alone.teacher, subject.models
    assert found is not None
    model = models.load_causal_lm(teacher.model, teacher.revision, teacher.dtype)
    models.check_architecture(model)
    count = _num_tokens(rows)
    targets = np.flatnonzero(schema.target_positions(rows[schema.LABELS], rows[schema.POSITION_IDS])[0])
    with torch.no_grad():
        ids = torch.from_numpy(rows[schema.INPUT_IDS][:, :count].astype(np.int64))
        logits = model(input_ids=ids, use_cache=False).logits[0, targets, : found.vocab_size].float()
    behind = logits.max(dim=-1).values - logits.gather(1, torch.from_numpy(likeliest.astype(np.int64))[:, None])[:, 0]
    tie = _TIES.get(str(model.dtype).removeprefix("torch."), _TIES_OF_HALVES)
    wrong = int((behind > tie).sum())
    if wrong:
        seen = f"{name}: at {wrong} of {len(targets)} targets the engine names another token than a plain forward"
        return Finding("forward", FAILED, f"{seen}: a bug, please report it", EXIT_BUG)
    return Finding(
        "forward", OK, f"{name}: at all {len(targets)} targets of the first record it names the likeliest token of a "
        f"plain forward; {speed}",
    )  # fmt: skip


def _train(subject: Subject, rows: dict[str, NDArray[Any]], blob: bytes, width: int) -> Finding:
    """Loss and gradient of the row, as a train worker makes them."""
    import torch

    from ray_kd.losses.terms import Schedules, parse_terms
    from ray_kd.trainer.collate import collate
    from ray_kd.trainer.feed import Expected
    from ray_kd.trainer.loop import loss_options
    from ray_kd.trainer.step import DistillModule, Scale

    config = subject.config
    temperature = objectives.payload_temperature(config)
    batch = collate(as_table(rows, [blob]), Expected(TOPK_LOGPROBS, width, temperature))
    module = DistillModule(_student(subject), loss_options(config, temperature))
    factors = Schedules.of(parse_terms(config.loss.terms), config.loss.temperature).at(1)
    scale = Scale(max(1, len(batch.targets)), factors)

    def step() -> "torch.Tensor":
        module.zero_grad()
        loss: torch.Tensor = module(batch.input_ids, batch.position_ids, batch, scale)
        loss.backward()
        return loss.detach()

    loss, seconds = _timed(step)
    norm = torch.stack([p.grad.float().norm() for p in module.parameters() if p.grad is not None]).norm()
    seen = f"student: loss {float(loss):.4g} and gradient norm {float(norm):.4g} of one row"
    if not (loss.isfinite() and norm.isfinite()):
        return Finding("forward", FAILED, f"{seen}: every such step would be skipped", ConfigError.exit_code)
    return Finding("forward", OK, f"{seen}; {_num_tokens(rows) / seconds:,.0f} tokens/s, {_peak(torch)}")


def _student(subject: Subject) -> "torch.nn.Module":
    """With what of it trains, as a train worker makes it."""
    from transformers import AutoModelForCausalLM

    from ray_kd import models

    student = subject.config.student
    if student.init is None:
        assert student.model is not None
        base = models.load_causal_lm(student.model, student.revision, student.dtype)
    else:
        assert subject.models is not None
        made = models.config_of_init(subject.models.teacher, student.init)
        base = AutoModelForCausalLM.from_config(made, dtype=models.torch_dtype(student.dtype))
    models.check_architecture(base)
    model = models.choose_trainable(base, student.lora, student.freeze, seed=subject.config.run.seed).train()
    if student.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model
