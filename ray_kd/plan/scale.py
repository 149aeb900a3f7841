"""The same run on more GPUs than anybody has at hand: a simulation by formulas, no measurement.

For each number of GPUs the split into teachers and students that trains the most tokens/s. A worker's step is its
micro-batches, as configured, and then the communication of its ZeRO stage, nothing of which overlaps; so the global
batch grows with the workers. Bytes that a worker sends a step (ZeRO, https://arxiv.org/abs/1910.02054, section 7;
N parameters that train, w bytes each, a micro-batches, W workers; each times (W - 1) / W):

    stage 0, 1    2 w N                gradients are reduced once a step, all-gather or the other half of all-reduce
    stage 2       (a + 1) w N          they are reduced after each micro-batch
    stage 3       3 a w N              weights are gathered for forward and backward

They go over the links between the GPUs of a node as long as the workers fit in one, else over a GPU's part of its
node's network link.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ray_kd.plan.rates import Balance, Pool

COUNTS = (8, 16, 64, 256, 1000)
GPUS_A_NODE = 8
BLOCKS_PER_SECOND = 37.0
"""Of the stream, all of which pass Ray Data's executor, one process: 27 ms each, as measured on two cores."""


@dataclass(frozen=True)
class Workers:
    """What a train worker is on any number of them."""

    seconds_per_token: float
    tokens_a_step: int
    """Of one worker: its micro-batches."""
    micro_batches: int
    rows_a_step: int
    stage: int
    gradient_nbytes: float
    """Of all gradients, in the type that they travel in."""
    peer_bandwidth: float
    """Bytes/s between the GPUs of a node."""


@dataclass(frozen=True)
class Simulated:
    """A run on so many GPUs."""

    gpus: int
    teacher_gpus: int
    student_gpus: int
    tokens_per_second: float
    waits: str
    waiting: float
    """Of the waiting pool's time."""
    communication: float
    """Of a worker's step."""
    rows_a_step: int
    wire: float
    """Bytes/s from the teachers to the students."""
    link: float
    """Share of a student node's link that the wire takes."""
    object_store: float
    """Bytes that keep every process busy."""
    blocks: float
    """Blocks/s, as a share of what the executor is assumed to manage."""
    hours: float | None


def communicated(workers: Workers, count: int) -> float:
    """Bytes that each of so many workers sends a step."""
    times = {0: 2, 1: 2, 2: workers.micro_batches + 1, 3: 3 * workers.micro_batches}[workers.stage]
    return times * workers.gradient_nbytes * (count - 1) / count


def step_seconds(workers: Workers, count: int, link: float) -> tuple[float, float]:
    """(of a step's passes, of its communication). link: bytes/s of a node's network link."""
    bandwidth = workers.peer_bandwidth if count <= GPUS_A_NODE else link / GPUS_A_NODE
    return workers.seconds_per_token * workers.tokens_a_step, communicated(workers, count) / bandwidth


def simulate(
    workers: Workers, teacher_gpu_seconds: float, gpus_a_teacher: int, *, link: float, row_nbytes: float,
    length: int, block_rows: int, num_tokens: float | None, counts: Sequence[int] = COUNTS,
) -> list[Simulated]:  # fmt: skip
    """One line a number of GPUs; numbers too small for one actor beside one worker are left out.

    teacher_gpu_seconds: seconds of a GPU for a token, all teachers together. num_tokens: of the run.
    """
    lines = []
    for gpus in counts:
        splits = range(gpus_a_teacher, gpus, gpus_a_teacher)
        found = [_balance(workers, teacher_gpu_seconds, n, gpus - n, link) for n in splits]
        if not found:
            continue
        best = max(found, key=lambda balance: balance.tokens_per_second)
        students = best.student.processes
        passes, sent = step_seconds(workers, students, link)
        rate = best.tokens_per_second
        waits, waiting = best.waiting
        wire = rate / length * row_nbytes
        processes = students + best.teacher.processes // gpus_a_teacher
        lines.append(
            Simulated(
                gpus=gpus, teacher_gpus=best.teacher.processes, student_gpus=students, tokens_per_second=rate,
                waits=waits, waiting=waiting, communication=sent / (passes + sent),
                rows_a_step=workers.rows_a_step * students, wire=wire,
                link=wire / -(-students // GPUS_A_NODE) / link,
                object_store=4 * processes * block_rows * row_nbytes,
                blocks=rate / length / block_rows / BLOCKS_PER_SECOND,
                hours=None if num_tokens is None else num_tokens / rate / 3600,
            )
        )  # fmt: skip
    return lines


def _balance(workers: Workers, teacher_gpu_seconds: float, teachers: int, students: int, link: float) -> Balance:
    seconds = sum(step_seconds(workers, students, link)) / workers.tokens_a_step
    return Balance(Pool(teachers, 1, teacher_gpu_seconds), Pool(students, 1, seconds), shared=0)
