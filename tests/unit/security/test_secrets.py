"""Credentials reach no file, no line and no argument of Ray, wherever a user may have put them."""

import json
import logging
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import yaml

from ray_kd import cli, cluster, config, pipeline, redact, run_folder, submission
from ray_kd.errors import ConfigError
from tests.fake_run import ORDER, write_run
from tests.tiny import tiny_llama

CANARY = "canary-9f3b-of-{}"
VARIABLES = (
    "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "WANDB_API_KEY", "TEACHER_KEY",
    "MLFLOW_TRACKING_PASSWORD", "AZURE_STORAGE_CONNECTION_STRING",
)  # fmt: skip


@pytest.fixture
def canaries(monkeypatch) -> list[str]:
    """Every variable that holds a secret, set; returns the values. TEACHER_KEY is named by its value alone."""
    values = [CANARY.format(name.lower()) for name in VARIABLES]
    for name, value in zip(VARIABLES, values, strict=True):
        monkeypatch.setenv(name, value)
    return values


@pytest.fixture
def recipe(tmp_path) -> Path:
    """A config whose teacher is on a server that wants a key."""
    tiny_llama(tmp_path / "model")
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "run": {"dir": str(tmp_path / "run")},
                "data": {"source": {"kind": "jsonl", "paths": [str(data)]}, "sequence_length": 16},
                "teacher": {
                    "model": str(tmp_path / "model"),
                    "engine": {"kind": "http", "url": "http://127.0.0.1:9", "api_key_env": "TEACHER_KEY"},
                },
                "student": {"model": str(tmp_path / "model")},
                "train": {"zero_stage": 0},
                "eval": {"kl": "topk"},
            }
        )
    )
    return path


def written_below(folder: Path) -> str:
    """All bytes of all files, and their names."""
    texts = [f"{path}\n{path.read_bytes().decode(errors='replace')}" for path in folder.rglob("*") if path.is_file()]
    return "\n".join(texts)


def seen_in(values: list[str], *texts: str) -> list[str]:
    return [value for value in values if any(value in text for text in texts)]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("teacher.engine.api_key={}", "teacher.engine.api_key is named like"),
        ("teacher.engine={{kind: vllm, options: {{hf_token: {}}}}}", "teacher.engine.options.hf_token is named like"),
        ("+wandb_api_key={}", "wandb_api_key is named like"),
        ("train.deepspeed={{comet: {{api-key: {}}}}}", "train.deepspeed.comet.api-key is named like"),
        ("train.deepspeed.headers={{Authorization: Bearer {}}}", "train.deepspeed.headers.Authorization is named like"),
        ("data.source={{kind: jsonl, paths: [\"s3://me:{}@bucket/a\"]}}", r"data.source.paths.0 is a s3:// URI with a"),
        ("data.source.path=https://host/a?X-Amz-Signature={}", "data.source.path is a URI with a credential"),
        ("teacher.model=https://host/a?token={}", "teacher.model is a URI with a credential"),
        ("run.dir=s3://me:{}@bucket/a", "run.dir is a s3:// URI with a password"),
        ("teachers.0.token={}", "teachers.0.token is named like"),
        ("wandb_api_key:{}", "is not key=value"),
        ("--api-key={}", "lists what is allowed"),
        ("teacher.engine={{kind: http, api_key: {}", "cannot be read"),
    ],
)  # fmt: skip
def test_a_credential_on_the_command_line_is_refused_and_not_repeated(recipe, capfd, tmp_path, override, key):
    secret = "canary-9f3b-on-the-command-line"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["distill"])
        try:
            code = cli.main("distill", [str(recipe), "--print-config", override.format(secret)])
        except SystemExit as left:
            code = left.code
    said = "".join(capfd.readouterr())
    assert code == ConfigError.exit_code
    assert len(said.splitlines()) == 1
    assert key in said.replace("\\", "")
    assert secret not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("section", "why"),
    [
        ("teacher: {engine: {kind: vllm, options: {hf_token: canary-9f3b}}}", "hf_token is named like a credential"),
        ("teacher: {engine: {kind: vllm, options: {hf_token: '${oc.env:HF_TOKEN}'}}}", "is named like a credential"),
        ("run: {dir: 'runs/${oc.env:HF_TOKEN}'}", "run.dir holds the value of the environment variable HF_TOKEN"),
        ("data: {license: canary-9f3b-of-wandb_api_key}", "holds the value of the environment variable WANDB_API_KEY"),
        ("teacher: {engine: {api_key: canary-9f3b", "is not valid YAML"),
    ],
)
def test_a_credential_in_the_yaml_is_refused_and_not_repeated(recipe, canaries, capfd, tmp_path, section, why):
    mine = tmp_path / "mine.yaml"
    mine.write_text(section)
    base = ["data.source=x", "teacher.model=t", "student.model=s"] + ([] if "run:" in section else ["run.dir=r"])
    assert cli.main("distill", [str(mine), *base, "--print-config"]) == ConfigError.exit_code
    said = "".join(capfd.readouterr())
    assert why in said
    assert "canary" not in said


