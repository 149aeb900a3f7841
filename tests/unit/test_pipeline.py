"""How large a block of the stream is; a student made of the teacher's layers; a store that holds them both."""

import uuid

import pytest
import torch

from ray_kd import config, models, storage
from ray_kd.errors import ConfigError
from ray_kd.pipeline import _block_rows, _make_head, _make_student, stream_sizes
from tests.fake_prepared import write_prepared
from tests.tiny import tiny_llama


@pytest.mark.parametrize(
    ("rows_per_rank", "micro_batch_size", "max_rows", "expected"),
    [
        (8, 1, 100, 8),
        (8, 2, 100, 8),
        (8, 2, 7, 4),
        (12, 2, 8, 6),
        (12, 3, 5, 3),
        (8, 4, 1, 4),  # never less than a micro-batch
        (1, 1, 0, 1),
    ],
)
def test_a_block_divides_the_ranks_share_and_fits(rows_per_rank, micro_batch_size, max_rows, expected):
    rows = _block_rows(rows_per_rank, micro_batch_size, max_rows)
    assert rows == expected
    assert rows_per_rank % rows == 0
    assert rows % micro_batch_size == 0


@pytest.mark.parametrize(
    ("workers", "micro_batch_size", "expected"), [("4", 1, 6), ("[1,4]", 1, 2), ("[2,4]", 2, 2), ("[3,4]", 1, 2)]
)  # fmt: skip
def test_a_block_divides_the_share_of_any_number_of_workers(workers, micro_batch_size, expected):
    loaded = config.load(None, [
        "run.dir=run", "data.source={kind: jsonl, paths: [x]}", "teacher.model=t", "student.model=s",
        f"train.num_workers={workers}", f"train.micro_batch_size={micro_batch_size}", "train.global_batch_size=24",
        "teacher.run_ahead_rows=1000",
    ])  # fmt: skip
    block_rows, _ = stream_sizes(loaded, 10, 100)
    assert block_rows == expected
    least, most = config.worker_range(loaded.train)
    assert all(24 // number % block_rows == 0 for number in range(least, most + 1))


def test_a_student_made_of_layers_may_lie_in_an_object_store(object_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    teacher = tiny_llama(tmp_path / "teacher", layers=4, seed=1)
    there = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}/student_init/abc")
    init = config.StudentInit(layers=[0, 3])
    assert _make_student(str(teacher), None, init, "unused", str(there), 1, False) == [0, 3]
    student = models.load_causal_lm(str(there))
    assert student.config.num_hidden_layers == 2
    whole = models.load_causal_lm(str(teacher)).state_dict()
    assert torch.equal(
        student.state_dict()["model.layers.1.mlp.up_proj.weight"], whole["model.layers.3.mlp.up_proj.weight"]
    )
    assert models.load_tokenizer(str(there)).get_vocab() == models.load_tokenizer(str(teacher)).get_vocab()


@pytest.mark.parametrize("where", ["disk", "store"])
def test_the_teachers_head_is_kept_whole_and_found_again(where, tmp_path, request, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    teacher = tiny_llama(tmp_path / "teacher", dtype=torch.bfloat16)
    uri = (
        str(tmp_path / "head")
        if where == "disk"
        else f"{request.getfixturevalue('object_store').uri}/{uuid.uuid4().hex}/teacher_head"
    )
    assert models.head_shape(storage.path(uri)) is None
    shape = _make_head(str(teacher), None, "auto", uri, 1, False)
    assert shape == models.HeadShape(259, 64, "bfloat16")
    assert models.head_shape(storage.path(uri)) == shape
    expected = models.head_of(models.load_causal_lm(str(teacher)))
    assert torch.equal(models.load_head(uri).weight, expected.weight)


def test_of_a_head_with_padding_the_rows_of_tokens_are_kept(tmp_path):
    teacher = tiny_llama(tmp_path / "teacher", vocab=300)
    shape = _make_head(str(teacher), None, "auto", str(tmp_path / "head"), 1, False, vocab_size=259)
    assert shape == models.HeadShape(259, 64, "float32")
    whole = models.head_of(models.load_causal_lm(str(teacher)))
    assert torch.equal(models.load_head(str(tmp_path / "head")).weight, whole.weight[:259])


def test_a_student_is_cut_by_what_its_teacher_does_on_the_prepared_rows(tmp_path):
    teacher = tiny_llama(tmp_path / "teacher", layers=3)
    prepared = write_prepared(tmp_path / "prepared", num_rows=8)
    init = config.StudentInit(layers=2, intermediate_size=50, num_attention_heads=2, calibration_rows=4)
    made = [_make_student(str(teacher), None, init, str(prepared), str(tmp_path / n), 1, False) for n in ("a", "b")]
    assert made[0] == made[1]
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (tmp_path / "b" / "model.safetensors").read_bytes()
    found = models.load_causal_lm(str(tmp_path / "a")).config
    assert (found.num_hidden_layers, found.intermediate_size, found.num_attention_heads, found.head_dim) == (
        2,
        50,
        2,
        16,
    )


def test_a_head_that_cannot_be_rebuilt_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    teacher = tiny_llama(tmp_path / "teacher")
    load = models.load_causal_lm

    def with_a_multiplier(*args, **kwargs):
        model = load(*args, **kwargs)
        model.lm_head.register_forward_hook(lambda module, args, output: output * 2)
        return model

    monkeypatch.setattr(models, "load_causal_lm", with_a_multiplier)
    with pytest.raises(ConfigError, match=r"does not compute its logits as lm_head\(hidden\)"):
        _make_head(str(teacher), None, "auto", str(tmp_path / "head"), 1, False)
    assert not (tmp_path / "head").exists()
