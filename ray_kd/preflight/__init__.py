"""Looks at everything that a run needs before it is started: a table of checks, and nothing is changed.

In: a config. Out: a `Report` of findings. Each rule is the one that the run itself applies (`validate`, `layout`,
`run_folder`, `cluster`); here one that is broken does not keep the others from being looked at. The run folder is not
made or written: what has to be tried is tried with a small file in the nearest folder there is, which goes again.
Cost: a pass over the bytes of the sources, the tokenizer and the models' headers. No model is loaded unless that is
asked for (`forward.py`), and no Ray is started; a configured cluster is joined for a moment. Offline nothing but this
machine is asked.

A later check uses what an earlier one found.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray_kd import cluster, storage
from ray_kd.config import RunConfig
from ray_kd.errors import ConfigError, RayKDError
from ray_kd.preflight.alignment import check_alignment, check_template
from ray_kd.preflight.data import check_prepared, check_records, check_sources
from ray_kd.preflight.fit import check_fit
from ray_kd.preflight.forward import check_forward
from ray_kd.preflight.models import check_models, check_trained
from ray_kd.preflight.packages import check_packages
from ray_kd.preflight.report import FAILED, OK, SKIPPED, WARNING, Finding, Join, Report, Subject
from ray_kd.preflight.server import check_server
from ray_kd.preflight.settings import check_engine, check_network, check_settings, check_values
from ray_kd.preflight.space import check_disk, check_permissions, check_run_dir, is_finished

__all__ = ["FAILED", "OK", "SKIPPED", "WARNING", "Finding", "Report", "examine"]


@dataclass(frozen=True)
class _Check:
    name: str
    look: Callable[[Subject], Iterator[Finding]]
    needs: tuple[str, ...] = ()
    """What it uses of the `Subject`."""


_FOUND_BY = {
    "has_values": "config", "has_settings": "settings", "has_sources": "sources", "models": "models",
    "trained": "student", "plan": "records", "sample": "records",
}  # fmt: skip
"""Part of the subject -> the check that finds it out."""

CHECKS = (
    _Check("config", check_values),
    _Check("settings", check_settings),
    _Check("engine", check_engine),
    _Check("packages", check_packages),
    _Check("network", check_network),
    _Check("sources", check_sources),
    _Check("records", check_records, ("has_values", "has_sources")),
    _Check("prepared data", check_prepared, ("plan",)),
    _Check("models", check_models, ("has_values",)),
    _Check("student", check_trained, ("has_settings", "models")),
    _Check("template", check_template, ("sample",)),
    _Check("alignment", check_alignment, ("sample",)),
    _Check("server", check_server, ("models", "sample")),
    _Check("layout", check_fit, ("has_settings",)),
    _Check("run.dir", check_run_dir),
    _Check("permissions", check_permissions),
    _Check("disk", check_disk, ("models", "trained")),
    _Check("forward", check_forward, ("has_settings", "models", "sample")),
)


_OF_FINISHED = ("config", "settings", "run.dir")
"""Of a run that is finished nothing else is looked at, by the same command as here."""


def examine(
    load: Callable[[], RunConfig], *, offline: bool = False, loads: bool = False, join: Join = cluster.joining
) -> Report:  # fmt: skip
    """Check what a config needs, all of it.

    load: gives the config, or raises ConfigError, which is then the one thing found. loads: models may be loaded, for
    the last check. join: the cluster to look at.
    """
    try:
        subject = Subject(load(), join, offline, loads)
    except ConfigError as error:
        rest = [Finding(check.name, SKIPPED, "there is no config to look at") for check in CHECKS[1:]]
        return Report([Finding("config", FAILED, str(error), error.exit_code), *rest])
    is_done = is_finished(subject)
    findings = []
    for check in CHECKS:
        if is_done and check.name not in _OF_FINISHED:
            findings.append(Finding(check.name, SKIPPED, "the run in run.dir is finished and needs it no more"))
        else:
            findings += _run(check, subject)
    return Report(findings)


def _run(check: _Check, subject: Subject) -> list[Finding]:
    missing = [_FOUND_BY[name] for name in check.needs if getattr(subject, name) in (None, False)]
    if missing:
        return [Finding(check.name, SKIPPED, f"it needs what the check '{missing[0]}' did not find out")]
    found: list[Finding] = []
    with _warnings(check.name) as warnings:
        try:
            with storage.store_errors():
                for finding in check.look(subject):
                    found.append(finding)
        except RayKDError as error:
            found.append(Finding(check.name, FAILED, " ".join(str(error).split()), error.exit_code))
    return [*found, *warnings]


@contextmanager
def _warnings(check: str) -> Iterator[list[Finding]]:
    """What the run's own checks warn of, as findings and not in the terminal."""
    found: list[Finding] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(Finding(check, WARNING, record.getMessage()))

    logger, collector = logging.getLogger("ray_kd"), Collector(logging.WARNING)
    logger.addHandler(collector)
    try:
        yield found
    finally:
        logger.removeHandler(collector)
