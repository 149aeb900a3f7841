"""How large a block of the stream is; a student made of the teacher's layers; a store that holds them both."""

import uuid

import pytest
import torch

from ray_kd import models, storage
from ray_kd.pipeline import _block_rows, _make_student
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


def test_a_student_made_of_layers_may_lie_in_an_object_store(object_store, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    teacher = tiny_llama(tmp_path / "teacher", layers=4, seed=1)
    there = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}/student_init/abc")
    assert _make_student(str(teacher), None, [0, 3], "unused", str(there), 1, False) == [0, 3]
    student = models.load_causal_lm(str(there))
    assert student.config.num_hidden_layers == 2
    whole = models.load_causal_lm(str(teacher)).state_dict()
    assert torch.equal(
        student.state_dict()["model.layers.1.mlp.up_proj.weight"], whole["model.layers.3.mlp.up_proj.weight"]
    )
    assert models.load_tokenizer(str(there)).get_vocab() == models.load_tokenizer(str(teacher)).get_vocab()
