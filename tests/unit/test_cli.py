"""The command line: help that costs nothing, the printed config, exit codes, one line for every error."""

import ast
import logging
import re
import subprocess
import sys

import pytest
import yaml

from ray_kd import cli, config, plugins
from ray_kd.errors import DataError, RetryableError

JOBS = ["distill", "prepare_data", "evaluate", "export", "doctor", "report", "preflight", "plan"]
HEAVY = ("torch", "ray", "transformers", "deepspeed", "pyarrow", "numpy")
MINIMAL = """
run: {dir: runs/x}
data: {source: {kind: jsonl, paths: [train.jsonl]}, eval_fraction: 0.1}
teacher: {model: teacher}
student: {init: {layers: 2}}
loss: {divergence: {kind: jsd, beta: 0.3}}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return str(path)


def run(job, *arguments):
    """Exit code of a job, argparse's included."""
    try:
        return cli.main(job, list(arguments))
    except SystemExit as left:
        return left.code


@pytest.fixture(scope="module")
def help_text():
    """What `jobs/distill.py --help` prints, and the heavy packages it imported."""
    code = (
        "import sys; from ray_kd.cli import main\n"
        "try: main('distill', ['--help'])\n"
        f"finally: print('imported:', *sorted(set(sys.modules) & set({HEAVY})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    text, _, imported = done.stdout.rpartition("imported:")
    return text, imported.split()


def test_help_imports_nothing_heavy(help_text):
    assert help_text[1] == []


def test_help_lists_every_key_with_type_default_and_sentence(help_text):
    text, _ = help_text
    for key, field in config.describe():
        shown = re.search(rf"^  {re.escape(key)}: (.+) = (.+)\n      (.+)$", text, re.MULTILINE)
        assert shown, key
        assert (shown[1], shown[3]) == (field.annotation, field.sentence)


def test_help_shows_defaults_as_they_are_written_in_yaml(help_text, minimal):
    """`None` in particular: as an override it would be a text, so null is shown."""
    text, _ = help_text
    defaults = dict(re.findall(r"^  ([a-z_]+\.[a-z_.]+): .+ = (.+)$", text, re.MULTILINE))
    loaded = config.to_dict(config.load(minimal, ["loss.divergence=forward_kl", "student.lora.r=1"]))
    given = {"run.dir", "data.source", "data.eval_fraction", "teacher.model", "student.init", "student.init.layers",
             "student.lora", "student.lora.r", "loss.divergence"}  # fmt: skip
    for key, default in defaults.items():
        if key not in given:
            value = loaded
            for name in key.split("."):
                value = value[name]
            assert yaml.safe_load(default) == value or float(default) == value, key
    assert {key for key, default in defaults.items() if default == "required"} == {
        "run.dir", "data.source", "teacher.model", "student.init.layers", "student.lora.r",
    }  # fmt: skip


@pytest.mark.parametrize(("key", "group"), plugins.GROUPS.items())
def test_help_lists_every_kind_of_plug_in(help_text, key, group):
    text = help_text[0].split(f"kinds of {key}:\n")[1].split("\nkinds of ")[0]
    described = list(plugins.describe_kinds(group))
    assert described
    for kind, sentence, fields in described:
        assert f"  {kind}: {sentence}\n" in text + "\n"
        for field in fields:
            assert f"    {field.name}: {field.annotation} = " in text
            assert field.sentence in text
            if field.default not in (None, "MISSING") and not field.default.startswith("field("):
                ast.literal_eval(field.default)  # a value, not the name of a constant


@pytest.mark.parametrize("job", JOBS)
def test_every_job_has_help(job, capsys):
    assert run(job, "--help") == 0
    assert capsys.readouterr().out.startswith(f"usage: {job}")


def test_the_printed_config_loads_back_to_itself(minimal, tmp_path, capsys):
    overrides = ["train.max_steps=5", "teacher.pool.label_selector={zone: a}", "eval.prompts=['a: b', '']",
                 "data.license=null", "teacher.revision='1e3'"]  # fmt: skip
    assert run("distill", minimal, *overrides, "--print-config") == 0
    printed = capsys.readouterr().out
    (tmp_path / "printed.yaml").write_text(printed)
    assert config.load(tmp_path / "printed.yaml") == config.load(minimal, overrides)
    assert run("distill", str(tmp_path / "printed.yaml"), "--print-config") == 0
    assert capsys.readouterr().out == printed


def test_printing_the_config_writes_nothing(minimal, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("prepare_data", minimal, "--print-config") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["minimal.yaml"]
    assert "runs/x" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        ("CONFIG", "--print-config", "train.max_steps=7"),
        ("--print-config", "CONFIG", "train.max_steps=7"),
        ("CONFIG", "train.max_steps=7", "--print-config"),
        ("CONFIG", "train.epochs=2", "--print-config", "train.max_steps=7"),
    ],
    ids=" ".join,
)
def test_options_stand_anywhere(minimal, arguments, capsys):
    assert run("distill", *(minimal if argument == "CONFIG" else argument for argument in arguments)) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["max_steps"] == 7


