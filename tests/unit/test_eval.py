import contextlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ray_kd import models
from ray_kd.errors import DataError
from ray_kd.eval import DenseTargets, Evaluator, TopKTargets, generate_samples, rows_of_rank
from ray_kd.payloads.topk_logprobs import TopKLogprobs
from tests.reference import eval_metrics
from tests.tiny import VOCAB_SIZE, tiny_llama

T = 24


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return tiny_llama(folder / "teacher", seed=0), tiny_llama(folder / "student", seed=1, hidden=32)


@pytest.fixture(scope="module")
def rows() -> dict[str, np.ndarray]:
    """Five rows of two documents with prompts and padding; the last row has no target at all."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (5, T)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(10), np.arange(9), np.arange(5)]), (5, 1)).astype(np.int32)
    labels = ids.copy()
    labels[:, 19:] = -100
    labels[:, :3] = -100
    labels[2, 10:14] = -100
    labels[4] = -100
    ids[:, 19:] = 2
    num_target_bytes = np.array([40, 41, 30, 44, 0])
    return {"input_ids": ids, "labels": labels, "position_ids": positions, "num_target_bytes": num_target_bytes}


def logits_of(path: Path, rows: dict[str, np.ndarray]) -> np.ndarray:
    """[n, T, V], every document run alone."""
    model = models.load_causal_lm(str(path))
    ids = torch.from_numpy(rows["input_ids"]).long()
    out = np.zeros((*ids.shape, VOCAB_SIZE))
    with torch.no_grad():
        for row in range(len(ids)):
            for start, end in ((0, 10), (10, 19), (19, T)):
                out[row, start:end] = model(ids[row : row + 1, start:end]).logits[0].numpy()
    return out


def student_calls(path: Path):
    model = models.load_causal_lm(str(path))

    @contextlib.contextmanager
    def weight():
        yield model.lm_head.weight, None

    return lambda ids, positions: models.decoder_hidden(model, ids, positions), weight


def expected_metrics(paths, rows, **kwargs) -> dict[str, float]:
    columns = [rows[name] for name in ("input_ids", "labels", "position_ids")]
    logits = [logits_of(path, rows) for path in paths]
    return eval_metrics.metrics(*columns, *logits, rows["num_target_bytes"], **kwargs)


@pytest.mark.parametrize("chunk_size", [7, 256])
def test_dense_metrics_equal_the_slow_twin(paths, rows, chunk_size: int) -> None:
    teacher = DenseTargets.compute(rows, model=str(paths[0]), batch_size=2)
    evaluator = Evaluator(rows, teacher, batch_size=2, chunk_size=chunk_size)
    got = evaluator.evaluate(*student_calls(paths[1]))
    expected = expected_metrics(paths, rows)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-5), name
    assert got["num_rows"] == 4
    assert got["kl"] > 0.1


def test_a_teacher_agrees_with_itself(paths, rows) -> None:
    evaluator = Evaluator(rows, DenseTargets.compute(rows, model=str(paths[0])))
    got = evaluator.evaluate(*student_calls(paths[0]))
    assert abs(got["kl"]) < 1e-7
    assert got["top1_agreement"] == 1.0


@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_any_number_of_ranks_gives_the_same(paths, rows, world_size: int) -> None:
    alone = Evaluator(rows, DenseTargets.compute(rows, model=str(paths[0]))).evaluate(*student_calls(paths[1]))
    calls, sums = [], []
    for rank in range(world_size):
        share = rows_of_rank(rows, rank, world_size)
        hidden, weight = student_calls(paths[1])
        count = {"forwards": 0}

        def counted(ids, positions, hidden=hidden, count=count):
            count["forwards"] += 1
            return hidden(ids, positions)

        def record(values: list[float]) -> list[float]:
            sums.append(values)
            return np.sum(sums, axis=0).tolist()

        evaluator = Evaluator(share, DenseTargets.compute(share, model=str(paths[0])), batch_size=2)
        try:
            together = evaluator.evaluate(counted, weight, record)
        except DataError:  # the first ranks' partial sum may be only the row without targets
            together = {}
        calls.append(count["forwards"])
    assert len(set(calls)) == 1
    for name, value in alone.items():
        assert together[name] == pytest.approx(value, rel=1e-6), name


def test_ranks_share_rows_without_changing_the_callers(rows) -> None:
    before = {name: column.copy() for name, column in rows.items()}
    shares = [rows_of_rank(rows, rank, 3) for rank in range(3)]
    assert [len(share["input_ids"]) for share in shares] == [2, 2, 2]
    assert (shares[2]["labels"][1] == -100).all()
    assert sum(int(share["num_target_bytes"].sum()) for share in shares) == rows["num_target_bytes"].sum()
    for name, column in rows.items():
        np.testing.assert_array_equal(column, before[name])
    with pytest.raises(DataError, match="no held-out rows"):
        rows_of_rank({name: column[:0] for name, column in rows.items()}, 0, 1)


def payloads_of(path: Path, rows: dict[str, np.ndarray], top_k: int) -> list[TopKLogprobs]:
    logprobs = torch.from_numpy(logits_of(path, rows)).log_softmax(-1)
    payloads = []
    for row in range(len(logprobs)):
        labels, positions = rows["labels"][row], rows["position_ids"][row]
        targets = [t for t in range(T - 1) if labels[t + 1] != -100 and positions[t + 1] > 0]
        values, ids = logprobs[row, targets].topk(top_k)
        payloads.append(TopKLogprobs(ids.numpy().astype(np.int32), values.float().numpy(), 1.0, VOCAB_SIZE))
    return payloads


@pytest.mark.parametrize("chunk_size", [7, 256])
def test_topk_metrics_equal_the_slow_twin_and_have_their_own_name(paths, rows, chunk_size: int) -> None:
    evaluator = Evaluator(rows, TopKTargets(payloads_of(paths[0], rows, 8)), batch_size=2, chunk_size=chunk_size)
    got = evaluator.evaluate(*student_calls(paths[1]))
    expected = expected_metrics(paths, rows, top_k=8)
    assert got.keys() == expected.keys()
    assert "kl" not in got
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=1e-4), name


def test_topk_with_the_whole_vocabulary_is_exact(paths, rows) -> None:
    got = Evaluator(rows, TopKTargets(payloads_of(paths[0], rows, VOCAB_SIZE))).evaluate(*student_calls(paths[1]))
    assert got["topk_bucket_kl"] == pytest.approx(expected_metrics(paths, rows)["kl"], rel=1e-4)


def test_empty_slots_count_as_part_of_the_bucket(paths, rows) -> None:
    full = payloads_of(paths[0], rows, 8)
    cut = [TopKLogprobs(p.ids[:, :5], p.logprobs[:, :5], 1.0, VOCAB_SIZE) for p in full]
    emptied = []
    for payload in full:
        ids, logprobs = payload.ids.copy(), payload.logprobs.copy()
        ids[:, 5:], logprobs[:, 5:] = -1, -np.inf
        emptied.append(TopKLogprobs(ids, logprobs, 1.0, VOCAB_SIZE))
    calls = student_calls(paths[1])
    results = [Evaluator(rows, TopKTargets(payloads)).evaluate(*calls) for payloads in (cut, emptied)]
    assert results[0] == pytest.approx(results[1], rel=1e-6)


def test_rows_the_teacher_refused_are_in_no_metric(paths, rows) -> None:
    payloads = payloads_of(paths[0], rows, 8)
    expected = expected_metrics(paths, rows, top_k=8, skipped_rows=(1,))
    got = Evaluator(rows, TopKTargets([p if i != 1 else None for i, p in enumerate(payloads)])).evaluate(
        *student_calls(paths[1])
    )
    assert got == pytest.approx(expected, rel=1e-4)
    dense = DenseTargets.compute(rows, model=str(paths[0]))
    dense._hidden[1][0] = torch.nan
    got = Evaluator(rows, dense).evaluate(*student_calls(paths[1]))
    assert got == pytest.approx(expected_metrics(paths, rows, skipped_rows=(1,)), rel=1e-5)


def test_payloads_at_another_temperature_are_refused(paths, rows) -> None:
    payload = payloads_of(paths[0], rows, 4)[0]
    with pytest.raises(ValueError, match=r"temperature 1, not 2\.0"):
        TopKTargets([TopKLogprobs(payload.ids, payload.logprobs, 2.0, VOCAB_SIZE)])


def test_nothing_to_evaluate_is_an_error(paths, rows) -> None:
    empty = {name: column[4:] for name, column in rows.items()}
    evaluator = Evaluator(empty, DenseTargets.compute(empty, model=str(paths[0])))
    with pytest.raises(DataError, match="no target tokens"):
        evaluator.evaluate(*student_calls(paths[1]))


def test_a_diverged_student_stays_a_number(paths, rows) -> None:
    hidden, weight = student_calls(paths[1])
    evaluator = Evaluator(rows, DenseTargets.compute(rows, model=str(paths[0])))
    got = evaluator.evaluate(lambda ids, positions: hidden(ids, positions) * 1e4, weight)
    assert all(math.isfinite(value) for value in got.values())


def test_evaluation_leaves_the_random_state_alone(paths, rows) -> None:
    torch.manual_seed(3)
    calls = student_calls(paths[1])
    before = torch.get_rng_state()
    Evaluator(rows, DenseTargets.compute(rows, model=str(paths[0]))).evaluate(*calls)
    assert torch.equal(before, torch.get_rng_state())


def test_samples_are_greedy_and_deterministic(paths) -> None:
    model, tokenizer = models.load_causal_lm(str(paths[0])), models.load_tokenizer(str(paths[0]))
    model.train()
    answers = generate_samples(model, tokenizer, ["Hi", "A longer question?"], max_new_tokens=8)
    assert answers == generate_samples(model, tokenizer, ["Hi", "A longer question?"], max_new_tokens=8)
    assert model.training
    tokenizer.chat_template = None
    assert len(generate_samples(model, tokenizer, ["Hi"], max_new_tokens=8)) == 1
    # Greedy means the argmax of each step.
    ids = tokenizer("Hi", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(8):
            following = model.eval()(ids).logits[0, -1].argmax()
            if following == 2:
                break
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
    assert generate_samples(model, tokenizer, ["Hi"], max_new_tokens=8) == [
        tokenizer.decode(ids[0, 2:], skip_special_tokens=True)
    ]