def test_what_is_no_credential_is_taken(recipe):
    loaded = config.load(
        recipe,
        ["teacher.max_bytes_per_token=10", "data.format={kind: x.y, eos_token: </s>, pad_token: <pad>}",
         "teacher.engine.options={hf_token: true}", "eval.prompts=['my password: see https://host/page?q=token']"],
    )  # fmt: skip
    assert loaded.data.format["eos_token"] == "</s>"
    assert "</s>" in config.to_yaml(loaded)


def test_printed_and_recorded_configs_have_no_credential(recipe, canaries, capfd, tmp_path):
    assert cli.main("distill", [str(recipe), "--print-config"]) == 0
    loaded = config.load(recipe)
    # Put there by code, past every check: the config itself is masked too.
    loaded.teacher.engine |= {"headers": {"X-Api-Key": "canary-9f3b-a"}, "proxy": "http://me:canary-9f3b-b@host"}
    loaded.data.license = CANARY.format("hf_token")
    run_folder.create(tmp_path / "run")
    run_folder.record(tmp_path / "run", loaded, {})
    text = written_below(tmp_path / "run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "run.json"}
    assert "canary" not in text + "".join(capfd.readouterr())
    assert text.count(redact.MASK) == 5, "two of them are part of what identifies a run"
    assert "TEACHER_KEY" in text, "the name of the variable is no secret"


def test_a_failed_run_says_and_writes_no_credential(recipe, canaries, capfd, tmp_path, monkeypatch):
    """The errors of libraries repeat what they were given: in the line, in driver.log and in the traceback there."""

    def init(**given):
        assert not seen_in(canaries, repr(given))
        raise RuntimeError(
            f"cannot start: {' '.join(canaries)}; tried http://me:canary-9f3b-pw@proxy and token=canary-9f3b"
        )

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert cli.main("distill", [str(recipe)]) == 70
    said, log = "".join(capfd.readouterr()), (tmp_path / "run" / "driver.log").read_text()
    assert "a bug, please report it: RuntimeError: cannot start: ***" in said
    assert "Traceback" in log
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["exit_code"] == 70
    assert "canary" not in said + written_below(tmp_path / "run")


def test_an_error_before_there_is_a_log_shows_no_credential(canaries, capfd, monkeypatch):
    def job(argv):
        raise RuntimeError(f"Bearer {canaries[0]}")

    monkeypatch.setitem(cli.JOBS, "distill", job)
    assert cli.main("distill", []) == 70
    said = "".join(capfd.readouterr())
    assert "Traceback" in said
    assert "canary" not in said


def test_jobs_on_a_run_write_and_print_no_credential(canaries, capfd, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    run = write_run(tmp_path)
    assert cli.main("doctor", [str(run), "--fix"]) in (0, 65)
    assert cli.main("export", [str(run), str(tmp_path / "out")]) == 0
    assert cli.main("evaluate", [str(run)]) == 64  # it has no held-out rows
    said = "".join(capfd.readouterr())
    assert "README.md" in {path.name for path in (tmp_path / "out").iterdir()}
    assert not seen_in(canaries, said, written_below(tmp_path), caplog.text)


def test_ray_is_told_no_credential(recipe, canaries, tmp_path, monkeypatch):
    """What is shown by the dashboard's API: job metadata, runtime environments, the arguments of the trainer."""
    seen = []

    def init(**given):
        seen.append(given)
        return SimpleNamespace(dashboard_url="127.0.0.1:8265")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "_quiet_console", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    with cluster.connected(config.load(recipe, ["cluster.dashboard=true"])):
        pass
    (given,) = seen
    assert given["dashboard_host"] == "127.0.0.1"
    assert not given.keys() & {"runtime_env", "job_config", "_metadata", "_system_config"}
    assert not seen_in(canaries, repr(given))

    # The trainer: everything that it is given, and what those objects hold.
    class Seen(Exception):
        pass

    def trainer(*arguments, **options):
        seen.append((arguments, options))
        raise Seen

    monkeypatch.setattr(pipeline.launch, "trainer_class", lambda starts_ray: trainer)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"object_store_memory": 1e12})
    loaded = config.load(recipe)
    prepared = pipeline.PreparedData(write_run(tmp_path / "other").parent / "prepared" / f"fake-{ORDER.num_rows}-16")
    loaded.run.dir = str(tmp_path / "run")
    run_dir = run_folder.run_dir(loaded)
    run_folder.create(run_dir)
    teachers = pipeline._teachers(loaded, prepared, 259)
    payload = pipeline._teacher_payload(loaded, run_dir, 259, teachers)
    with pytest.raises(Seen):
        pipeline._fit(
            loaded,
            run_dir,
            SimpleNamespace(check=None),
            submission.Job(),
            prepared,
            ORDER,
            str(tmp_path / "model"),
            payload,
        )
    arguments, options = seen[-1]
    text = "\n".join(
        [repr(arguments), repr(options), repr([vars(v) for v in options.values() if hasattr(v, "__dict__")])]
    )
    assert "TEACHER_KEY" in text, "the engine's options are in there"
    assert "train_loop_config" not in options, "the dashboard would show it"
    assert getattr(options["run_config"], "worker_runtime_env", None) in (None, {})
    assert not seen_in(canaries, text)


