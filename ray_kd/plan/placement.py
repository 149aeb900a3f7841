"""Which processes share a GPU: parts of GPUs packed as tightly as they go, as Ray may place them.

A GPU has at most one worker (two ranks on one GPU: NCCL refuses them). Actors come beside it while their parts fit, the
largest first, and then on GPUs of their own; one that takes several GPUs shares none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ray_kd import cluster
from ray_kd.config import RunConfig


@dataclass
class Gpu:
    """What is on one GPU."""

    has_worker: bool
    room: float
    """Of it, not given to anybody."""
    teachers: list[int] = field(default_factory=list)
    """Number of the teacher in the config, of each actor on it."""


def place(workers: int, part: float, actors: Sequence[tuple[int, float]], *, apart: bool = False) -> list[Gpu]:
    """The GPUs of so many workers, and of (actors, GPUs of each) of each teacher. apart: teachers are on other nodes.

    part, GPUs of each: 0 for what runs on CPUs.
    """
    gpus = [Gpu(True, 0.0 if apart else 1 - part) for _ in range(workers if part else 0)]
    for number, (count, each) in sorted(enumerate(actors), key=lambda one: -one[1][1]):
        for _ in range(count if each else 0):
            if each >= 1:
                gpus += [Gpu(False, 0.0, [number]) for _ in range(round(each))]
                continue
            found = next((gpu for gpu in gpus if gpu.room >= each - 1e-6), None)
            if found is None:
                gpus.append(found := Gpu(False, 1.0))
            found.room -= each
            found.teachers.append(number)
    return gpus


def are_apart(config: RunConfig) -> bool:
    """Whether labels keep the teachers away from the workers' nodes."""
    own = config.train.label_selector
    others = [pool.label_selector for pool in cluster.pools_of(config)]
    return all(any(own[key] != theirs[key] for key in own.keys() & theirs.keys()) for theirs in others)
