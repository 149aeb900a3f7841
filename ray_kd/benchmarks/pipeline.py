"""A run's teacher and student beside the same two without Ray: as two processes with a queue, and taking turns in one.

All train the same rows in the same order from the same weights. The plain ones have the teacher stage, the collation
and the loss of the run; torch's AdamW stands for DeepSpeed, a queue for Ray Data.
"""

import multiprocessing
import queue
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ray_kd import config as configuration
from ray_kd import objectives, run_folder, teacher_cache
from ray_kd.config import RunConfig
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.metrics import read_metrics
from ray_kd.teacher.journal import read_journal
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from ray_kd.trainer.feed import Expected
from ray_kd.trainer.loop import METRICS, loss_options

WARM_UP_STEPS = 3
"""Steps that are not counted: the first fill caches, and the run-ahead of a teacher that started earlier is used up."""


@dataclass(frozen=True)
class Work:
    """What is trained: a run's config, and the folders that the run made."""

    run_dir: str
    prepared_dir: str
    student_path: str
    steps: int
    teacher_threads: int
    student_threads: int

    def config(self) -> RunConfig:
        """The run's own."""
        return configuration.load(Path(self.run_dir) / run_folder.CONFIG)


@dataclass
class Timeline:
    """When teacher and student worked, in seconds since the epoch; one (start, end) a block or step."""

    started: float
    """When the command was given."""
    teacher: list[tuple[float, float]] = field(default_factory=list)
    student: list[tuple[float, float]] = field(default_factory=list)
    """The step with its wait for the teacher."""
    waits: list[float] = field(default_factory=list)
    """Seconds of each step that were such a wait."""
    tokens: list[int] = field(default_factory=list)
    """Target tokens of each step."""
    nbytes: float = 0.0
    """On the wire, a target token."""

    @property
    def first_step_s(self) -> float:
        """From the command to the end of the first step."""
        return self.student[0][1] - self.started

    @property
    def seconds(self) -> float:
        """Of the steps that count."""
        return self.student[-1][1] - self.student[WARM_UP_STEPS - 1][1]

    @property
    def tokens_per_second(self) -> float:
        """Target tokens the student was trained on."""
        return sum(self.tokens[WARM_UP_STEPS:]) / self.seconds

    @property
    def wait_fraction(self) -> float:
        """Of the student's time."""
        return sum(self.waits[WARM_UP_STEPS:]) / self.seconds

    @property
    def teacher_busy(self) -> float:
        """Of the same time."""
        start, end = self.student[WARM_UP_STEPS - 1][1], self.student[-1][1]
        return sum(max(0.0, min(e, end) - max(s, start)) for s, e in self.teacher) / self.seconds

    def to_dict(self) -> dict[str, Any]:
        """The figures, and what they were made of."""
        names = ("first_step_s", "seconds", "tokens_per_second", "wait_fraction", "teacher_busy")
        return {name: getattr(self, name) for name in names} | asdict(self)


def of_run(run_dir: Path, started: float) -> Timeline:
    """The timeline of a finished run, from its metrics and its teachers' journal."""
    timeline = Timeline(started)
    previous = 0.0
    for line in read_metrics(run_dir / METRICS):
        end = line["time"]
        timeline.student.append((previous or end, end))
        timeline.waits.append(line["train/data_wait_s"])
        timeline.tokens.append(line["train/target_tokens"])
        timeline.nbytes = line["teacher/bytes_per_token"]
        previous = end
    for block in read_journal(run_dir):
        timeline.teacher.append((block["time"] - block["busy_s"], block["time"]))
    return timeline


def read_costs(work: Work, max_rows: int = 2**15) -> dict[str, float]:
    """Microseconds to read a prepared row from the page cache, in blocks of a global batch: in the order of the file,
    as an epoch has them (`data/order.py`: windows of rows that lie together, shuffled), and in no order at all."""
    config = work.config()
    prepared, size = PreparedData(work.prepared_dir), config.train.global_batch_size
    count = min(prepared.num_rows, max_rows)
    order = SlotOrder(prepared.num_rows, size, epochs=1, max_steps=None, seed=config.run.seed)
    orders = {
        "in the file's order": np.arange(count),
        "in an epoch's": order.rows(0, count),
        "at random": np.random.default_rng(0).permutation(prepared.num_rows)[:count],
    }
    costs = {}
    for name, row_ids in orders.items():
        seconds = []
        for _ in range(3):  # the first fills the page cache
            opened = PreparedData(work.prepared_dir)
            start = time.perf_counter()
            for first in range(0, count, size):
                opened.read_rows(row_ids[first : first + size])
            seconds.append(time.perf_counter() - start)
        costs[name] = 1e6 * min(seconds) / count
    return costs