def test_k8s_objects_hold_references_and_no_credential(canaries):
    from tests.unit.k8s import manifests

    kubectl = manifests.tool("kubectl")
    for name in manifests.OVERLAYS:
        done = subprocess.run(
            [kubectl, "kustomize", str(manifests.K8S / "overlays" / name)], capture_output=True, text=True, timeout=120,
            check=True,
        )  # fmt: skip
        assert not seen_in(canaries, done.stdout)
        for document in yaml.safe_load_all(done.stdout):
            assert (document["kind"], document.get("data")) != ("Secret", None) or not document.get("stringData")
            assert not [
                (name, entry) for entry in _environment(document)
                if redact.is_secret_name(entry["name"]) and entry.get("value")
            ]  # fmt: skip


def _environment(node):
    """Every entry of every `env` list."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "env" and isinstance(value, list):
                yield from value
            yield from _environment(value)
    elif isinstance(node, list):
        for item in node:
            yield from _environment(item)


@pytest.mark.parametrize(
    "content",
    [
        {"uri": "postgresql+psycopg2://u:hunter22@h/db"}, {"paths": "/a/b,https://u:p@h/x"},
        {"url": "https://hf_abcdefgh@hub.example/x"}, {"url": "https://h/v1?key=AIzaSyABCDEF"},
        {"api_key": ["abc"]}, {"hf_token": {"value": "abc"}}, {"accessToken": "abc"},
        {"headers": [["X-Auth", "Bearer sk-0123456789"]]}, {"slack_token": "xoxb0123456789abcdef"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_a_credential(content):
    assert len(list(redact.credentials(content))) == 1


@pytest.mark.parametrize(
    "content",
    [
        {"user_token": "<|user|>"}, {"answer_token": "<a>"}, {"label_token": 5}, {"path": "/data/a:b@c.jsonl"},
        {"path": "s3://bucket/x:y@z"}, {"path": "abfs://container@account.net/x"}, {"path": "hf://datasets/a/b@main/x"},
        {"max_bytes_per_token": 4096}, {"sort_key": "a"}, {"path": "/data/training/a.jsonl"},
    ],
    ids=str,
)  # fmt: skip
def test_what_is_none(content, monkeypatch):
    monkeypatch.setenv("JUPYTER_TOKEN", "training")
    assert list(redact.credentials(content)) == []


@pytest.mark.parametrize(
    "line",
    [
        "in override 'teacher.max_bytes_per_token=abc': 'abc' is no integer", "388 bytes a token: 12 of them",
        "has no eos_token: set it in tokenizer_config.json", "the pre-training of mytraining",
    ],
)  # fmt: skip
def test_what_we_say_ourselves_stays_readable(line, monkeypatch):
    monkeypatch.setenv("JUPYTER_TOKEN", "training1")
    assert redact.redact(line) == line
