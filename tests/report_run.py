"""The run folder of a run that never was, of any length, written without torch: for tests of its report."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from ray_kd import run_folder, storage

BEGAN = 1_750_000_000.0
"""Seconds since the epoch."""

CONFIG: dict[str, Any] = {
    "run": {"dir": "runs/mine", "seed": 0},
    "teacher": {"model": "hub/teacher", "engine": {"kind": "http", "api_key": "***"}},
    "student": {"model": None, "init": {"layers": 15}},
    "train": {"learning_rate": 0.001, "global_batch_size": 2},
}
BEFORE = {"kl": 3.25, "perplexity": 750.0, "bits_per_byte": 2.75, "top1_agreement": 0.15}
AFTER = {"kl": 0.875, "perplexity": 80.0, "bits_per_byte": 1.75, "top1_agreement": 0.5}


def metrics_line(step: int, time: float) -> dict[str, Any]:
    """One step with every column a run has."""
    loss = 1.0 + 2.0 / step
    return {
        "step": step, "time": time, "epoch": 0, "train/loss": loss, "train/kd_loss": loss * 0.9,
        "train/ce_loss": loss + 3, "train/hidden_state_loss": 0.2 / step, "train/top1_agreement": 0.5,
        "train/grad_norm": 1.5, "train/learning_rate": 1e-3, "train/is_applied": True, "train/data_wait_s": 0.01,
        "train/weight/ce": 0.5, "teacher/tokens_per_second": 300.0, "teacher/topk_mass": 0.9,
        "teacher/bytes_per_token": 256.0, "data/slot_start": 2 * (step - 1), "train/tokens_per_second": 150.0,
    }  # fmt: skip


def summary(**changes: Any) -> dict[str, Any]:
    """summary.json of such a run when it is finished."""
    actor = {
        "teacher": "", "node": "host", "pid": 7, "rows_computed": 80, "rows_from_cache": 0, "blocks": 40,
        "busy_s": 40.0, "idle_s": 40.0, "tokens": 9000, "places": 10000, "retries": 0, "tokens_per_second": 225.0,
        "busy_fraction": 0.5, "batch_fill": 0.9,
    }  # fmt: skip
    return {
        "rows_prepared": 3744, "rows_planned": 80, "rows_consumed": 78, "rows_missing": 0, "rows_duplicated": 0,
        "rows_quarantined": 2, "records_quarantined": 3, "teacher_rows_computed": 86, "teacher_rows_repeated": 6,
        "teacher_rows_from_cache": 5, "teacher_pools": [], "teacher_actors": [actor], "steps": 40, "steps_skipped": 1,
        "bad_steps": 1, "epochs": 0.02, "tokens": 123456, "target_tokens": 120000, "bytes_per_target_token": 256.5,
        "wall_s": 3723.0, "tokens_per_second": 151.5, "teacher_wait_fraction": 0.125, "restarts": 0, "exit_code": 0,
        "cause": None, "eval": {"before": BEFORE, "after": AFTER},
    } | changes  # fmt: skip


def write_run(folder: Path, steps: int = 40, starts: tuple[float, ...] = (0.0,), **changes: Any) -> Path:
    """A run of steps of a second each. starts: seconds of each start; a step is of the last start before it."""
    storage.make_folder(folder)
    starts = tuple(starts)
    write_lines(folder / "attempts.jsonl", [{"start_slot": 0, "time": BEGAN + start} for start in starts])
    each = steps // len(starts)
    times = [BEGAN + starts[min(i // each, len(starts) - 1)] + 10 + i % each for i in range(steps)]
    lines = [metrics_line(step, time) for step, time in enumerate(times, start=1)]
    lines[steps // 2 - 1] |= {"eval/kl": 1.5, "eval/perplexity": 120.0, "eval/top1_agreement": 0.4}
    lines[-1] |= {f"eval/{name}": value for name, value in AFTER.items()}
    write_lines(folder / "metrics.jsonl", lines)
    storage.make_folder(folder / "teacher")
    storage.make_folder(folder / "teacher_pool")
    blocks = [
        {"teacher": "", "node": "host", "pid": 7, "time": time, "slots": [2 * i], "busy_s": 0.5, "idle_s": 0.5}
        for i, time in enumerate(times)
    ]
    write_lines(folder / "teacher" / "a-00001.jsonl", blocks)
    pool = {"teacher": "", "pending": 0, "restarting": 0, "in_flight": 1}
    notes = [pool | {"time": time, "actors": 1, "queue": i % 7} for i, time in enumerate(times[::5])]
    write_lines(folder / "teacher_pool" / "a-00001.jsonl", notes)
    write_lines(folder / "quarantine.jsonl", [])
    storage.write_text(folder / "eval_before.json", json.dumps(BEFORE))
    storage.write_text(folder / "config.yaml", yaml.safe_dump(CONFIG, sort_keys=False))
    storage.write_text(folder / "run.json", json.dumps({"settings": {}, "content": {}}))
    samples = [{"prompt": "How are you?", "before": "", "after": "Fine & well."}]
    storage.write_text(folder / "samples.json", json.dumps({"samples": samples}))
    run_folder.write_json(folder / "summary.json", summary(**{"restarts": len(starts) - 1} | changes))
    return folder


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """Replace a file of JSON lines."""
    storage.write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


class Page(HTMLParser):
    """What a page says: its text, its tables by their first cell, its elements."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: dict[str, list[str]] = {}
        self._open: list[str] = []
        self._cells: list[str] = []
        self._text: list[str] = []
        self.feed(html)
        self.close()
        self.text = " ".join("".join(self._text).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "tr":
            self._cells = []
        elif tag in ("td", "th", "dt", "dd"):
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass
        if tag == "tr":
            self.rows[self._cells[0]] = self._cells[1:]
        elif tag == "dd":
            self.rows[self._cells[-2]] = self._cells[-1:]

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self._open):
            self._text.append(data + " ")
        if {"td", "th", "dt", "dd"} & set(self._open) and self._cells:
            self._cells[-1] += data.strip()

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of each element of this kind."""
        return [attributes for name, attributes in self.elements if name == tag]

    def curve(self, name: str) -> list[tuple[float, float]]:
        """(step, value) of the first curve of this name."""
        data = next(e for e in self.all("g") if e.get("data-name") == name)["data-points"] or ""
        return [(float(x), float(y)) for x, y in (pair.split(",") for pair in data.split())]
