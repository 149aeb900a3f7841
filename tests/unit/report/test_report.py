"""report.html: its figures are the run's, it needs nothing else, and nothing in a run becomes markup."""

import itertools
import json
import re
import time
import tomllib
import uuid
from html import escape
from pathlib import Path

import pytest
import yaml

from ray_kd import cli, pipeline, report, run_folder, storage, submission
from ray_kd.errors import ConfigError, DataError, RetryableError
from ray_kd.report import timeline
from ray_kd.report.folder import read
from tests import fake_run
from tests.report_run import AFTER, BEFORE, BEGAN, CONFIG, Page, metrics_line, summary, write_lines, write_run


def page_of(*folders: Path, holders: tuple[str, ...] = ()) -> Page:
    return Page(report.render([(folder, holders) for folder in folders]))


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_the_figures_are_those_of_the_summary(tmp_path):
    page = page_of(write_run(tmp_path / "mine"))
    assert {name: page.rows[name] for name in ("steps", "bad steps, skipped", "rows trained", "tokens")} == {
        "steps": ["40"], "bad steps, skipped": ["1"], "rows trained": ["78"], "tokens": ["123,456"],
    }  # fmt: skip
    assert page.rows["time in training"] == ["1:02 h"]
    assert page.rows["tokens/s"] == ["151.5"]
    assert page.rows["teacher wait"] == ["12.5%"]
    assert page.rows["KL(teacher || student), nats a token"] == ["3.250", "0.875"]
    assert page.rows["perplexity"] == ["750.000", "80.000"]
    ledger = ("rows planned", "missing", "trained twice", "quarantined: no teacher's answer could be used")
    assert [page.rows[name] for name in ledger] == [["80"], ["0"], ["0"], ["2"]]
    assert page.rows["rows computed by teachers"] == ["86"]
    assert page.rows["of these, computed before"] == ["6"]
    assert page.rows["rows from the teacher's cache"] == ["5"]
    assert page.rows["teacher (pid 7 on host)"] == ["80", "0", "225", "50%", "90%", "0"]
    assert page.rows["teacher"] == ["hub/teacher"]
    assert page.rows["student"] == ["made of the teacher's layers: layers 15"]
    assert "finished" in page.text
    assert "How are you?" in page.text
    assert "Fine & well." in page.text
    assert str(tmp_path / "mine") in page.text


def test_the_curves_are_those_of_the_metrics(tmp_path):
    page = page_of(write_run(tmp_path / "mine"))
    wanted = [(float(step), metrics_line(step, 0)["train/ce_loss"]) for step in range(1, 41)]
    assert page.curve("cross-entropy (labels)") == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in wanted]
    assert page.curve("KL(teacher || student)") == [(0, BEFORE["kl"]), (20, 1.5), (40, AFTER["kl"])]
    assert page.curve("held-out rows") == [(0, 0.15), (20, 0.4), (40, 0.5)]
    names = {element.get("data-name") for element in page.all("g")}
    assert names >= {
        "loss", "KD term", "hidden state loss", "training rows", "student pool", "one teacher", "wait",
        "learning rate", "gradient norm", "top-k mass", "bytes", "weight of ce",
    }  # fmt: skip
    labels = [element["aria-label"] or "" for element in page.all("svg") if "aria-label" in element]
    assert any(label.startswith("Loss, nats a token. loss: 3 at step 1, 1.05 at step 40") for label in labels)


def test_a_polyline_is_where_its_values_are(tmp_path):
    html = report.render([(write_run(tmp_path / "mine"), ())])
    points = re.search(r'data-name="KL\(teacher \|\| student\)".*?points="([^"]+)"\s*/>', html, re.S)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points[1].split())
    assert (x1 - x0) == pytest.approx(x2 - x1)
    assert (y1 - y0) / (y2 - y0) == pytest.approx((3.25 - 1.5) / (3.25 - 0.875), abs=0.01)
    assert y0 < y1 < y2, "larger values are higher up"


