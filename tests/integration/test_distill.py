"""The distill job from records to a model folder, on a real Ray, with tiny models."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData
from ray_kd.schema import INPUT_IDS, LABELS, POSITION_IDS, target_positions
from ray_kd.teacher.engine import Request
from ray_kd.teacher.engines.hf import Config, Engine
from tests.tiny import tiny_llama

pytestmark = pytest.mark.ray

METRIC_KEYS = {
    "step", "epoch", "train/loss", "train/kd_loss", "train/ce_loss", "train/grad_norm", "train/learning_rate",
    "train/tokens_per_second", "train/data_wait_s", "teacher/tokens_per_second", "teacher/topk_mass",
    "teacher/bytes_per_token", "data/slot_start", "data/row_ids_sha256",
}  # fmt: skip
SUMMARY_KEYS = {
    "rows_prepared", "rows_consumed", "rows_missing", "rows_duplicated", "teacher_rows_computed",
    "teacher_rows_from_cache", "steps", "epochs", "tokens", "wall_s", "tokens_per_second", "teacher_wait_fraction",
    "restarts", "exit_code", "eval",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(jobs):
    """A run of one worker over two epochs, evaluated at step 3, with CE beside the distillation loss."""
    return jobs.distill(
        "finished", "train.max_steps=null", "train.epochs=2", "train.eval_every=3",
        "loss.terms=[{kind: kd, weight: 2.0}, {kind: ce, weight: 0.5}]", "eval.prompts=[hello]",
    )  # fmt: skip


def prepared_of(job):
    fingerprint = json.loads((job.run_dir / "run.json").read_text())["content"]["prepared data"]
    return PreparedData(job.run_dir.parent / "prepared" / fingerprint[:16])


def test_the_run_ends_well_and_says_so(finished):
    assert finished.exit_code == 0, finished.stderr
    assert "held-out" in finished.stdout
    assert "prompt:  hello" in finished.stdout
    assert "Traceback" not in finished.stdout + finished.stderr


def test_every_row_once_an_epoch(finished):
    summary = finished.summary
    assert summary.keys() >= SUMMARY_KEYS
    assert summary["rows_consumed"] == 2 * summary["rows_prepared"]
    assert (summary["rows_missing"], summary["rows_duplicated"], summary["rows_quarantined"]) == (0, 0, 0)
    assert summary["teacher_rows_computed"] == summary["rows_consumed"]
    assert (summary["restarts"], summary["exit_code"], summary["epochs"]) == (0, 0, 2.0)


def test_the_metrics_prove_what_was_trained(finished, jobs):
    """An independent check: the digests of each step's rows follow from the seed alone."""
    summary, metrics = finished.summary, finished.metrics
    assert [line["step"] for line in metrics] == list(range(1, summary["steps"] + 1))
    order = SlotOrder(summary["rows_prepared"], 4, 2, None, seed=0)
    for line in metrics:
        assert line.keys() >= METRIC_KEYS
        rows = order.rows(line["data/slot_start"], line["data/slot_start"] + 4)
        assert line["data/row_ids_sha256"] == hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
        assert line["train/loss"] == pytest.approx(2.0 * line["train/kd_loss"] + 0.5 * line["train/ce_loss"], rel=1e-5)


def test_evaluation_before_at_intervals_and_after(finished):
    evaluation = finished.summary["eval"]
    assert evaluation["after"]["kl"] < evaluation["before"]["kl"]
    assert {"kl", "perplexity", "bits_per_byte", "top1_agreement"} <= evaluation["before"].keys()
    evaluated = [line["step"] for line in finished.metrics if "eval/kl" in line]
    last = finished.summary["steps"]
    assert evaluated == [*range(3, last, 3), last]


def test_final_loads_and_generates(finished):
    final = finished.run_dir / "final"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(final), AutoTokenizer.from_pretrained(final)
    ids = tokenizer("hello", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=4, do_sample=False).shape[1] > ids.shape[1]
    card = (final / "README.md").read_text()
    assert "teacher" in card
    assert "- kind: ce\n    weight: 0.5" in card


def test_the_evaluate_job_agrees_with_the_trainer(finished, jobs):
    job = jobs.run("evaluate", str(finished.run_dir), "--json")
    assert job.exit_code == 0, job.stderr
    measured, trained = json.loads(job.stdout), finished.summary["eval"]["after"]
    for name in ("kl", "perplexity", "bits_per_byte", "top1_agreement"):
        assert measured[name] == pytest.approx(trained[name], rel=1e-4), name