def two_processes(work: Work) -> Timeline:
    """Teacher and student side by side, a queue between them, no Ray."""
    context = multiprocessing.get_context("spawn")
    config = work.config()
    ahead = max(1, config.teacher.run_ahead_rows // config.train.global_batch_size)
    blocks: Any = context.Queue(maxsize=ahead)
    results: Any = context.Queue()
    timeline = Timeline(time.time())
    teacher = context.Process(target=_teach, args=(work, blocks, results))
    student = context.Process(target=_learn, args=(work, blocks, results))
    teacher.start()
    student.start()
    parts: dict[str, Any] = {}
    while len(parts) < 2:
        parts |= _result(results, teacher, student)
    teacher.join()
    student.join()
    timeline.teacher = parts["teacher"]
    timeline.student, timeline.waits, timeline.tokens, timeline.nbytes = parts["student"]
    return timeline


def in_turns(work: Work) -> Timeline:
    """Teacher and student in one process, which does the one and then the other."""
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    started = time.time()
    process = context.Process(target=_take_turns, args=(work, started, results))
    process.start()
    timeline: Timeline = _result(results, process)
    process.join()
    return timeline


def _result(results: Any, *processes: Any) -> Any:
    """The next result. Raises RuntimeError when a process ended with none, whose traceback is on the terminal."""
    while True:
        try:
            return results.get(timeout=2)
        except queue.Empty:
            if any(process.exitcode for process in processes):
                for process in processes:
                    process.terminate()
                raise RuntimeError("a process of the benchmark failed") from None


def _teach(work: Work, blocks: Any, results: Any) -> None:
    spans = []
    for span, block in _answers(work, work.teacher_threads):
        spans.append(span)
        blocks.put(block)
    results.put({"teacher": spans})


def _learn(work: Work, blocks: Any, results: Any) -> None:
    train = _student(work, work.student_threads)
    steps, waits, tokens, nbytes = [], [], [], 0.0
    for _ in range(work.steps):
        start = time.time()
        block = blocks.get(timeout=1800)
        waits.append(time.time() - start)
        count, nbytes = train(block)
        tokens.append(count)
        steps.append((start, time.time()))
    results.put({"student": (steps, waits, tokens, nbytes)})


def _take_turns(work: Work, started: float, results: Any) -> None:
    timeline = Timeline(started)
    threads = work.teacher_threads + work.student_threads
    train = _student(work, threads)
    for span, block in _answers(work, threads):
        timeline.teacher.append(span)
        count, timeline.nbytes = train(block)
        timeline.waits.append(span[1] - span[0])
        timeline.tokens.append(count)
        timeline.student.append((span[0], time.time()))
    results.put(timeline)


def _answers(work: Work, threads: int) -> Iterator[tuple[tuple[float, float], pa.Table]]:
    """The blocks of one global batch each, answered, and when the teacher worked on each."""
    from ray_kd.data.stream import read_slots

    config = work.config()
    prepared = PreparedData(work.prepared_dir)
    train, seed = config.train, config.run.seed
    order = SlotOrder(prepared.num_rows, train.global_batch_size, train.epochs, work.steps, seed)
    request = teacher_cache.asked_of_teacher(config)
    spec = EngineSpec.of(config.teacher, threads)
    journal = Path(work.run_dir).with_name(Path(work.run_dir).name + "-plain")
    stage = TeacherStage(spec, request, str(journal), config.teacher.wire)
    for start in range(0, order.num_slots, train.global_batch_size):
        rows = read_slots(order, prepared, start, start + train.global_batch_size)
        began = time.time()
        block = stage(rows)
        yield (began, time.time()), block


def _student(work: Work, threads: int) -> Callable[[pa.Table], tuple[int, float]]:
    """A function that trains one block and returns its target tokens and their bytes on the wire, each."""
    import torch

    from ray_kd import models
    from ray_kd.losses.terms import Schedules, parse_terms
    from ray_kd.trainer.collate import collate
    from ray_kd.trainer.step import DistillModule, Scale

    torch.set_num_threads(threads)
    config = work.config()
    student = models.load_causal_lm(work.student_path, dtype=config.student.dtype)
    student.train()
    temperature = objectives.payload_temperature(config)
    module = DistillModule(student, loss_options(config, temperature))
    factors = Schedules.of(parse_terms(config.loss.terms), config.loss.temperature).at(1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=config.train.learning_rate)
    expected = Expected(config.teacher.payload, config.teacher.top_k, temperature)
    size = config.train.micro_batch_size

    def train(block: pa.Table) -> tuple[int, float]:
        micro_batches = [collate(block.slice(start, size), expected) for start in range(0, block.num_rows, size)]
        num_tokens = sum(len(m.labels) for m in micro_batches)
        for m in micro_batches:
            module(m.input_ids, m.position_ids, m, Scale(num_tokens, factors)).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.train.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return num_tokens, sum(m.payload_nbytes for m in micro_batches) / max(1, num_tokens)

    return train