def test_nothing_in_a_run_becomes_markup(tmp_path):
    evil = "<script>alert('x')</script><img src=http://e.vil>"
    folder = write_run(tmp_path / 'a<b>&"c')
    config = CONFIG | {"teacher": {"model": evil}, evil: {"a": evil}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    change(folder / "samples.json", samples=[{"prompt": evil, "before": evil, "after": evil}])
    write_lines(folder / "quarantine.jsonl", [{"source": evil, "slot": 3, "reason": evil}])
    actor = summary()["teacher_actors"][0] | {"teacher": evil, "node": evil}
    change(folder / "summary.json", exit_code=64, cause=evil, teacher_actors=[actor])
    blocks = [{"teacher": evil, "node": evil, "pid": 1, "time": BEGAN + i, "slots": [], "busy_s": 0.5} for i in (5, 9)]
    write_lines(folder / "teacher" / "a-00001.jsonl", blocks)
    write_lines(folder / "metrics.jsonl", [metrics_line(1, BEGAN + 3) | {f'train/weight/"{evil}': 1.0}])
    other = write_run(tmp_path / "other")
    for html in (report.render([(folder, ())]), report.render([(folder, ()), (other, ())])):
        page = Page(html)
        assert len(page.all("script")) == 1, "the page's own"
        assert page.all("img") == []
        assert "<script>alert" not in html
        assert escape(evil, quote=False)[:20] in html
        assert evil in page.text
        assert 'a<b>&"c' in page.text


def test_a_page_needs_nothing_from_elsewhere(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    for html in (report.render([(runs[0], ())]), report.render([(run, ()) for run in runs])):
        page = Page(html)
        for tag, attributes in page.elements:
            assert tag not in ("iframe", "object", "embed", "base", "form")
            assert not any(name.startswith("on") for name in attributes)
            for name in ("src", "href", "action", "srcset", "xlink:href"):
                assert attributes.get(name, "data:") == "data:,"[: len(attributes.get(name) or "data:")]
        style = re.search(r"<style>(.*)</style>", html, re.S)[1]
        assert re.findall(r"url\(([^)]*)\)", style) == ['"#gap"'], "a pattern of the page itself"
        assert "@import" not in html
        assert not re.search(r"https?://", html)


def test_the_templates_are_in_the_package():
    data = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    folder = Path(report.__file__).parent
    packed = {path for pattern in data["ray_kd.report"] for path in folder.glob(pattern)}
    assert packed == {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}


def test_secrets_stay_masked(tmp_path):
    from ray_kd import config

    run = config.load(None, [
        f"run.dir={tmp_path / 'mine'}", "data.source={kind: jsonl, paths: [x]}", "teacher.model=t", "student.model=s",
    ])  # fmt: skip
    run.train.deepspeed = {"monitor": {"api_key": "hunter2", "hub_token": "hunter3"}}  # refused where it is read
    folder = write_run(tmp_path / "mine")
    run_folder.record(folder, run, {})
    html = report.render([(folder, ())])
    assert "hunter" not in html
    assert "api_key" in html


def test_a_failed_run_says_its_code_and_cause(tmp_path):
    folder = write_run(tmp_path / "mine", exit_code=64, cause="train.learning_rate is -1: allowed is > 0")
    page = page_of(folder)
    assert "failed with exit code 64" in page.text
    assert "train.learning_rate is -1: allowed is > 0" in page.text
    change(folder / "summary.json", exit_code=75, cause="stopped after step 12 of 40")
    assert "stopped with exit code 75 stopped after step 12 of 40 The same command goes on" in page_of(folder).text


def test_a_run_that_failed_before_it_had_anything(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    pipeline._write_failure(folder, None, submission.Job(), DataError("no usable\nrecords in x.jsonl"))
    page = Page((folder / "report.html").read_text())
    assert "failed with exit code 65 no usable records in x.jsonl" in page.text
    assert json.loads((folder / "summary.json").read_text())["cause"] == "no usable records in x.jsonl"
    for sentence in (
        "It has no config.yaml",
        "No step was logged",
        "None: the run has no held-out rows",
        "Nothing in the run folder says when the run was",
        "None: the run has no eval.prompts",
    ):
        assert sentence in page.text
    assert page.rows["rows planned"] == ["-"]


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "report.html").mkdir()
    pipeline._write_failure(folder, None, submission.Job(), RetryableError("interrupted"))
    assert json.loads((folder / "summary.json").read_text())["exit_code"] == 75
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("report.html could not be written (IsADirectoryError")


def test_a_run_that_is_on(tmp_path):
    """The summary is of an earlier start; what it says of the end is not shown."""
    folder = write_run(tmp_path / "mine", exit_code=75, cause="an old cause")
    page = page_of(folder, holders=("driver pid 4 on host",))
    assert "running (driver pid 4 on host)" in page.text
    assert "an old cause" not in page.text
    assert page.rows["steps"] == ["0 (logged up to 40)"], "none is in a checkpoint"


def test_a_run_that_was_killed_after_an_earlier_stop(tmp_path):
    folder = write_run(tmp_path / "mine", exit_code=75, cause="an old cause")
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"start_slot": 8, "time": BEGAN + 500}) + "\n")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tra')
    page = page_of(folder)
    assert "not ended" in page.text
    assert "an old cause" not in page.text


def test_the_page_of_a_real_summary(tmp_path):
    """A run folder as the code writes it, without the columns that came later."""
    folder = fake_run.write_run(tmp_path)
    page = page_of(folder)
    assert page.rows["steps"] == ["5"]
    assert page.rows["rows trained"] == ["20"]
    assert page.curve("KL(teacher || student)") == [(0, 3.0), (2, 1.5), (4, 0.75), (5, 1.0)]
    assert "top-k mass" not in page.text
    assert "(steps 2, 4, 5)" in page.text


