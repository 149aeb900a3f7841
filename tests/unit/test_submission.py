"""What a submitted job's record is given, with the store that Ray keeps it in replaced by a dictionary."""

import json

import pytest
from ray.exceptions import RpcError

from ray_kd import config, submission
from ray_kd.errors import ConfigError

KEY = b"_ray_internal_job_info_job-1"


class Store:
    def __init__(self):
        self.info = {KEY: json.dumps({"status": "RUNNING", "entrypoint": "python", "metadata": {"owner": "me"}})}
        self.is_down = False
        self.puts = 0

    def internal_kv_get(self, key, namespace, timeout):
        if self.is_down:
            raise RpcError("no answer", rpc_code=14)
        return self.info.get(key)

    def internal_kv_put(self, key, value, overwrite, namespace, timeout):
        self.info[key] = value
        self.puts += 1

    @property
    def metadata(self):
        return json.loads(self.info[KEY])["metadata"]


@pytest.fixture
def store(monkeypatch):
    store = Store()
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"metadata": {"job_submission_id": "job-1"}}))
    monkeypatch.setenv("RAY_JOB_STOP_WAIT_TIME_S", "120")
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.experimental.internal_kv.internal_kv_get_gcs_client", lambda: store)
    return store


def load(tmp_path, *overrides):
    return config.load(None, [f"run.dir={tmp_path / 'mine'}", "data.source={kind: jsonl, paths: [x]}",
                              "teacher.model=/models/t", *overrides])  # fmt: skip


def test_a_record_gets_what_is_shown_and_keeps_what_it_had(store):
    job = submission.Job()
    job.show({"run": "mine"})
    job.show({"step": "1/9"})
    assert store.metadata == {"owner": "me", "run": "mine", "job_name": "mine", "step": "1/9"}
    assert json.loads(store.info[KEY])["status"] == "RUNNING"


def test_a_job_keeps_the_name_that_it_was_submitted_with(store):
    store.info[KEY] = json.dumps({"metadata": {"job_name": "nightly"}})
    submission.Job().show({"run": "mine"})
    assert store.metadata == {"job_name": "nightly", "run": "mine"}


def test_steps_are_written_now_and_then_and_the_last_one_at_once(store):
    job = submission.Job()
    for step in range(100):
        job.show({"step": f"{step}/99"}, at_once=False)
    assert store.puts == 1
    job.show({"step": "99/99"})
    assert store.metadata["step"] == "99/99"
    job.show({"step": "99/99"})
    assert store.puts == 2, "nothing new"


def test_a_store_that_does_not_answer_is_asked_again_later(store):
    job = submission.Job()
    store.is_down = True
    job.show({"run": "mine"})
    store.is_down = False
    job.show({"step": "1/9"})
    assert store.metadata == {"owner": "me", "run": "mine", "job_name": "mine", "step": "1/9"}


def test_a_record_that_is_gone_is_not_made(store):
    del store.info[KEY]
    submission.Job().show({"run": "mine"})
    assert store.info == {}


def test_who_was_not_submitted_writes_nothing(store, monkeypatch):
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    submission.Job().show({"run": "mine"})
    assert store.puts == 0


def test_metadata_name_run_and_models(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-0123456789")
    loaded = load(tmp_path, "student.init={layers: 15, hidden_size: 512}")
    assert submission.describe(loaded) == {
        "run": "mine", "run_dir": str(tmp_path / "mine"), "teacher": "/models/t",
        "student": "/models/t: layers=15 hidden_size=512",
    }  # fmt: skip
    assert submission.job_config(loaded).metadata["run"] == "mine"
    loaded.teacher.model = "/models/secret-0123456789"
    assert "secret" not in str(submission.describe(loaded))
    assert "student" not in submission.describe(load(tmp_path)), "a job that prepares data has none"


def test_a_short_wait_for_the_checkpoint_is_warned_about(store, monkeypatch, caplog):
    submission.Job()
    assert not caplog.records
    monkeypatch.delenv("RAY_JOB_STOP_WAIT_TIME_S")
    submission.Job()
    assert "--runtime-env jobs/runtime_env.yaml" in caplog.text


@pytest.mark.parametrize("key", ["run.dir", "data.prepared_dir", "teacher.cache.path"])
def test_output_in_the_copy_of_the_working_folder_is_refused(tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    loaded = load(tmp_path, "run.dir=/elsewhere/mine", f"{key}=runs/mine")
    submission.check_outputs(loaded)
    job = {"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}, "metadata": {"job_submission_id": "job-1"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    with pytest.raises(ConfigError, match=f"{key} is '.*mine', in the copy of the working folder"):
        submission.check_outputs(loaded)
    submission.check_outputs(load(tmp_path.parent / "shared"))