def test_the_evaluate_job_reports_before_and_after(finished, jobs, tmp_path):
    job = jobs.run("evaluate", str(finished.run_dir), "--report", str(tmp_path), "--prompt", "hello")
    assert job.exit_code == 0, job.stderr
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["before"] == finished.summary["eval"]["before"]
    (sample,) = json.loads((finished.run_dir / "samples.json").read_text())["samples"]
    (said,) = document["generations"]
    assert said["answers"].keys() == {"teacher", "student before", "student after"}
    for when in ("before", "after"):
        assert said["answers"][f"student {when}"] == sample[when]
    assert sum(bucket["num_tokens"] for bucket in document["by_position"]) == document["num_tokens"]
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_the_export_job_writes_the_same_student(finished, jobs, tmp_path):
    out = tmp_path / "student"
    job = jobs.run("export", str(finished.run_dir), str(out))
    assert job.exit_code == 0, job.stderr
    ours = AutoModelForCausalLM.from_pretrained(out).state_dict()
    final = AutoModelForCausalLM.from_pretrained(finished.run_dir / "final").state_dict()
    assert all(torch.equal(ours[name], final[name]) for name in final)


def test_the_same_command_on_a_finished_run_ends_at_once(finished, jobs):
    before = (finished.run_dir / "metrics.jsonl").read_bytes()
    again = jobs.distill(
        "finished", "train.max_steps=null", "train.epochs=2", "train.eval_every=3",
        "loss.terms=[{kind: kd, weight: 2.0}, {kind: ce, weight: 0.5}]", "eval.prompts=[hello]",
    )  # fmt: skip
    assert again.exit_code == 0
    assert "finished already" in again.stdout
    assert (finished.run_dir / "metrics.jsonl").read_bytes() == before


@pytest.mark.extended
def test_the_same_model_as_teacher_and_student(jobs):
    """K = V: the first loss is zero up to the wire's fp16, and the payload's first id is the teacher's argmax."""
    job = jobs.distill("same", f"student.model={jobs.teacher}", "teacher.top_k=259", "train.max_steps=1")
    assert job.exit_code == 0, job.stderr
    assert job.stdout.count("teacher and student are the same model") == 1
    assert job.metrics[0]["train/kd_loss"] < 1e-5
    assert job.metrics[0]["train/top1_agreement"] == 1.0
    assert job.summary["eval"]["before"]["kl"] < 1e-6
    assert job.summary["eval"]["before"]["top1_agreement"] == 1.0


def test_payloads_line_up_with_a_plain_forward(finished, jobs):
    """The alignment self-test on prepared rows: each document alone through the whole model, argmax compared."""
    prepared = prepared_of(finished)
    rows = prepared.read_eval(4)
    engine = Engine(Config(), model=str(jobs.teacher))
    answers = engine.annotate(rows, Request(top_k=4, temperature=1.0))
    model = AutoModelForCausalLM.from_pretrained(jobs.teacher)
    for row, answer in enumerate(answers):
        expected = []
        targets = target_positions(rows[LABELS][row], rows[POSITION_IDS][row])
        starts = [*np.flatnonzero(rows[POSITION_IDS][row] == 0), len(targets)]
        for start, stop in itertools.pairwise(starts):
            with torch.no_grad():
                logits = model(torch.from_numpy(rows[INPUT_IDS][row][None, start:stop].astype(np.int64))).logits[0]
            expected.extend(logits.argmax(dim=-1)[torch.from_numpy(targets[start:stop])].tolist())
        assert answer.ids[:, 0].tolist() == expected


def test_a_student_made_of_the_teachers_layers(jobs):
    job = jobs.distill(
        "init", "student.model=null", "student.init.layers=2", "train.max_steps=2", "student.dtype=bfloat16",
        "student.gradient_checkpointing=true", "loss.divergence.kind=jsd", "loss.temperature=2.0",
    )  # fmt: skip
    assert job.exit_code == 0, job.stderr
    assert "student: the teacher's layers [" in job.stdout
    final = AutoModelForCausalLM.from_pretrained(job.run_dir / "final")
    assert final.config.num_hidden_layers == 2
    assert final.dtype == torch.bfloat16