def test_several_starts_show_their_gaps(tmp_path):
    folder = write_run(tmp_path / "mine", starts=(0.0, 40.0, 90_000.0))
    html = report.render([(folder, ())])
    titles = re.findall(r"<title>(.*?)</title>", html)
    assert {title for title in titles if title.startswith("start ")} == {f"start {n}, from slot 0" for n in (1, 2, 3)}
    # The third start came 90,000 s after the first, and 12 steps of the second had ended after 62 s.
    assert [title for title in titles if title.startswith("nothing ran for")][-1] == "nothing ran for 24:58 h"
    teacher = [title for title in titles if title.startswith("teacher: ")]
    assert teacher
    assert "evaluation after step 20" in titles
    timeline = html[html.index('<svg class="timeline"') :]
    ticks = re.findall(r'y2="[\d.]+"/><text class="tick middle" x="([\d.]+)"[^>]*>[\d:]+ (?:s|min|h)</text>', timeline)
    assert len(ticks) > 3
    assert min(b - a for a, b in zip(map(float, ticks), map(float, ticks[1:]), strict=False)) > 40


def student_lanes(folder: Path) -> dict[str, int]:
    """Seconds in each of the student's lanes."""
    steps = timeline._Steps(read(folder))
    return {kind: round(float((ends - begins).sum())) for kind, _, begins, ends in steps.lanes()}


def slow_run(folder: Path, log_every: int, **of_lines: float) -> Path:
    """Two starts of 50 steps of 10 s each, 60 s of loading before; every tenth step waits for 9 s, others do not.

    An evaluation of 200 s follows steps 30 and 100. of_lines: seconds a line says of each step in it.
    """
    write_run(folder)
    write_lines(
        folder / "attempts.jsonl", [{"start_slot": 0, "time": BEGAN}, {"start_slot": 0, "time": BEGAN + 50_000}]
    )
    lines, first = [], 0
    for step in range(1, 101):
        index = (step - 1) % 50
        if index == 0:
            first = step
        time = BEGAN + (0 if step <= 50 else 50_000) + 60 + 10 * (index + 1) + (200 if 30 < step <= 50 else 0)
        line = metrics_line(step, time) | {"train/data_wait_s": 9.0 if step % 10 == 0 else 0.0}
        if step in (30, 100):
            line |= {"eval/kl": 1.0, "time/eval_s": 200.0}
        if step % log_every == 0:
            num_steps = log_every - (step - log_every < first)  # without the first of a start
            lines.append(line | {name.replace("__", "/"): num_steps * value for name, value in of_lines.items()})
    write_lines(folder / "metrics.jsonl", lines)
    return folder


@pytest.mark.parametrize("log_every", [1, 2, 10])
def test_the_students_time_is_the_same_however_often_it_is_logged(tmp_path, log_every):
    folder = slow_run(tmp_path / "mine", log_every, time__steps_s=10.0, time__waits_s=0.5)
    assert student_lanes(folder) == {"start": 140, "student": 931, "wait": 49, "evaluation": 400}
    titles = re.findall(r"<title>(.*?)</title>", report.render([(folder, ())]))
    assert any(title.startswith("student: evaluating: ") for title in titles)
    gap = next(title for title in titles if title.startswith("nothing ran for"))
    assert gap == "nothing ran for 13:40 h", "until 760 s it evaluated and trained"


def test_of_a_line_that_says_nothing_of_its_steps_one_wait_is_drawn(tmp_path):
    assert student_lanes(slow_run(tmp_path / "mine", 10))["wait"] == 8 * 9
    assert student_lanes(slow_run(tmp_path / "all", 1))["wait"] == 10 * 9


def test_flags_of_many_starts_reach_the_end(tmp_path):
    folder = write_run(tmp_path / "mine", steps=300, starts=tuple(float(20 * i) for i in range(300)))
    drawn = timeline.timeline_of(read(folder))
    assert 75 <= len(drawn.starts) <= 150
    places = [place for place, _ in drawn.starts]
    assert max(b - a for a, b in itertools.pairwise(places)) < 20
    assert drawn.starts[-1][1] in ("start 299, from slot 0", "start 300, from slot 0")


def test_a_run_whose_teachers_worked_and_whose_student_never_did(tmp_path):
    folder = write_run(tmp_path / "mine")
    (folder / "metrics.jsonl").unlink()
    page = page_of(folder)
    assert "No step was logged" in page.text
    assert "loading, first step" not in page.text
    assert any("teacher" in (element.get("class") or "") for element in page.all("rect"))


