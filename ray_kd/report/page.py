"""The words and tables of a page, and the page itself."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from ray_kd.errors import EXIT_DONE, ConfigError, DataError, RetryableError
from ray_kd.report import curves, timeline
from ray_kd.report.axes import number
from ray_kd.report.folder import FAILED, FINISHED, RUNNING, STOPPED, UNKNOWN, Run
from ray_kd.summary import METRIC_LABELS

Table = list[tuple[str, ...]]

_LONGEST = 400
"""Characters of a reason or a value in a table."""

_MOST_SAMPLES, _LONGEST_SAMPLE = 20, 2000

_ADVICE = {
    FINISHED: "",
    RUNNING: "These are the figures of its newest checkpoint, and the curves so far.",
    STOPPED: "The same command goes on from the newest checkpoint, or from the beginning where there is none.",
    UNKNOWN: "It was killed, or lost its machine, and wrote no summary: the same command goes on. "
    "These are the figures of its newest checkpoint.",
}
_EXIT_CODES = {
    EXIT_DONE: "done",
    ConfigError.exit_code: "a mistake in the config or the input, or too many bad steps in a row",
    DataError.exit_code: "no usable records, or too many bad ones",
    RetryableError.exit_code: "interrupted, or a machine was lost",
}


def of_run(run: Run) -> str:
    """The page of one run."""
    return _environment().get_template("run.html").render(
        title=f"{run.name} - {run.status}",
        run=run,
        now=_now(),
        status=_status(run),
        models=_models(run.config),
        figures=[(label, _figure(run, name)) for name, label in _HEADLINE],
        held_out=_held_out([run], ["after"]),
        charts=curves.charts_of(run),
        chart=_CHART,
        timeline=timeline.timeline_of(run),
        strip=timeline.STRIP,
        lane=timeline.LANE,
        canvas=timeline,
        ledger=_ledger(run),
        quarantine=[(str(line.get("source", "")), _where(line), _cut(str(line.get("reason", ""))))
                    for line in run.first_quarantined],
        reasons=[(_cut(reason), f"{count:,}") for reason, count in run.reasons],
        actors=_actors(run.figures.get("teacher_actors", [])),
        samples=[{name: _cut(str(text), _LONGEST_SAMPLE) for name, text in sample.items()}
                 for sample in run.samples[:_MOST_SAMPLES]],
        config=_cut(yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True), 100_000) if run.config else "",
        checkpoints=", ".join(map(str, run.checkpoint_steps)) or "none",
    )  # fmt: skip


def of_runs(runs: Sequence[Run]) -> str:
    """The page of several runs beside each other."""
    names = _names(runs)
    return _environment().get_template("comparison.html").render(
        title=f"{len(runs)} runs",
        now=_now(),
        names=names,
        figures=[
            ("status", *(_status(run)["words"] for run in runs)),
            *((label, *(_figure(run, name) for run in runs)) for name, label in _HEADLINE),
        ],
        held_out=_held_out(runs, names),
        charts=curves.charts_over(runs, names),
        chart=_CHART,
        differences=_differences([run.config for run in runs]),
        folders=[(name, str(run.folder)) for name, run in zip(names, runs, strict=True)],
    )  # fmt: skip


_HEADLINE = (
    ("steps", "steps"),
    ("bad_steps", "bad steps, skipped"),
    ("rows_consumed", "rows trained"),
    ("rows_planned", "rows planned"),
    ("tokens", "tokens"),
    ("wall_s", "time in training"),
    ("tokens_per_second", "tokens/s"),
    ("teacher_wait_fraction", "teacher wait"),
    ("bytes_per_target_token", "bytes a token on the wire"),
    ("restarts", "restarts"),
)
_LEDGER = (
    ("rows_prepared", "rows prepared, of one epoch"),
    ("rows_planned", "rows planned"),
    ("rows_consumed", "rows trained"),
    ("rows_missing", "missing"),
    ("rows_duplicated", "trained twice"),
    ("rows_quarantined", "quarantined: no teacher's answer could be used"),
    ("records_quarantined", "records quarantined while the data was prepared"),
    ("steps_skipped", "steps skipped"),
    ("teacher_rows_computed", "rows computed by teachers"),
    ("teacher_rows_repeated", "of these, computed before"),
    ("teacher_rows_from_cache", "rows from the teacher's cache"),
)
_CHART = {"width": curves.WIDTH, "height": curves.HEIGHT, "left": curves.LEFT, "right": curves.WIDTH - curves.RIGHT,
          "top": curves.TOP, "bottom": curves.HEIGHT - curves.BOTTOM}  # fmt: skip


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _status(run: Run) -> dict[str, str]:
    """The word, the word with its exit code, and what follows from it."""
    words = run.status
    if run.holders:
        words += f" ({', '.join(run.holders)})"
    elif run.exit_code:
        words += f" with exit code {run.exit_code}"
    advice = _ADVICE.get(run.status, "")
    if run.status == FAILED:
        advice = f"Code {run.exit_code}: {_EXIT_CODES.get(run.exit_code or 0, 'a bug')}."
    if run.status in (FAILED, STOPPED) and not run.cause:
        advice += " driver.log says why."
    return {"word": run.status, "words": words, "advice": advice, "cause": run.cause}


def _models(config: dict[str, Any]) -> Table:
    """Which teachers and which student, as the config names them."""
    if not config:
        return []
    teacher, student = config.get("teacher") or {}, config.get("student") or {}
    several = config.get("teachers") or []
    rows: Table = [("teacher", str(one.get("model"))) for one in several or [teacher]]
    init = student.get("init")
    made = f"made of the teacher's layers: {_value({k: v for k, v in (init or {}).items() if v is not None})}"
    return [*rows, ("student", str(student["model"]) if student.get("model") else made if init else "-")]


def _figure(run: Run, name: str) -> str:
    """A figure of the summary in words; a dash where the run has none."""
    value = run.figures.get(name)
    # Nobody planned anything for a run whose data was not known, as far as this folder says.
    if value is None or (
        name in ("rows_planned", "rows_prepared", "rows_missing") and not run.figures.get("rows_planned")
    ):
        return "-"
    if name == "wall_s":
        return timeline.span(value)
    if name == "teacher_wait_fraction":
        return f"{value:.1%}"
    if name == "steps" and run.last_step > value:
        return f"{value:,} (logged up to {run.last_step:,})"
    return f"{value:,}" if isinstance(value, int) else number(value)


def _held_out(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """Held-out metrics: a heading, then a row a metric: the student before, and each run's newest."""
    evaluations = [run.figures.get("eval") or {} for run in runs]
    is_alike = all(one.get("before") == evaluations[0].get("before") for one in evaluations)
    columns: list[tuple[str, dict[str, Any]]] = []
    for name, one in zip(names, evaluations, strict=True):
        if not is_alike or not columns:
            columns.append(("before" if is_alike else f"{name}, before", one.get("before") or {}))
        after = one.get("after") or {}
        columns.append((name, {} if after == one.get("before") else after))  # else nothing was measured since
    rows: Table = [
        (label, *("-" if found.get(name) is None else _measured(found[name]) for _, found in columns))
        for name, label in METRIC_LABELS.items()
        if any(found.get(name) is not None for _, found in columns)
    ]
    return [("", *(heading for heading, _ in columns)), *rows] if rows else []


