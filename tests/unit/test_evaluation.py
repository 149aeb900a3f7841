"""The evaluate job on the run folder of a small run: one document, its report, and what is refused before a model."""

import importlib.util
import json
import logging
import shutil

import pytest

from ray_kd import checkpoint, cli, evaluation, evaluation_report, models, plot, results
from ray_kd.eval import harness, open_harness
from tests.fake_prepared import write_prepared
from tests.fake_run import ORDER, write_run
from tests.tiny import tiny_llama

PLOTS = [evaluation_report.POSITION, evaluation_report.ENTROPY, evaluation_report.CALIBRATION, evaluation_report.MASS]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A finished run with held-out rows and its teacher; its final/ differs from the student it began with."""
    home = tmp_path_factory.mktemp("evaluation")
    folder = write_run(home)
    tiny_llama(home / "teacher", layers=2, seed=5)
    shutil.rmtree(folder / "final")
    tiny_llama(folder / "final", hidden=32, seed=6)
    prepared = home / "prepared" / f"fake-{ORDER.num_rows}-16"
    shutil.rmtree(prepared)
    write_prepared(prepared, ORDER.num_rows, eval_rows=6)
    config = (folder / "config.yaml").read_text()
    assert "eval_fraction: 0.0" in config
    (folder / "config.yaml").write_text(config.replace("eval_fraction: 0.0", "eval_fraction: 0.3"))
    return folder


def run(*arguments) -> int:
    try:
        return cli.main("evaluate", list(map(str, arguments)))
    except SystemExit as left:
        return left.code


def printed(capsys) -> dict:
    return json.loads(capsys.readouterr().out)


def test_one_document_is_printed_and_reported(run_dir, tmp_path, capsys):
    out = tmp_path / "deep" / "report"
    assert run(run_dir, "--json", "--report", out, "--prompt", "Hi", "--prompt", "Oh\nno", "--max-new-tokens", 5) == 0
    document = printed(capsys)
    assert json.loads((out / "report.json").read_text()) == document
    metrics = results.evaluate(cli._config_of_run(run_dir))
    assert metrics.keys() == {
        "kl", "perplexity", "bits_per_byte", "top1_agreement", "num_tokens", "num_rows",
        "by_position", "by_teacher_entropy", "calibration", "teacher_mass_by_rank",
    }  # fmt: skip
    assert {name: document[name] for name in metrics} == metrics
    assert document["model"] == str(run_dir / "final")
    assert document["before"] is None  # of other rows

    first = checkpoint.read_state(checkpoint.newest_verified(run_dir / "checkpoints"))["state"]["student_path"]
    spoken = {"teacher": run_dir.parent / "teacher", "student before": first, "student after": run_dir / "final"}
    for place, prompt in enumerate(["Hi", "Oh\nno"]):
        entry = document["generations"][place]
        assert entry["prompt"] == prompt
        for name, path in spoken.items():
            assert entry["answers"][name] == results.answers(str(path), None, [prompt], 5)[0], name
    assert len(set(document["generations"][0]["answers"].values())) > 1

    text = (out / "report.md").read_text()
    assert f"| KL(teacher ∥ student), nats a token | {document['kl']:.3f} |" in " ".join(text.split())
    assert "student before:" in text
    for name in PLOTS:
        assert f"]({name}.png)" in text
        content = (out / f"{name}.png").read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 5000


def test_the_metrics_before_training_stand_beside_those_of_the_same_rows(run_dir, capsys):
    measured = results.evaluate(cli._config_of_run(run_dir))
    path = run_dir / "eval_before.json"
    kept = path.read_text()
    path.write_text(
        json.dumps({name: value for name, value in measured.items() if isinstance(value, float)} | {"kl": 9.5})
    )
    try:
        assert run(run_dir) == 0
        text = capsys.readouterr().out
        assert run(run_dir, "--max-rows", 2, "--json") == 0
        assert printed(capsys)["before"] is None
    finally:
        path.write_text(kept)
    assert "before training" in text
    assert "9.500" in text
    assert "![" not in text
    assert "KL(teacher ∥ student)" in text
    assert "Expected calibration error" in text


def test_a_teacher_on_a_server_has_no_answer(run_dir, monkeypatch):
    config = cli._config_of_run(run_dir)
    config.teacher.engine = {"kind": "http", "url": "http://127.0.0.1:1"}
    speakers = evaluation._speakers(config, None)
    assert speakers["teacher"] is None
    entry = {"prompt": "Hi", "answers": {"teacher": None, "student after": ""}}
    assert evaluation_report._answers(entry) == (
        "prompt:\n\n    Hi\n\nteacher:\n\n    (its weights are on a server)\n\nstudent after:\n\n    (ends at once)"
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--max-new-tokens", "5"], "argument --max-new-tokens: has no effect without --prompt"),
        (["--max-new-tokens", "0", "--prompt", "Hi"], "argument --max-new-tokens: '0' is not a whole number of 1"),
        (["--prompt", " "], "argument --prompt: '' is no text"),
        (["--lm-eval-limit", "5"], "argument --lm-eval-limit: has no effect without --lm-eval"),
        (["--lm-eval", "a,"], "argument --lm-eval: 'a,' is no list of names"),
        (["--lm-eval", "a", "--lm-eval-dir", "{t}/none"], "argument --lm-eval-dir: '{t}/none' is no folder"),
        (["--max-rows", "-1"], "argument --max-rows: '-1' is not a whole number of 0 or more"),
        (["--report", "{t}/file/report"], "--report '{t}/file/report' cannot be written"),
        (["--model", "{t}/none"], "'{t}/none' does not exist"),
        (["--model", "{t}/none", "--prompt", "Hi"], "'{t}/none' does not exist"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_model_loads(run_dir, tmp_path, monkeypatch, capsys, arguments, says):
    monkeypatch.setattr(models, "load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "file").write_text("")
    assert run(run_dir, *(argument.format(t=tmp_path) for argument in arguments)) == 64
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says.format(t=tmp_path)}") or says.format(t=tmp_path) in line


def test_a_missing_extra_is_named_with_how_to_install_it(run_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(models, "load_causal_lm", lambda *_, **__: pytest.fail("a model was loaded"))
    monkeypatch.setattr(plot, "is_possible", lambda: False)
    assert run(run_dir, "--report", tmp_path / "report") == 64
    assert "pip install '.[bench]'" in capsys.readouterr().err
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert run(run_dir, "--lm-eval", "arc_easy") == 64
    assert capsys.readouterr().err == ("error: --lm-eval needs lm-evaluation-harness: pip install '.[lm-eval]'\n")


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
def test_a_task_of_ones_own_is_run_by_the_harness(run_dir, tmp_path, monkeypatch, capsys):
    """Each document's answer is what the model finds more likely of two choices, or never so."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(logging.getLogger("lm_eval"), "level", logging.ERROR)
    documents = [{"question": f"{a} and {a}?", "choices": [str(2 * a), "never said before"]} for a in range(6)]
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "tiny_sums", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "documents.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_choice": "{{choices}}", "doc_to_target": 0,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }  # fmt: skip
    (tmp_path / "tasks" / "sums.yaml").write_text(json.dumps(task))
    arguments = (run_dir, "--lm-eval", "tiny_sums", "--lm-eval-dir", tmp_path / "tasks", "--lm-eval-limit", 4)
    assert run(*arguments, "--json", "--report", tmp_path / "report") == 0
    (entry,) = printed(capsys)["lm_eval"]
    # The wrong answer is eight times as long: its likelihood is smaller whatever the model.
    assert (entry["task"], entry["metric"], entry["value"], entry["num_documents"]) == ("tiny_sums", "acc", 1.0, 4)
    assert "| tiny_sums |    acc | 1.0000 |" in (tmp_path / "report" / "report.md").read_text()
    with pytest.raises(Exception, match="unknown task 'tiny_sum'; did you mean 'tiny_sums'") as refused:
        open_harness(["tiny_sum"], tmp_path / "tasks", None)
    assert refused.type.__name__ == "ConfigError"