@pytest.mark.parametrize(
    ("error", "exit_code", "line"),
    [
        (DataError("no\n  records"), 65, "error: no records"),
        (RetryableError("lost a node"), 75, "error: lost a node"),
        (KeyboardInterrupt(), 75, "error: interrupted; the same command goes on"),
        (ZeroDivisionError("by\nzero"), 70, "error: a bug, please report it: ZeroDivisionError: by zero"),
    ],
    ids=["data", "retryable", "interrupt", "bug"],
)
def test_an_error_is_one_line_and_a_documented_exit_code(error, exit_code, line, monkeypatch, capsys):
    def job(argv):
        raise error

    monkeypatch.setitem(cli.JOBS, "distill", job)
    assert run("distill") == exit_code
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == line
    assert len(lines) == 1 or exit_code == 70  # a bug without a log shows its traceback


def test_a_bug_leaves_its_traceback_in_the_log(monkeypatch, tmp_path, capsys, caplog):
    logger = logging.getLogger("ray_kd")
    monkeypatch.setattr(logger, "handlers", [cli._RunLog(tmp_path / "driver.log")])
    monkeypatch.setitem(cli.JOBS, "distill", lambda argv: 1 // 0)
    with caplog.at_level(logging.DEBUG, logger="ray_kd"):
        assert run("distill") == 70
    assert logger.handlers == []
    log = (tmp_path / "driver.log").read_text()
    assert "Traceback" in log
    assert "ZeroDivisionError" in log
    assert capsys.readouterr().err.count("\n") == 1


def test_the_package_runs_a_job_by_name(minimal, capsys):
    assert cli.dispatch(["distill", minimal, "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["run"]["seed"] == 0
    assert cli.dispatch(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(job in usage for job in JOBS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "a job is missing"), (["distil"], "unknown job 'distil'; did you mean 'distill'?"), (["x"], "unknown job")],
    ids=["none", "misspelt", "unknown"],
)
def test_the_package_names_its_jobs(arguments, says, capsys):
    assert cli.dispatch(arguments) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")
    assert f"python -m ray_kd {{{' | '.join(cli.JOBS)}}}" in line
    assert set(JOBS) <= set(cli.JOBS)


def test_python_m_ray_kd_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "ray_kd"], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 64
    assert done.stderr.startswith("error: a job is missing: python -m ray_kd {distill")
    assert done.stderr.count("\n") == 1


def test_a_signal_in_the_middle_of_an_import_is_no_bug(monkeypatch, capsys):
    """transformers makes a ModuleNotFoundError of whatever comes up while it imports a model."""

    def job(argv):
        try:
            raise RetryableError("stopped by SIGINT; the same command goes on")
        except RetryableError as error:
            raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from error

    monkeypatch.setitem(cli.JOBS, "distill", job)
    assert cli.main("distill", []) == 75
    assert capsys.readouterr().err == "error: stopped by SIGINT; the same command goes on\n"
