"""metrics.jsonl as it is written, and the progress line that follows it."""

import io
import json
import math

from ray_kd.metrics import MetricLogger, read_metrics
from ray_kd.progress import Progress


def line(step, **more):
    return {"step": step, "train/loss": 2.0 / step, "train/tokens_per_second": 1000.0, "train/data_wait_s": 0.01} | more


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_lines_past_the_checkpoint_are_cut_on_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    logger = MetricLogger(path, last_step=0)
    for step in range(1, 6):
        logger.log(line(step))
    logger.close()
    with path.open("a") as file:
        file.write('{"step": 6, "train/lo')  # killed while writing
    resumed = MetricLogger(path, last_step=3)
    resumed.log(line(4))
    resumed.close()
    assert [m["step"] for m in read_metrics(path)] == [1, 2, 3, 4]


def test_a_resumed_run_shows_its_own_steps_only(tmp_path):
    path, out = tmp_path / "metrics.jsonl", Terminal()
    logger = MetricLogger(path, last_step=0)
    for step in (1, 2, 3):
        logger.log(line(step))
    logger.close()
    progress = Progress(path, num_steps=10, stream=out)
    resumed = MetricLogger(path, last_step=2)  # in place anew, cut to the checkpoint
    progress.update()
    resumed.log(line(3))
    progress.update()
    assert out.getvalue() == ""
    resumed.log(line(4))
    progress.update()
    assert "step 4/10" in out.getvalue()


def test_not_a_number_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricLogger(path, last_step=0).log({"step": 1, "a": math.nan, "b": math.inf})
    assert json.loads(path.read_text()) == {"step": 1, "a": None, "b": None}


def test_the_progress_line_of_a_bad_step(tmp_path):
    path, out = tmp_path / "metrics.jsonl", Terminal()
    progress = Progress(path, num_steps=10, stream=out)
    MetricLogger(path, last_step=0).log(line(1, **{"train/loss": math.nan}))
    progress.update()
    assert "step 1/10  loss not finite  " in out.getvalue()


def test_the_progress_line_on_a_terminal(tmp_path):
    path, out = tmp_path / "metrics.jsonl", Terminal()
    progress = Progress(path, num_steps=10, stream=out)
    progress.update()
    assert out.getvalue() == ""
    logger = MetricLogger(path, last_step=0)
    logger.log(line(1))
    progress.update()
    logger.log(line(2, **{"eval/kl": 1.25}))
    progress.update()
    progress.close()
    assert "step 1/10  loss 2.000" in out.getvalue()
    last = out.getvalue().split("\r")[-1]
    assert "step 2/10  loss 1.000  held-out KL 1.250  1,000 tokens/s  teacher wait 0.01 s  ETA 0:" in last


def test_the_progress_is_quiet_in_logs(tmp_path):
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    progress, logger = Progress(path, num_steps=50, stream=out), MetricLogger(path, last_step=0)
    for step in range(1, 51):
        logger.log(line(step))
        progress.update()
    progress.close()
    assert [text.split("  ")[0] for text in out.getvalue().splitlines()] == ["step 1/50", "step 50/50"]


def test_lines_of_an_earlier_attempt_are_not_shown(tmp_path):
    path, out = tmp_path / "metrics.jsonl", io.StringIO()
    logger = MetricLogger(path, last_step=0)
    logger.log(line(1))
    progress = Progress(path, num_steps=5, stream=out)
    progress.close()
    assert out.getvalue() == ""
