"""teacher.vocabulary: shared, from the teacher's answers through the loss to the held-out KL."""

import contextlib

import numpy as np
import pytest
import torch

from ray_kd import models, schema
from ray_kd.eval import DenseTargets, Evaluator, TopKTargets
from ray_kd.losses import Head, fused_linear_dense_kd_loss, fused_linear_kd_loss
from ray_kd.teacher.engine import Request
from ray_kd.teacher.engines import hf
from ray_kd.teacher.topk import topk_logprobs
from tests.fake_prepared import random_rows
from tests.reference import vocabulary as reference
from tests.tiny import VOCAB_SIZE, tiny_llama

TEACHER_ROWS, STUDENT_ROWS, TOP_K = 300, 280, 8
N, H, D = 7, 12, 20


@pytest.fixture
def heads():
    """Hidden states and heads of both, float64; the teacher likes some of its padding, which must not matter."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    hidden, teacher_hidden = random(N, H), random(N, D)
    weight, teacher_weight = random(STUDENT_ROWS, H) / 3, random(TEACHER_ROWS, D) / 3
    teacher_weight[290] *= 4
    labels = torch.randint(0, VOCAB_SIZE, (N,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), teacher_hidden, Head(teacher_weight), labels


def compare(heads, loss, expected):
    hidden, weight, *_ = heads
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    ours, theirs = (torch.autograd.grad(value, (hidden, weight)) for value in (loss, expected))
    for got, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
    return ours


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("chunk_size", [3, 256])
def test_dense_loss_is_that_of_the_tokens(heads, temperature, chunk_size):
    hidden, weight, teacher_hidden, head, labels = heads
    out = fused_linear_dense_kd_loss(
        hidden, weight, teacher_hidden, head.over(VOCAB_SIZE), labels, temperature=temperature, chunk_size=chunk_size
    )
    expected = reference.kl(teacher_hidden @ head.weight.T, hidden @ weight.T, VOCAB_SIZE, temperature)
    _, grad = compare(heads, out.loss, expected)
    # Padding is pushed down by exactly the student's mass on it: the teacher gives it none.
    p = (hidden / temperature @ weight.T).softmax(-1)[:, VOCAB_SIZE:].detach()
    torch.testing.assert_close(grad[VOCAB_SIZE:], temperature * p.T @ hidden.detach() / N)
    # With its padding the teacher says something else.
    whole = fused_linear_dense_kd_loss(hidden, weight, teacher_hidden, head.over(STUDENT_ROWS), labels)
    assert (whole.loss - out.loss).abs().item() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_loss_is_that_of_the_tokens(heads, temperature):
    hidden, weight, teacher_hidden, head, labels = heads
    ids, logprobs = topk_logprobs(teacher_hidden, head.over(VOCAB_SIZE), TOP_K, temperature)
    assert int(ids.max()) < VOCAB_SIZE
    exact = torch.log(
        torch.stack(
            [reference.teacher_probabilities(row, VOCAB_SIZE, temperature) for row in teacher_hidden @ head.weight.T]
        )
    )
    torch.testing.assert_close(logprobs.double(), exact.gather(1, ids), rtol=1e-5, atol=1e-5)
    out = fused_linear_kd_loss(hidden, weight, ids, exact.gather(1, ids), labels, temperature=temperature)
    compare(heads, out.loss, reference.bucket_kl(
        teacher_hidden @ head.weight.T, hidden @ weight.T, VOCAB_SIZE, TOP_K, temperature))  # fmt: skip


def test_all_tokens_as_top_k_are_the_dense_loss(heads):
    hidden, weight, teacher_hidden, head, labels = heads
    ids, _ = topk_logprobs(teacher_hidden, head.over(VOCAB_SIZE), VOCAB_SIZE)
    exact = (teacher_hidden @ head.over(VOCAB_SIZE).weight.T).log_softmax(-1).gather(1, ids)
    topk = fused_linear_kd_loss(hidden, weight, ids, exact, labels, tail="drop")
    dense = fused_linear_dense_kd_loss(hidden, weight, teacher_hidden, head.over(VOCAB_SIZE), labels)
    torch.testing.assert_close(topk.loss, dense.loss)


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("padded")
    return (
        tiny_llama(folder / "teacher", vocab=TEACHER_ROWS, seed=0),
        tiny_llama(folder / "student", vocab=STUDENT_ROWS, seed=1, hidden=32),
    )


def test_held_out_kl_is_that_of_the_tokens(paths):
    teacher_path, student_path = paths
    rows = random_rows(3, 16, VOCAB_SIZE)
    rows["row_id"] = np.arange(3)
    dense = DenseTargets.compute(rows, model=str(teacher_path), vocab_size=VOCAB_SIZE)
    engine = hf.Engine(hf.Config(), model=str(teacher_path))
    topk = TopKTargets(engine.annotate(rows, Request(top_k=TOP_K, vocab_size=VOCAB_SIZE)))
    everything = TopKTargets(engine.annotate(rows, Request(top_k=VOCAB_SIZE, vocab_size=VOCAB_SIZE)))
    student = models.load_causal_lm(str(student_path))

    @contextlib.contextmanager
    def weight():
        yield student.lm_head.weight, None

    def measured(targets):
        return Evaluator(rows, targets).evaluate(
            lambda ids, positions: models.decoder_hidden(student, ids, positions), weight
        )

    teacher = models.load_causal_lm(str(teacher_path))
    is_target = schema.target_positions(rows["labels"], rows["position_ids"])
    with torch.no_grad():
        theirs, ours = (
            model.lm_head(
                models.decoder_hidden(model, *(torch.from_numpy(rows[name]) for name in ("input_ids", "position_ids")))[
                    torch.from_numpy(is_target)
                ]
            ).double()
            for model in (teacher, student)
        )
    exact = float(reference.kl(theirs, ours, VOCAB_SIZE))
    assert measured(dense)["kl"] == pytest.approx(exact, rel=1e-4)
    bucket = float(reference.bucket_kl(theirs, ours, VOCAB_SIZE, TOP_K))
    assert measured(topk)["topk_bucket_kl"] == pytest.approx(bucket, rel=1e-4)
    assert bucket < exact
    best = theirs[:, :VOCAB_SIZE].argmax(-1) == ours.argmax(-1)
    assert measured(dense)["top1_agreement"] == pytest.approx(float(best.double().mean()))
    assert measured(everything)["top1_agreement"] == measured(dense)["top1_agreement"]


def test_the_number_of_ids_is_that_of_the_tokenizer(paths):
    assert models.num_token_ids(models.load_tokenizer(str(paths[0]))) == VOCAB_SIZE


def test_a_head_has_no_more_rows_than_it_has():
    head = Head(torch.zeros(5, 2), torch.arange(5.0))
    assert head.over(None) is head
    assert head.over(3).bias.tolist() == [0.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="has 5 rows, less than 6"):
        head.over(6)
