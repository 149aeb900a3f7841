"""With --load: a row through each teacher and the student."""

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from ray_kd.preflight import FAILED, OK, SKIPPED
from tests.preflight_case import files_below, of
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    "overrides",
    [(), ("student.model=null", "student.init.layers=2", "teacher.dtype=bfloat16", "loss.tail=renormalize",
          "loss.terms=[{kind: kd}, {kind: ce, weight: 0.5}]")],
)  # fmt: skip
def test_a_row_goes_through_both_models(look, tmp_path, overrides):
    teacher, student = of(look(*overrides, loads=True), "forward")
    assert (teacher.state, student.state) == (OK, OK)
    assert "it names the likeliest token of a plain forward" in teacher.seen
    assert "tokens/s" in student.seen
    assert files_below(tmp_path) == []


def test_what_loaded_models_get_wrong_is_seen(look, monkeypatch):
    from ray_kd.teacher.engines.hf import Engine
    from ray_kd.trainer import step

    true_annotate, true_forward = Engine.annotate, step.DistillModule.forward

    def annotate(self, rows, request):
        return true_annotate(self, {**rows, "input_ids": np.roll(rows["input_ids"], 1)}, request)

    monkeypatch.setattr(Engine, "annotate", annotate)
    monkeypatch.setattr(step.DistillModule, "forward", lambda *given: true_forward(*given) * float("nan"))
    teacher, student = of(look(loads=True), "forward")
    assert (teacher.state, teacher.exit_code) == (FAILED, 70)
    assert (student.state, student.exit_code) == (FAILED, 64)
    assert "loss nan" in student.seen


@pytest.mark.parametrize(
    ("override", "trained"),
    [("student.lora.r=2", {"lora"}), ("student.freeze=[layers.0, embeddings, head]", {"layers.1", "norm"})],
)
def test_of_the_student_what_is_configured_trains(look, monkeypatch, override, trained):
    from ray_kd.trainer import step

    true, seen = step.DistillModule.forward, []

    def forward(self, *given):
        names = [name for name, parameter in self.student.named_parameters() if parameter.requires_grad]
        is_checkpointing = any(getattr(part, "gradient_checkpointing", False) for part in self.student.modules())
        seen.append((names, is_checkpointing))
        return true(self, *given)

    monkeypatch.setattr(step.DistillModule, "forward", forward)
    report = look(override, "student.gradient_checkpointing=true", loads=True)
    assert [finding.state for finding in of(report, "forward")] == [OK, OK]
    names, is_checkpointing = seen[0]
    assert names
    assert all(any(part in name for part in trained) for name in names)
    assert is_checkpointing


def test_each_of_several_teachers_is_tried(look, settings, home, tmp_path):
    tiny_llama(tmp_path / "other", layers=2, seed=3)
    settings[:] = [line for line in settings if not line.startswith("teacher.model")]
    teachers = f"teachers=[{{model: {home}/teacher, name: a}}, {{model: {tmp_path}/other, name: b}}]"
    *answers, student = of(look(teachers, loads=True), "forward")
    assert [finding.seen.split(":")[0] for finding in answers] == ["teacher 'a'", "teacher 'b'"]
    assert {finding.state for finding in (*answers, student)} == {OK}
    assert student.seen.startswith("student: loss")

    path = tmp_path / "other" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] *= float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    first, second, student = of(look(teachers, loads=True), "forward")
    assert [first.state, second.state, student.state] == [OK, FAILED, SKIPPED]
    assert second.seen.startswith("teacher 'b': ")
