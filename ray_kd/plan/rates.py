"""Tokens/s of each pool, who waits for whom, and how long a run takes.

A token is a position of a row: padding costs what a token costs. A device computes its peak (`devices.py`) times a
model FLOPs utilisation (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311), or what was measured here
(`measure.py`).

    rate of a pool        devices x FLOP/s of one / FLOPs of a token
    of the run            the smaller of the two; the other pool waits for 1 - smaller / larger of its time
    on one device         1 / (1 / teacher + 1 / student): the two take turns
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
    is_shared: bool
    """They are on the same device, and take turns."""

    @property
    def tokens_per_second(self) -> float:
        """Positions that the run trains."""
        rates = self.teacher.tokens_per_second, self.student.tokens_per_second
        return 1 / sum(1 / rate for rate in rates) if self.is_shared else min(rates)

    @property
    def waiting(self) -> tuple[str, float]:
        """(the pool that waits, the share of its time that it does)."""
        teacher, student = self.teacher.tokens_per_second, self.student.tokens_per_second
        if self.is_shared:
            return "student", student / (teacher + student)
        return ("student", 1 - teacher / student) if teacher < student else ("teacher", 1 - student / teacher)

    @property
    def actors_per_worker(self) -> float:
        """Teacher actors for each train worker with which neither waits."""
        return self.teacher.seconds_per_token / self.student.seconds_per_token


def seconds_of(flops: float, flops_per_second: float, devices: float) -> float:
    """Of a token on so many devices."""
    return flops / (flops_per_second * devices)
