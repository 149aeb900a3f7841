"""The progress line: follows metrics.jsonl as it grows, so it needs no channel to the workers.

On a terminal one line is rewritten in place; in a log a line is written now and then.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ray_kd import storage

_LOG_EVERY_S = 30.0
_TAIL_BYTES = 2**16


class Progress:
    """Prints how far the run is. Call `update` as often as you like; `close` ends the line."""

    def __init__(self, metrics_path: Path, num_steps: int, stream: TextIO | None = None) -> None:
        self._path = metrics_path
        self._num_steps = num_steps
        self._stream = stream or sys.stdout
        self._is_terminal = self._stream.isatty()
        self._flag = storage.Flag(metrics_path)
        self._offset = self._identity = self._last_step = 0
        for line in self._new_lines():  # what is there already is an earlier attempt's
            self._last_step = line["step"]
        self._first: tuple[int, float] | None = None
        self._newest: dict[str, Any] = {}
        self._shown: tuple[int, float] = (0, 0.0)
        self._kl: float | None = None

    @property
    def step(self) -> int:
        """The newest step that `update` read, 0 before the first."""
        return self._last_step

    @property
    def step_time(self) -> float | None:
        """Unix time of the newest step of this start; None before the first."""
        return self._newest.get("time")

    def update(self, is_last: bool = False) -> None:
        """Read the new lines of the metrics and show the newest, when it is time to."""
        now = time.monotonic()
        for line in self._new_lines(at_once=is_last):
            # After a restart the file is put in place anew, and begins with what was shown already.
            if line["step"] <= self._last_step:
                continue
            self._last_step = line["step"]
            self._newest = line
            self._first = self._first or (line["step"], now)
            self._kl = line.get("eval/kl", line.get("eval/topk_bucket_kl", self._kl))
        step, shown_at = self._shown
        is_due = self._is_terminal or is_last or now - shown_at > _LOG_EVERY_S
        if self._newest and self._newest["step"] != step and is_due:
            text = self._text(now)
            self._stream.write(f"\r\x1b[2K{text}" if self._is_terminal else text + "\n")
            self._stream.flush()
            self._shown = (self._newest["step"], now)

    def close(self) -> None:
        """Show the last line and leave the cursor below it."""
        self.update(is_last=True)
        if self._is_terminal and self._newest:
            self._stream.write("\n")

    def _new_lines(self, at_once: bool = False) -> Iterator[dict[str, Any]]:
        if not self._flag.is_set(at_once):
            return
        if storage.is_remote(self._path):  # put whole each time
            yield from self._new_lines_of_store()
            return
        with self._path.open("rb") as file:
            identity = os.fstat(file.fileno()).st_ino
            if identity != self._identity:  # a resumed worker has put a shorter file in its place
                self._identity, self._offset = identity, self._offset if self._identity == 0 else 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield json.loads(line)

    def _new_lines_of_store(self) -> Iterator[dict[str, Any]]:
        try:
            lines = storage.read_last_lines(self._path, _TAIL_BYTES)
        except Exception as error:
            if not storage.is_store_error(error):
                raise
            return  # nobody's run should end because a progress line could not be shown
        yield from map(json.loads, lines)

    def _text(self, now: float) -> str:
        step = self._newest["step"]
        loss = self._newest["train/loss"]
        parts = [f"step {step}/{self._num_steps}", "loss not finite" if loss is None else f"loss {loss:.3f}"]
        if self._kl is not None:
            parts.append(f"held-out KL {self._kl:.3f}")
        parts.append(f"{self._newest['train/tokens_per_second']:,.0f} tokens/s")
        parts.append(f"teacher wait {self._newest['train/data_wait_s']:.2f} s")
        first_step, first_at = self._first or (step, now)
        if step > first_step:
            seconds = (now - first_at) / (step - first_step) * (self._num_steps - step)
            parts.append(f"ETA {int(seconds // 60)}:{int(seconds % 60):02d}")
        return "  ".join(parts)