def _measured(value: float) -> str:
    return f"{value:,.3f}" if abs(value) < 1e6 else number(value)


def _ledger(run: Run) -> Table:
    return [(label, _figure(run, name)) for name, label in _LEDGER if name in run.figures]


def _actors(actors: Sequence[dict[str, Any]]) -> Table:
    return [
        (
            f"{actor['teacher'] or 'teacher'} (pid {actor['pid']} on {actor['node'] or '?'})",
            f"{actor['rows_computed']:,}", f"{actor['rows_from_cache']:,}", f"{actor['tokens_per_second']:,.0f}",
            f"{actor['busy_fraction']:.0%}", f"{actor['batch_fill']:.0%}", f"{actor['retries']:,}",
        )
        for actor in actors[:40]
    ]  # fmt: skip


def _where(line: dict[str, Any]) -> str:
    """Where a quarantined row or record is, from whatever its line says."""
    return ", ".join(f"{name} {line[name]}" for name in ("line", "step", "slot", "row_id") if name in line)


def _names(runs: Sequence[Run]) -> list[str]:
    """The runs' folders by as much of their paths as tells them apart."""
    for depth in range(1, 8):
        names = ["/".join(run.folder.parts[-depth:]) for run in runs]
        if len(set(names)) == len(runs):
            return names
    return [str(run.folder) for run in runs]


def _differences(configs: Sequence[dict[str, Any]]) -> Table:
    """(key, a value of each run) where they are not all the same; the run's own folder is left out."""
    flat = [_flat(config) for config in configs]
    keys = dict.fromkeys(key for one in flat for key in one)
    rows: Table = []
    for key in keys:
        values = tuple(_cut(_value(one[key])) if key in one else "-" for one in flat)
        if len(set(values)) > 1 and key != "run.dir":
            rows.append((key, *values))
    return rows


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value; lists are values."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return found


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_value(item)}" for key, item in value.items()) or "{}"
    if isinstance(value, list):
        return f"[{'; '.join(map(_value, value))}]"
    return "null" if value is None else str(value)


def _cut(text: str, most: int = _LONGEST) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M %Z")
