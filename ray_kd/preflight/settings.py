"""What the config alone shows: values, settings, the teacher's engine, and addresses in the open."""

import ipaddress
import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from ray_kd import cluster, plugins, submission, validate
from ray_kd.config import each_teacher
from ray_kd.preflight.report import OK, WARNING, Finding, Subject

_DASHBOARDS = ("RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS")
"""Variables by which Ray's own tools find a dashboard; RAY_ADDRESS may name one, too."""


def check_values(subject: Subject) -> Iterator[Finding]:
    """The keys are known and their values in range."""
    validate.check_values(subject.config)
    subject.has_values = True
    yield Finding("config", OK, "every key is known and every value in its range")


def check_settings(subject: Subject) -> Iterator[Finding]:
    """Which values go together, and which of them change nothing."""
    config = subject.config
    validate.check_settings(config)
    submission.check_outputs(config)
    subject.has_settings = True
    validate.warn_without_effect(config)
    terms = " + ".join(str(term["kind"]) for term in config.loss.terms)
    kind = plugins.kind_of(config.loss.divergence)
    yield Finding("settings", OK, f"they go together: {terms} with {kind}, batches of {config.train.global_batch_size}")


def check_engine(subject: Subject) -> Iterator[Finding]:
    """The teacher's engine provides what the loss needs, and is installed."""
    validate.check_engines(subject.config)
    kinds = [plugins.kind_of(alone.teacher.engine) for _, alone in each_teacher(subject.config)]
    yield Finding("engine", OK, f"{', '.join(kinds)}: provides {subject.config.teacher.payload}")


def check_network(subject: Subject) -> Iterator[Finding]:
    """Whether a cluster or a dashboard that others can reach asks for a token."""
    cluster.check_token(subject.config)
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        yield Finding("network", OK, "Ray asks for a token (RAY_AUTH_MODE=token)")
        return
    open_to = []
    for name in _DASHBOARDS:
        if (value := os.environ.get(name, "")).startswith("http://") and not _is_loopback(value):
            open_to.append(f"the dashboard at {name}")  # not its value: a password may stand in it
    if not open_to:
        yield Finding("network", OK, "no address of another machine is used without a token")
    for what in open_to:
        yield Finding(
            "network", WARNING, f"{what} is reached in clear text and without a token: whoever reaches it runs code "
            "there; set RAY_AUTH_MODE=token here and on its nodes",
        )  # fmt: skip


def _is_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
