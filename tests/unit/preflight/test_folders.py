"""The folders of a run: whose they are, whether they can be written, and the room that is left."""

import shutil
from types import SimpleNamespace

import pytest

from ray_kd import checkpoint, config, pipeline, run_folder, storage
from ray_kd.cluster import joining
from ray_kd.errors import RetryableError
from ray_kd.locks import driver_lock
from ray_kd.preflight import FAILED, OK, SKIPPED, WARNING, space
from ray_kd.preflight.report import Subject
from tests.preflight_case import files_below, of


def test_a_run_folder_says_whose_it_is_and_is_not_touched(look, settings, tmp_path):
    loaded = config.load(None, settings)
    folder = run_folder.run_dir(loaded)
    run_folder.create(folder)
    run_folder.record(folder, loaded, pipeline.content_of(loaded, pipeline.plan_of(loaded)))
    before = files_below(tmp_path)
    (found,) = of(look(), "run.dir")
    assert (found.state, found.seen) == (OK, f"the run in '{folder}' is this one: a start goes on with step 1")
    (found,) = of(look("train.learning_rate=1"), "run.dir")
    assert found.state == FAILED
    assert "holds another run: its train.learning_rate is" in found.seen
    (found,) = of(look("data.sequence_length=32"), "run.dir")
    assert "its data.sequence_length is 64" in found.seen
    with driver_lock(folder):
        assert of(look(), "run.dir")[0].state == FAILED
    (folder / ".driver.lock").unlink()
    (folder / ".writers.lock").unlink(missing_ok=True)
    assert files_below(tmp_path) == before


def test_too_little_space_is_75_with_the_sum(look, monkeypatch, tmp_path):
    usage = type("Usage", (), {"total": 10**6, "used": 10**6 - 1000, "free": 1000})
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage)
    warned, failed = of(look(), "disk")
    assert (warned.state, failed.state, failed.exit_code) == (WARNING, FAILED, RetryableError.exit_code)
    assert "4 checkpoints" in failed.seen  # two, the best, and the one that is being written
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage)
    assert "3 checkpoints" in of(look("train.keep_best=false"), "disk")[1].seen


def test_a_folder_that_cannot_be_written_is_named(look, home):
    (home / "file").write_text("")
    (failed,) = of(look(f"data.prepared_dir={home}/file/prepared"), "permissions")
    assert failed.state == FAILED
    assert failed.seen.startswith(f"data.prepared_dir '{home}/file' cannot be written")


def test_a_run_in_a_store_is_tried_there(look, object_store, monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    uri = f"{object_store.uri}/preflight/mine"
    report = look(f"run.dir={uri}")
    assert report.exit_code == 0, str(report)
    assert of(report, "run.dir")[0].state == OK
    assert storage.children(storage.path(uri)) == []
    (failed,) = of(look("run.dir=s3://no-such-bucket/mine"), "run.dir")
    assert failed.state == FAILED
    assert of(look(f"run.dir={uri}", offline=True), "run.dir")[0].state == SKIPPED


def started(settings, *overrides):
    """The folder of a run that was recorded with these settings."""
    loaded = config.load(None, [*settings, *overrides])
    folder = run_folder.run_dir(loaded)
    run_folder.create(folder)
    run_folder.record(folder, loaded, pipeline.content_of(loaded, pipeline.plan_of(loaded)))
    return folder


def test_of_a_finished_run_nothing_else_is_asked_for(look, settings, home, tmp_path):
    shutil.copytree(home / "teacher", tmp_path / "teacher")
    mine = f"teacher.model={tmp_path}/teacher"
    folder = started(settings, mine)
    (folder / "final").mkdir()
    (folder / "final" / "config.json").write_text("{}")
    (folder / "summary.json").write_text('{"exit_code": 0}')
    shutil.rmtree(tmp_path / "teacher")
    report = look(mine)
    assert report.exit_code == 0, str(report)
    assert [finding.seen for finding in of(report, "run.dir")] == [
        f"the run in '{folder}' is finished: the same command ends at once"
    ]
    assert {finding.state for finding in report.findings if finding.check in ("models", "records", "disk")} == {SKIPPED}
    assert look(mine, "train.learning_rate=1").exit_code == 64  # the run refuses it, finished or not
    assert look(f"teacher.model={tmp_path}/elsewhere").exit_code == 64  # and reads what is named by another path
    (folder / "summary.json").write_text('{"exit_code": 75}')
    assert look(mine).exit_code == 64


def disk_with(monkeypatch, free):
    usage = SimpleNamespace(total=free, used=0, free=free)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: usage)


def test_what_a_run_has_written_is_not_asked_for_again(look, settings, monkeypatch):
    folder = started(settings)
    loaded = config.load(None, settings)
    root, one = folder / "checkpoints", 12 * 111_936
    for step in (1, 2, 3):
        draft = checkpoint.begin(root, step)
        (draft / "weights").write_bytes(bytes(one))
        checkpoint.commit(draft, root, step, step, {"student_path": loaded.student.model})
    disk_with(monkeypatch, 2 * one)
    (found,) = of(look(), "disk")
    assert (found.state, "GB are still to be written" in found.seen) == (OK, True), found.seen
    disk_with(monkeypatch, one // 2)  # the next one has to be whole before the oldest goes
    assert of(look(), "disk")[0].state == FAILED
    assert of(look("train.keep_checkpoints=1", "train.keep_best=false"), "disk")[0].state == FAILED
    shutil.rmtree(root)
    disk_with(monkeypatch, 2 * one)
    assert of(look(), "disk")[0].state == FAILED


def test_the_cache_of_several_teachers_is_counted_once(settings, home, tmp_path):
    def cached(*overrides, mode="write_through"):
        loaded = config.load(None, [*settings, f"teacher.cache.mode={mode}", *overrides])
        manifest = SimpleNamespace(target_tokens=1000, fingerprint="0123456789abcdef0123")
        subject = Subject(loaded, joining, False, False, trained=1, total=1, manifest=manifest)
        return {need.what: need for need in space._needs(subject)}.get("cache")

    rest = [line for line in settings if not line.startswith("teacher.model")]
    settings = rest
    one = cached(f"teacher.model={home}/teacher")
    teachers = f"{{model: {home}/teacher, name: a}}, {{model: {home}/student, name: b}}"
    both = cached(f"teachers=[{teachers}]")
    assert both.nbytes == 2 * one.nbytes > 0
    answers = tmp_path / "runs" / "teacher_cache" / "b" / "0123456789abcdef"
    answers.mkdir(parents=True)
    (answers / "rows-1.parquet").write_bytes(bytes(1000))
    assert cached(f"teachers=[{teachers}]").left == both.nbytes - 1000
    assert cached(f"teacher.model={home}/teacher", mode="read") is None


@pytest.mark.parametrize("key", ["run.dir", "data.prepared_dir"])
def test_a_name_that_no_folder_can_have_is_named(look, tmp_path, key):
    report = look(f"{key}={tmp_path}/{'x' * 300}/y")
    assert report.exit_code == 64
    (failed,) = of(report, "run.dir" if key == "run.dir" else "permissions")
    assert failed.seen.startswith(f"{key} '{tmp_path}/{'x' * 300}/y' cannot be written: File name too long")
