"""Examines a run folder: what is there, what is damaged, whether the run can go on, and from which step.

In: a run folder on a disk or in an object store. Out: a `Report` of findings. Without `fix` nothing is written. With it
the run's lock is held, leftovers are removed, and what is damaged is moved aside: no checkpoint that has its manifest
and no line is deleted.
Cost: every byte of the checkpoints and of the prepared data is read once. No Ray and no torch here.

The checks stand in the order in which they run, and a later one uses what an earlier one found (`Run`).
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

from ray_kd import locks, run_folder
from ray_kd.doctor.outcome import check_final, check_summary
from ray_kd.doctor.past import check_ledger, check_metrics, check_quarantine, check_rows, check_teachers
from ray_kd.doctor.report import BROKEN, OK, WARNING, Finding, Report, Run
from ray_kd.doctor.start import (
    check_checkpoints,
    check_config,
    check_identity,
    check_leftovers,
    check_prepared,
    check_student,
    check_writers,
)
from ray_kd.errors import ConfigError
from ray_kd.trainer.loop import CHECKPOINTS

__all__ = ["BROKEN", "OK", "WARNING", "Finding", "Report", "examine"]

_LOCK_TIMEOUT_S = 10.0

CHECKS: tuple[Callable[[Run], Iterator[Finding]], ...] = (
    check_writers, check_checkpoints, check_leftovers, check_config, check_identity, check_prepared, check_student,
    check_metrics, check_rows, check_quarantine, check_ledger, check_teachers, check_final, check_summary,
)  # fmt: skip


def examine(folder: Path, fix: bool = False) -> Report:
    """Check everything in a run folder; with fix, put right what can be.

    Raises ConfigError when there is no run, and with fix when one is being written; RetryableError when workers of a
    dead one hold it.
    """
    if not any((folder / name).exists() for name in (run_folder.CONFIG, run_folder.IDENTITY, CHECKPOINTS)):
        raise ConfigError(
            f"'{folder}' holds no run: it has no {run_folder.CONFIG}, {run_folder.IDENTITY} or {CHECKPOINTS}/"
        )
    with locks.driver_lock(folder, _LOCK_TIMEOUT_S) if fix else nullcontext() as held:
        run = Run(folder, writers=[] if fix else locks.holders(folder))
        findings: list[Finding] = []
        mended: list[Finding] = []
        for check in CHECKS:
            found = list(check(run))
            mendable = [finding for finding in found if finding.mend is not None]
            if held is not None and mendable:
                for finding in mendable:
                    held.check()
                    assert finding.mend is not None
                    finding.mend()
                mended += mendable
                found = list(check(run))
            findings += found
    state, verdict = _verdict(run, findings)
    return Report(str(folder), state, verdict, findings, mended)


def _verdict(run: Run, findings: list[Finding]) -> tuple[str, str]:
    broken = [finding for finding in findings if finding.state == BROKEN]
    also = f" {len(broken)} of the findings above are broken." if broken else ""
    blocking = next((finding for finding in broken if finding.blocks), None)
    order = run.order
    of = f" of {order.num_steps}" if order else ""
    if run.writers:
        return "running", f"The run is under way, its newest checkpoint is of step {run.step}{of}.{also}"
    if run.is_finished and not any(finding.check == "final" for finding in broken):
        return "finished", f"The run is finished: its student is in {run_folder.FINAL}/.{also}"
    if blocking is not None:
        return "blocked", f"The run cannot go on because of {blocking.check}: {blocking.seen}."
    if run.step == 0:
        return "resumable", f"The run begins with step 1{of} with the same command.{also}"
    return "resumable", f"The run can go on from step {run.step}{of} with the same command.{also}"
