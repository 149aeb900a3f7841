"""Students of which a part trains, through the jobs on a real Ray: killed, resumed, exported and evaluated."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.ray

IDS = torch.arange(10, 26).view(2, 8)
LORA = (
    "student.lora={r: 4, alpha: 8, dropout: 0.1}", "train.epochs=2", "train.max_steps=12", "train.checkpoint_every=2",
)  # fmt: skip
BITWISE = ("train/loss", "train/grad_norm", "data/row_ids_sha256")


@pytest.fixture(scope="module")
def whole(jobs):
    """A run with adapters that nobody disturbed."""
    job = jobs.distill("lora", *LORA)
    assert job.exit_code == 0, job.stderr
    return job


def newest_checkpoint(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoints").glob("step_*"))[-1]


def saved_keys(folder: Path) -> set[str]:
    files = [file for file in folder.glob("rank*.safetensors") if not file.name.endswith(".rng.safetensors")]
    return {key for file in files for key in load_file(file)}


def test_adapters_learn_and_alone_are_saved(whole, jobs):
    evaluation = whole.summary["eval"]
    assert evaluation["after"]["kl"] < evaluation["before"]["kl"]
    assert "parameters train" in whole.stdout
    keys = saved_keys(newest_checkpoint(whole.run_dir))
    assert keys
    assert {key for key in keys if ".lora_" not in key} == set()


def test_final_is_the_base_with_its_adapter(whole, jobs):
    final, info = AutoModelForCausalLM.from_pretrained(whole.run_dir / "final", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    base = AutoModelForCausalLM.from_pretrained(jobs.student)
    before = base(input_ids=IDS).logits
    adapted = PeftModel.from_pretrained(base, whole.run_dir / "final" / "adapter")
    torch.testing.assert_close(adapted(input_ids=IDS).logits, final(input_ids=IDS).logits, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, final(input_ids=IDS).logits, rtol=1e-3, atol=1e-3)


def test_the_evaluate_job_agrees_with_the_adapters_in_training(whole, jobs):
    job = jobs.run("evaluate", str(whole.run_dir), "--json")
    assert job.exit_code == 0, job.stderr
    measured, trained = json.loads(job.stdout), whole.summary["eval"]["after"]
    for name in ("kl", "perplexity", "bits_per_byte", "top1_agreement"):
        assert measured[name] == pytest.approx(trained[name], rel=1e-4), name


def test_the_export_job_writes_both_of_an_earlier_step(whole, jobs, tmp_path):
    out = tmp_path / "earlier"
    job = jobs.run("export", str(whole.run_dir), str(out), "--step", "10")
    assert job.exit_code == 0, job.stderr
    adapter = load_file(out / "adapter" / "adapter_model.safetensors")
    last = load_file(whole.run_dir / "final" / "adapter" / "adapter_model.safetensors")
    assert adapter.keys() == last.keys()
    assert any(not torch.equal(adapter[name], last[name]) for name in last)


def test_killed_and_started_again_it_is_the_same_run(whole, jobs):
    """Dropout of the adapters included: bitwise, on the same topology."""
    process = jobs.start("lora-killed", *LORA)
    jobs.wait_for_step("lora-killed", 3, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    again = jobs.distill("lora-killed", *LORA)
    assert again.exit_code == 0, again.stderr
    assert again.summary["restarts"] >= 1
    for ours, theirs in zip(again.metrics, whole.metrics, strict=True):
        assert {name: ours[name] for name in BITWISE} == {name: theirs[name] for name in BITWISE}
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        ours, theirs = (load_file(job.run_dir / "final" / file) for job in (again, whole))
        assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def test_other_adapters_are_another_run(whole, jobs):
    job = jobs.distill("lora", *LORA, "student.lora.r=8")
    assert job.exit_code == 64
    assert "its student.lora is" in job.stderr


def test_dora_in_bfloat16_on_layers_of_the_teacher(jobs):
    """With checkpointed activations, at stage 3 on two ranks."""
    job = jobs.distill(
        "dora", "student.model=null", "student.init.layers=2", "student.lora={r: 2, use_dora: true}",
        "student.lora.target_modules=[q_proj, up_proj]", "student.dtype=bfloat16",
        "student.gradient_checkpointing=true", "train.num_workers=2", "train.zero_stage=3", "train.max_steps=3",
    )  # fmt: skip
    assert job.exit_code == 0, job.stderr
    assert all("train/loss" in line and line["train/is_applied"] for line in job.metrics)
    final = AutoModelForCausalLM.from_pretrained(job.run_dir / "final")
    assert final.dtype == torch.bfloat16
    adapter = load_file(job.run_dir / "final" / "adapter" / "adapter_model.safetensors")
    assert any(name.endswith("lora_magnitude_vector") for name in adapter)


def test_frozen_parts_stay_as_they_were(jobs):
    options = ("student.freeze=[embeddings, head, layers.0]", "train.max_steps=3")
    job = jobs.distill("frozen", *options)
    assert job.exit_code == 0, job.stderr
    base, final = (load_file(folder / "model.safetensors") for folder in (jobs.student, job.run_dir / "final"))
    is_frozen = {name: name.startswith(("model.embed_tokens", "model.layers.0.")) for name in base}
    assert {name: torch.equal(final[name], base[name]) for name in base} == is_frozen
    held = {key.split("|")[0].removeprefix("student.") for key in saved_keys(newest_checkpoint(job.run_dir))}
    assert held == {name for name, frozen in is_frozen.items() if not frozen}
