"""Steps that are not finite: skipped and noted; too many in a row end the run, which can go on from what was good.

The student's embedding of `~` is NaN: a row with a `~` makes its step a bad one, and no other row does.
"""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_kd import checkpoint
from tests.tiny import tiny_llama

pytestmark = pytest.mark.ray

MARKED = (5, 17, 23, 31, 44, 52)  # records with a `~`
BAD = [2, 3, 4]  # steps that come by one of them, of five


@pytest.fixture(scope="module")
def settings(jobs):
    folder = tiny_llama(jobs.folder / "nan-student", layers=2, seed=2, tie=False)  # tied, no logit would be finite
    student, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    [token] = tokenizer.encode("~", add_special_tokens=False)
    with torch.no_grad():
        student.get_input_embeddings().weight[token] = torch.nan
    student.save_pretrained(folder)
    records = [json.loads(line) for line in jobs.data.read_text().splitlines()]
    for index in MARKED:
        records[index]["messages"][1]["content"] += "~"
    data = jobs.folder / "marked.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    return (
        f"student.model={folder}", f"data.source.paths=[{data}]", "data.eval_fraction=0", "run.seed=2",
        "train.max_steps=5", "train.num_workers=2", "train.zero_stage=2", "train.checkpoint_every=2",
    )  # fmt: skip


@pytest.fixture(scope="module")
def skipped(jobs, settings):
    """A run that may skip as many steps as there are."""
    return jobs.distill("skipped", *settings, "train.max_bad_steps=3")


def quarantined(job):
    return [json.loads(line) for line in (job.run_dir / "quarantine.jsonl").read_text().splitlines()]


def weights(job):
    return AutoModelForCausalLM.from_pretrained(job.run_dir / "final").state_dict()


def test_bad_steps_are_skipped_counted_and_noted(skipped):
    assert skipped.exit_code == 0, skipped.stderr
    assert "5 steps (3 bad, skipped)" in skipped.stdout
    summary = skipped.summary
    assert (summary["steps"], summary["bad_steps"], summary["steps_skipped"]) == (5, 3, 3)
    assert (summary["rows_consumed"], summary["rows_missing"], summary["restarts"]) == (20, 0, 0)
    for line in skipped.metrics:
        is_bad = line["step"] in BAD
        assert line["train/is_applied"] is not is_bad
        assert (line["train/loss"] is None) == (line["train/grad_norm"] is None) == is_bad
    records = quarantined(skipped)
    assert [(record["source"], record["step"], record["slot"]) for record in records] == [
        ("step", slot // 4 + 1, slot) for slot in range(4, 16)
    ]
    assert len({record["row_id"] for record in records}) == 12
    assert {record["reason"] for record in records} == {"the loss of its step is not finite"}
    assert sum(int(value.isnan().sum()) for value in weights(skipped).values()) == 64  # the one embedding, as it was


@pytest.mark.extended
def test_too_many_in_a_row_end_the_run_which_goes_on_from_its_good_checkpoint(jobs, settings, skipped):
    """The checkpoint of step 2 lies among the bad ones: the same command again goes on counting from it."""
    last = [record["row_id"] for record in quarantined(skipped) if record["step"] == 4]
    for _ in range(2):
        stopped = jobs.distill("stopped", *settings, "train.max_bad_steps=2")
        assert stopped.exit_code == stopped.summary["exit_code"] == 64
        [error] = stopped.stderr.strip().splitlines()
        assert "more than train.max_bad_steps=2 steps in a row: 2, 3, 4 (the last: loss nan, gradient norm " in error
        assert f"rows {', '.join(map(str, last))}); the checkpoint of step 2 is good" in error
        document = checkpoint.read_state(checkpoint.newest_verified(stopped.run_dir / "checkpoints"))
        assert (document["step"], document["state"]["ledger"]["bad_in_a_row"]) == (2, [2])

    resumed = jobs.distill("stopped", *settings, "train.max_bad_steps=3")
    assert resumed.exit_code == 0, resumed.stderr
    assert quarantined(resumed) == quarantined(skipped)
    kept = ("step", "train/loss", "train/grad_norm", "train/learning_rate", "data/row_ids_sha256")
    lines = [[[line[key] for key in kept] for line in job.metrics] for job in (resumed, skipped)]
    assert lines[0] == lines[1]
    assert resumed.summary["bad_steps"] == 3
    ours, expected = weights(resumed), weights(skipped)
    assert all(torch.allclose(ours[name], expected[name], rtol=0, atol=0, equal_nan=True) for name in expected)