def test_many_actors_are_one_lane(tmp_path):
    folder = write_run(tmp_path / "mine")
    for pid in range(30):
        lines = [{"node": "n", "pid": pid, "time": BEGAN + 20 + i, "slots": [], "busy_s": 0.9} for i in range(9)]
        write_lines(folder / "teacher" / f"b{pid}-00001.jsonl", lines)
    page = page_of(folder)
    assert "teacher (31 actors)" in page.text


def test_null_numbers_leave_a_gap(tmp_path):
    folder = write_run(tmp_path / "mine")
    lines = [metrics_line(step, BEGAN + step) for step in range(1, 41)]
    lines[9]["train/loss"] = None
    write_lines(folder / "metrics.jsonl", lines)
    html = report.render([(folder, ())])
    assert [step for step, _ in Page(html).curve("loss")] == [*map(float, range(1, 10)), *map(float, range(11, 41))]
    curve = re.search(r'data-name="loss" .*?</g>', html, re.S)[0]
    assert curve.count("<polyline") == 2


def test_a_single_step_is_a_point(tmp_path):
    folder = write_run(tmp_path / "mine")
    write_lines(folder / "metrics.jsonl", [metrics_line(1, BEGAN + 3)])
    curve = re.search(r'data-name="loss" .*?</g>', report.render([(folder, ())]), re.S)[0]
    assert curve.count("<circle") == 1


def test_many_samples_are_cut(tmp_path):
    folder = write_run(tmp_path / "mine")
    change(
        folder / "samples.json", samples=[{"prompt": f"say {i}", "before": "", "after": "x" * 9000} for i in range(50)]
    )
    html = report.render([(folder, ())])
    assert "The first 20 of 50; all are in samples.json." in Page(html).text
    assert len(html) < 200_000


def test_ten_thousand_steps_are_a_small_page_in_a_second(tmp_path):
    folder = write_run(tmp_path / "mine", steps=10_000)
    report.render([(write_run(tmp_path / "small"), ())])  # imports
    start = time.process_time()
    html = report.render([(folder, ())])
    assert time.process_time() - start < 1.0
    assert len(html) < 1_000_000
    assert max(len(element.get("data-points", "").split()) for element in Page(html).all("g")) <= 600


def test_a_comparison(tmp_path):
    first, second = write_run(tmp_path / "ce"), write_run(tmp_path / "kd")
    config = CONFIG | {"train": CONFIG["train"] | {"learning_rate": 0.002}, "run": {"dir": "runs/other", "seed": 0}}
    (second / "config.yaml").write_text(yaml.safe_dump(config))
    change(second / "summary.json", steps=44, eval={"before": BEFORE, "after": AFTER | {"kl": 0.5}})
    page = page_of(first, second)
    assert page.rows["KL(teacher || student), nats a token"] == ["3.250", "0.875", "0.500"]
    assert page.rows["steps"] == ["40", "44"]
    assert page.rows["train.learning_rate"] == ["0.001", "0.002"]
    assert "run.dir" not in page.rows
    assert "train.global_batch_size" not in page.rows
    assert page.curve("ce") == page_of(first).curve("loss")
    assert page.rows["ce"] == [str(first)]


def test_runs_of_one_name_are_told_apart(tmp_path):
    page = page_of(write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run"))
    assert {"a/run", "b/run"} <= page.rows.keys()


def test_the_job_writes_a_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = write_run(tmp_path / "one")
    write_run(tmp_path / "two")
    assert cli.main("report", [str(one)]) == 0
    assert Page((one / "report.html").read_text()).rows["steps"] == ["40"]
    assert cli.main("report", [str(one), "two"]) == 0
    assert "2 runs beside each other" in (tmp_path / "report.html").read_text()
    assert cli.main("report", [str(one), "--out", "pages/a.html"]) == 0
    assert (tmp_path / "pages" / "a.html").exists()
    assert f"report: {one / 'report.html'}\n" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_refused(tmp_path, capsys):
    assert cli.main("report", [str(tmp_path)]) == ConfigError.exit_code
    assert re.fullmatch(r"error: '.*' is no run folder: it has none of .*\n", capsys.readouterr().err)
    folder = write_run(tmp_path / "mine")
    with pytest.raises(SystemExit, match="64"):
        cli.main("report", [str(folder), "--out", str(tmp_path)])
    (folder / "metrics.jsonl").write_text("{nonsense}\n")
    assert cli.main("report", [str(folder)]) == DataError.exit_code
    assert "jobs/doctor.py" in capsys.readouterr().err.splitlines()[-1]


def test_a_run_in_an_object_store(object_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = write_run(storage.path(f"{object_store.uri}/{uuid.uuid4().hex}/mine"))
    report.write(folder)
    page = Page(storage.read_text(folder / "report.html"))
    assert page.rows["rows trained"] == ["78"]
    assert page.curve("loss")[0] == (1, 3)
    assert str(folder) in page.text
