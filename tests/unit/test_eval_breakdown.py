"""The evaluation's breakdowns against a slow twin, and what must add up whatever the models."""

import numpy as np
import pytest
import torch

from ray_kd.eval import Breakdown, DenseTargets, Evaluator, TopKTargets
from ray_kd.eval.breakdown import ENTROPY_EDGES
from ray_kd.eval.targets import Compared
from tests.reference import eval_breakdown
from tests.tiny import VOCAB_SIZE, tiny_llama
from tests.unit.test_eval import T, logits_of, payloads_of, student_calls

RANKS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 259]


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return tiny_llama(folder / "teacher", seed=0), tiny_llama(folder / "student", seed=1, hidden=32)


@pytest.fixture(scope="module")
def rows(paths):
    """Rows of three documents whose labels the teacher knows half of the time, so that it is not always wrong."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, VOCAB_SIZE, (6, T)).astype(np.int32)
    positions = np.tile(np.concatenate([np.arange(10), np.arange(9), np.arange(5)]), (6, 1)).astype(np.int32)
    labels = ids.copy()
    labels[:, 19:] = -100
    labels[2, 10:14] = -100
    found = {"input_ids": ids, "labels": labels, "position_ids": positions}
    known = np.roll(logits_of(paths[0], found).argmax(-1), 1, axis=1)
    is_known = (rng.random(labels.shape) < 0.5) & (labels != -100)
    labels[is_known] = known[is_known]
    return found | {"num_target_bytes": np.full(6, 30)}


def measured(paths, rows, targets, **options):
    breakdown = Breakdown(targets.metric, targets.max_rank)
    metrics = Evaluator(rows, targets, **options).evaluate(*student_calls(paths[1]), breakdown=breakdown)
    return metrics, breakdown.result()


def check(got, expected, metric, entropy_edges=(0.0, *ENTROPY_EDGES)) -> None:
    positions = {entry["from"]: entry for entry in got["by_position"]}
    entropies = {entropy_edges.index(entry["from"]): entry for entry in got["by_teacher_entropy"]}
    for entries, name in ((positions, "position"), (entropies, "entropy")):
        assert entries.keys() == expected[name].keys()
        for key, (count, kl, agreement) in expected[name].items():
            assert entries[key]["num_tokens"] == count
            assert entries[key][metric] == pytest.approx(kl, rel=1e-4)
            assert entries[key]["top1_agreement"] == pytest.approx(agreement)
    for name in ("teacher", "student"):
        bins = {round(entry["from"] * 15): entry for entry in got["calibration"][name]["bins"]}
        assert bins.keys() == expected[name].keys()
        for key, (count, confidence, accuracy) in expected[name].items():
            assert bins[key]["num_tokens"] == count
            assert bins[key]["confidence"] == pytest.approx(confidence, rel=1e-4)
            assert bins[key]["accuracy"] == pytest.approx(accuracy)
        assert got["calibration"][name]["ece"] == pytest.approx(expected["ece"][name], rel=1e-4)
    assert {entry["rank"]: entry["mass"] for entry in got["teacher_mass_by_rank"]} == pytest.approx(
        expected["mass"], rel=1e-5
    )


@pytest.mark.parametrize("chunk_size", [7, 256])
def test_the_breakdown_of_a_whole_vocabulary_equals_the_slow_twin(paths, rows, chunk_size):
    targets = DenseTargets.compute(rows, model=str(paths[0]))
    metrics, got = measured(paths, rows, targets, batch_size=2, chunk_size=chunk_size)
    logits = [logits_of(path, rows) for path in paths]
    expected = eval_breakdown.breakdown(rows["labels"], rows["position_ids"], *logits, RANKS)
    check(got, expected, "kl")
    assert 0.2 < expected["teacher"][max(expected["teacher"])][2] < 0.9  # labels that it knows and others
    for name in ("by_position", "by_teacher_entropy"):
        assert sum(entry["num_tokens"] for entry in got[name]) == metrics["num_tokens"]
        total = sum(entry["num_tokens"] * entry["kl"] for entry in got[name])
        assert total / metrics["num_tokens"] == pytest.approx(metrics["kl"], rel=1e-9)
    assert got["teacher_mass_by_rank"][-1] == {"rank": VOCAB_SIZE, "mass": pytest.approx(1.0, rel=1e-6)}


@pytest.mark.parametrize("chunk_size", [7, 256])
def test_the_breakdown_of_a_top_k_equals_the_slow_twin(paths, rows, chunk_size):
    targets = TopKTargets(payloads_of(paths[0], rows, 12))
    _, got = measured(paths, rows, targets, batch_size=2, chunk_size=chunk_size)
    logits = [logits_of(path, rows) for path in paths]
    expected = eval_breakdown.breakdown(rows["labels"], rows["position_ids"], *logits, [1, 2, 4, 8, 12], top_k=12)
    check(got, expected, "topk_bucket_kl")


def test_metrics_do_not_change_with_a_breakdown(paths, rows):
    targets = DenseTargets.compute(rows, model=str(paths[0]))
    with_breakdown, _ = measured(paths, rows, targets)
    assert Evaluator(rows, targets).evaluate(*student_calls(paths[1])) == with_breakdown


def test_edges_belong_to_the_bucket_above_and_certainty_to_the_last_bin():
    """One token a row: contexts at the edges, a teacher that is certain, one that knows two ids alike."""
    certain = torch.tensor([0.0, -torch.inf, -torch.inf])
    even = torch.tensor([0.5, 0.5, 0.0]).log()
    outcomes = torch.stack([certain, even, even])
    student = torch.tensor([[0.75, 0.125, 0.125]]).log().expand(3, 3)
    compared = Compared(torch.tensor([1.0, 2.0, 4.0]), torch.zeros(3, dtype=torch.int64), outcomes, 3)
    breakdown = Breakdown("kl", 2)
    breakdown.add(compared, student, torch.tensor([0, 1, 0]), torch.tensor([7, 8, 16]))
    got = breakdown.result()
    assert [(entry["from"], entry["to"], entry["kl"]) for entry in got["by_position"]] == [
        (1, 8, 1.0), (8, 16, 2.0), (16, 32, 4.0),
    ]  # fmt: skip
    assert [(entry["from"], entry["num_tokens"], entry["kl"]) for entry in got["by_teacher_entropy"]] == [
        (0.0, 1, 1.0), (0.5, 2, 3.0),
    ]  # fmt: skip
    last = got["calibration"]["teacher"]["bins"][-1]
    assert (last["to"], last["num_tokens"], last["confidence"], last["accuracy"]) == (1.0, 1, 1.0, 1.0)
    assert got["calibration"]["teacher"]["ece"] == pytest.approx(0.0)
    assert got["calibration"]["student"]["ece"] == pytest.approx(0.75 - 2 / 3)
    assert got["teacher_mass_by_rank"] == [{"rank": 1, "mass": pytest.approx(2 / 3)}, {"rank": 2, "mass": 1.0}]
