"""Tokens/s of each pool, who waits for whom, and how long a run takes.

A token is a position of a row: padding costs what a token costs. A device computes its peak (`devices.py`) times a
model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311), or what was measured here
(`measure.py`).

    rate of a pool        devices x FLOP/s of one / FLOPs of a token
    of the run            the smaller of the two; the other pool waits for 1 - smaller / larger of its time
    on one device         1 / (1 / teacher + 1 / student): the two take turns
    on some of them       with the share f of the teachers' devices, the smaller of student and
                          1 / (1 / teacher + f / student)
    actors per worker     rate of a worker / rate of an actor
"""

from dataclasses import dataclass

MFU = 0.4
"""Of training and of prefill with plain PyTorch on one node: 0.3 to 0.55 is what is published for such models."""


@dataclass(frozen=True)
class Pool:
    """Processes that are alike, and what each of them does."""

    processes: int
    devices_each: float
    """GPUs of one process, which may be a part of one; 1 where it runs on a CPU."""
    seconds_per_token: float
    """Of one process."""

    @property
    def devices(self) -> float:
        return self.processes * self.devices_each

    @property
    def tokens_per_second(self) -> float:
        return self.processes / self.seconds_per_token


@dataclass(frozen=True)
class Balance:
    """How the two pools go together."""

    teacher: Pool
    student: Pool
    shared: float
    """Of the teachers' devices, the share that are workers' too, which take turns there; 0 where none is."""

    @property
    def is_shared(self) -> bool:
        return self.shared > 0

    @property
    def _taught(self) -> float:
        """Tokens/s of the teachers beside what the workers take of their devices."""
        return 1 / (1 / self.teacher.tokens_per_second + self.shared / self.student.tokens_per_second)

    @property
    def tokens_per_second(self) -> float:
        """Positions that the run trains."""
        return min(self._taught, self.student.tokens_per_second)

    @property
    def waiting(self) -> tuple[str, float]:
        """(the pool that waits, the share of its time that it does)."""
        taught, student = self._taught, self.student.tokens_per_second
        return ("student", 1 - taught / student) if taught < student else ("teacher", 1 - student / taught)

    @property
    def actors_per_worker(self) -> float:
        """Teacher actors for each train worker with which neither waits."""
        return self.teacher.seconds_per_token / self.student.seconds_per_token


def seconds_of(flops: float, flops_per_second: float, devices: float) -> float:
    """Of a token on so many devices."""
    return flops / (flops_per_second * devices)