def test_a_student_narrower_than_its_teacher(jobs):
    job = jobs.distill(
        "narrow", "student.model=null", "train.max_steps=2",
        "student.init={layers: 2, intermediate_size: 48, num_attention_heads: 2, hidden_size: 32}",
    )  # fmt: skip
    assert job.exit_code == 0, job.stderr
    assert ", hidden_size 32, intermediate_size 48, num_attention_heads 2 (" in job.stdout
    final = AutoModelForCausalLM.from_pretrained(job.run_dir / "final").config
    assert (final.num_hidden_layers, final.intermediate_size, final.hidden_size, final.head_dim) == (2, 48, 32, 16)


@pytest.mark.parametrize("payload", ["topk_logprobs", "hidden_states"])
def test_heads_with_padding_of_different_sizes(jobs, payload):
    """A teacher of 300 rows and a student of 280 for 259 tokens: the run is that of the tokens alone."""
    teacher = tiny_llama(jobs.folder / "padded-teacher", layers=2, vocab=300, seed=3)
    student = tiny_llama(jobs.folder / "padded-student", layers=1, vocab=280, seed=4)
    job = jobs.distill(
        f"padded-{payload}", f"teacher.model={teacher}", f"student.model={student}", "teacher.vocabulary=shared",
        f"teacher.payload={payload}", "train.max_steps=3", "teacher.cache.mode=write_through",
        f"teacher.cache.path={jobs.folder}/cache-{payload}",
    )  # fmt: skip
    assert job.exit_code == 0, job.stderr
    before, after = (job.summary["eval"][when]["kl"] for when in ("before", "after"))
    assert 0 < after < before
    assert AutoModelForCausalLM.from_pretrained(job.run_dir / "final").config.vocab_size == 280


@pytest.mark.extended
def test_a_refused_teacher_answer_is_weight_zero_with_its_reason(jobs):
    """The fake engine breaks two rows: they are quarantined once, the others are trained, slots do not shift."""
    engine = "teacher.engine={kind: fake, vocab_size: 259, nan_row_ids: [0, 3]}"
    job = jobs.distill("refused", engine, "train.max_steps=null", "train.epochs=1")
    assert job.exit_code == 0, job.stderr
    summary = job.summary
    assert summary["rows_quarantined"] == 2
    assert summary["rows_missing"] == 0
    assert summary["rows_consumed"] == summary["rows_prepared"] - 2
    records = [json.loads(line) for line in (job.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert sorted(record["row_id"] for record in records) == [0, 3]
    assert all(record["reason"] for record in records)
    assert "topk_bucket_kl" in summary["eval"]["after"]
    assert "kl" not in summary["eval"]["after"]


@pytest.mark.extended
def test_hidden_states_train_like_every_log_probability(jobs):
    """The same curve over the wire of hidden states (ZeRO 3) and of K = V log-probabilities (ZeRO 0), which round each
    in its own way."""
    # bfloat16: what the teacher computed arrives as it was.
    options = ("teacher.dtype=bfloat16", "loss.divergence=reverse_kl", "loss.temperature=2.0",
               "loss.terms=[kd, {kind: ce, weight: 0.3}]")  # fmt: skip
    dense = jobs.distill("dense", *options, "teacher.payload=hidden_states", "train.zero_stage=3")
    topk = jobs.distill("topk", *options, "teacher.top_k=259")
    for job in (dense, topk):
        assert job.exit_code == 0, job.stderr
    assert "the teacher's head of 259 x 64 is saved" in dense.stdout + dense.stderr
    assert sorted(path.name for path in (dense.run_dir / "teacher_head").iterdir()) == ["head.json", "head.safetensors"]
    assert [line["data/row_ids_sha256"] for line in dense.metrics] == [
        line["data/row_ids_sha256"] for line in topk.metrics
    ]
    for exact, sent in zip(dense.metrics, topk.metrics, strict=True):
        assert exact["teacher/topk_mass"] == pytest.approx(1.0)
        assert exact["teacher/bytes_per_token"] < sent["teacher/bytes_per_token"] / 4
        for name in ("train/kd_loss", "train/ce_loss", "train/grad_norm", "train/top1_agreement"):
            assert exact[name] == pytest.approx(sent[name], rel=2e-3, abs=1e-6), name
    assert dense.summary["eval"]["after"]["kl"] == pytest.approx(topk.summary["eval"]["after"]["kl"], rel=2e-3)
