"""A teacher on a server: does it answer one real row, with enough log-probabilities."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ray_kd import cluster, plugins, schema
from ray_kd.config import each_teacher
from ray_kd.errors import DataError
from ray_kd.preflight.alignment import as_columns, one_row
from ray_kd.preflight.report import FAILED, OK, SKIPPED, Finding, Subject, kind_of
from ray_kd.teacher.engine import Request, RowError

_DEADLINE_S = 60.0


def check_server(subject: Subject) -> Iterator[Finding]:
    """Asks each server the first record, once; its own refusals are raised as the run would raise them."""
    servers = [alone.teacher for _, alone in each_teacher(subject.config) if kind_of(alone.teacher.engine) == "http"]
    if not servers:
        yield Finding("server", OK, "no teacher is on a server")
        return
    assert subject.models is not None
    rows = as_columns(one_row(subject))
    num_targets = int(schema.target_positions(rows[schema.LABELS], rows[schema.POSITION_IDS]).sum())
    for teacher in servers:
        module, options = plugins.options("teacher.engines", teacher.engine, "teacher.engine")
        if subject.is_offline:
            yield Finding("server", SKIPPED, f"{options.url} is not asked with --offline")
            continue
        limits = {name: min(getattr(options, name), _DEADLINE_S) for name in ("timeout_s", "deadline_s")}
        engine = module.Engine(
            replace(options, max_retries=0, **limits), model=teacher.model, revision=teacher.revision, batch_size=1
        )
        try:
            vocab_size = subject.models.vocab_size
            answer: Any = engine.annotate(rows, Request(top_k=teacher.top_k, vocab_size=vocab_size))[0]
        finally:
            engine.close()
        if isinstance(answer, RowError):
            yield Finding("server", FAILED, f"{options.url}: {answer.reason}", DataError.exit_code)
        elif len(answer.ids) != num_targets:
            seen = f"{options.url} answers {len(answer.ids)} of {num_targets} targets"
            yield Finding("server", FAILED, seen, DataError.exit_code)
        else:
            where = " from here (the teachers' nodes ask it themselves)" if cluster.address(subject.config) else ""
            yield Finding(
                "server", OK, f"{options.url} answers{where}: {num_targets} targets of the first record, "
                f"{answer.ids.shape[1]} log-probabilities each",
            )  # fmt: skip
