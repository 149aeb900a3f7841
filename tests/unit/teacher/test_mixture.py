"""Several teachers' answers as one, against a twin that adds up probabilities token by token."""

import math

import numpy as np
import pytest

from ray_kd import schema
from ray_kd.errors import ConfigError, DataError
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.engine import Request
from ray_kd.teacher.journal import count_rows
from ray_kd.teacher.mixture import parts
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from tests.unit.teacher.test_stage import VOCAB, block


def answer(rng, num_tokens, top_k, vocab_size, sharpness=3.0):
    """The true top k of a random distribution, and the distribution [M, V]."""
    logits = sharpness * rng.standard_normal((num_tokens, vocab_size))
    logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    ids = np.argsort(-logprobs, axis=1)[:, :top_k]
    return TopKLogprobs(ids, np.take_along_axis(logprobs, ids, 1).astype(np.float32), 1.0, vocab_size), np.exp(logprobs)


def by_token(payload, position):
    """Token -> probability of the slots that are not empty."""
    pairs = zip(payload.ids[position].tolist(), payload.logprobs[position].tolist(), strict=True)
    return {token: math.exp(value) for token, value in pairs if token >= 0 and value > -math.inf}


def summed(route, found, answers):
    total = None
    for part, own in zip(found, answers, strict=True):
        total = part.add(route, total, own)
    return total


@pytest.mark.parametrize("weights", [(1.0,), (0.3, 0.7), (2.0, 1.0, 5.0)])
def test_probabilities_are_averaged_over_the_union_and_the_tail_is_exact(weights):
    rng, vocab_size = np.random.default_rng(0), 97
    answers = [answer(rng, 11, 8, vocab_size, sharpness)[0] for sharpness in (1.0, 3.0, 9.0)[: len(weights)]]
    names = [f"teacher-{i}" for i in range(len(weights))]
    mixed = summed(0, parts(names, weights, [None] * len(weights), [], 8, vocab_size), answers)
    assert mixed.ids.shape == (11, 8 * len(weights))
    for position in range(11):
        expected: dict[int, float] = {}
        tail = 0.0
        for weight, own in zip(weights, answers, strict=True):
            share = weight / sum(weights)
            said = by_token(own, position)
            tail += share * (1 - sum(said.values()))
            for token, probability in said.items():
                expected[token] = expected.get(token, 0.0) + share * probability
        found = by_token(mixed, position)
        assert found == pytest.approx(expected, rel=1e-5)
        assert 1 - sum(found.values()) == pytest.approx(tail, abs=1e-5)
    assert (mixed.logprobs[:, 1:] <= mixed.logprobs[:, :-1]).all(), "most likely first"


def test_with_the_whole_vocabulary_the_mixture_is_the_average_itself():
    rng = np.random.default_rng(1)
    (one, of_one), (two, of_two) = (answer(rng, 5, 31, 31) for _ in range(2))
    mixed = summed(0, parts(["a", "b"], (1, 3), [None, None], [], 31, 31), [one, two])
    dense = np.zeros((5, 31))
    np.put_along_axis(dense, mixed.ids, np.exp(mixed.logprobs.astype(np.float64)), axis=1)
    np.testing.assert_allclose(dense, 0.25 * of_one + 0.75 * of_two, rtol=1e-5)


def test_a_union_of_nearly_everything_leaves_room_for_the_tail():
    """With as many slots as there are tokens the loss would take the rest for nothing."""
    rng = np.random.default_rng(2)
    answers = [answer(rng, 6, 20, 23, 0.5)[0] for _ in range(3)]
    mixed = summed(0, parts("abc", (1, 1, 1), [None] * 3, [], 20, 23), answers)
    assert mixed.ids.shape[1] == 22
    said = [math.fsum(by_token(mixed, position).values()) for position in range(6)]
    assert all(0.8 < mass < 0.99 for mass in said)


def test_rows_go_to_the_teachers_that_take_their_route():
    found = parts(
        ["code", "all", "chat"], (1.0, 3.0, 1.0), [["py", "c"], None, ["chat"]], ["c", "chat", "py", "x"], 4, 99
    )
    assert [part.shares.tolist() for part in found] == [[0.25, 0, 0.25, 0], [0.75, 0.75, 0.75, 1], [0, 0.25, 0, 0]]
    assert [part.is_last.tolist() for part in found] == [
        [False] * 4,
        [True, False, True, True],
        [True] * 4,
    ]
    assert {part.width for part in found} == {8}
    assert parts(["a", "b"], (1, 1), [["x"], ["y"]], ["x", "y"], 4, 99)[0].width == 4
    with pytest.raises(ConfigError, match=r"none has the rows of 'y'; they take 'a' 'x'; 'b' none"):
        parts(["a", "b"], (1, 1), [["x"], []], ["x", "y"], 4, 99)


def test_answers_that_do_not_belong_together_are_refused():
    rng = np.random.default_rng(3)
    first, second = parts(["a", "b"], (1, 1), [None, None], [], 4, 50)
    one, _ = answer(rng, 5, 4, 50)
    so_far = first.add(0, None, one)
    with pytest.raises(DataError, match="teacher 'b' answers with vocab_size 60, those before it with 50"):
        second.add(0, so_far, answer(rng, 5, 4, 60)[0])
    with pytest.raises(DataError, match="answers 4 positions, not 5"):
        second.add(0, so_far, answer(rng, 4, 4, 50)[0])
    with pytest.raises(DataError, match="temperature 2"):
        second.add(0, so_far, TopKLogprobs(one.ids, one.logprobs, 2.0, 50))


def fake(**options):
    engine = {"kind": "fake", "vocab_size": VOCAB, **options}
    return EngineSpec(engine, "teacher", None, "auto", 2, num_gpus=0, threads=1)


def routed(num_rows, routes):
    import pyarrow as pa

    return block(num_rows, 64).append_column(schema.ROUTE, pa.array(np.array(routes, np.int32)))


def test_stages_behind_each_other_route_and_mix(tmp_path):
    routes = [0, 1, 2, 1, 2, 0]  # the last row is a dummy
    found = parts(
        ["calm", "sharp"], (1, 3), [["calm", "both"], ["sharp", "both"]], ["both", "calm", "sharp"], 16, VOCAB
    )
    request = Request(top_k=16)
    rows = routed(6, routes)
    alone = {
        name: [
            TopKLogprobs.decode(payload) if payload else None
            for payload in TeacherStage(fake(sharpness=s), request, str(tmp_path / name))(rows)
            .column(schema.TEACHER_PAYLOAD)
            .to_pylist()
        ]
        for name, s in (("calm", 1.0), ("sharp", 6.0))
    }
    for name, sharpness, part in zip(("calm", "sharp"), (1.0, 6.0), found, strict=True):
        stage = TeacherStage(fake(sharpness=sharpness), request, str(tmp_path / "run"), "compact", part=part)
        rows = stage(rows)
        assert name in part.name
    payloads = rows.column(schema.TEACHER_PAYLOAD).to_pylist()
    assert payloads[5] == b""
    for row, teacher in ((1, "calm"), (3, "calm"), (2, "sharp"), (4, "sharp")):
        decoded, expected = TopKLogprobs.decode(payloads[row]), alone[teacher][row]
        for position in range(len(expected.ids)):
            assert by_token(decoded, position) == pytest.approx(by_token(expected, position), rel=3e-2)
    mixed = TopKLogprobs.decode(payloads[0])
    for position in range(len(mixed.ids)):
        expected = {token: 0.25 * p for token, p in by_token(alone["calm"][0], position).items()}
        for token, p in by_token(alone["sharp"][0], position).items():
            expected[token] = expected.get(token, 0.0) + 0.75 * p
        assert by_token(mixed, position) == pytest.approx(expected, rel=3e-2)
    work = count_rows(tmp_path / "run")
    assert [(actor.teacher, actor.rows_computed) for actor in work.actors] == [("calm", 3), ("sharp", 3)]
    assert (work.computed, work.repeated) == (6, 0)
    assert all(actor.report()["batch_fill"] == 1.0 and actor.report()["tokens_per_second"] > 0 for actor in work.actors)


def test_a_row_that_one_teacher_cannot_answer_is_not_asked_of_the_next(tmp_path):
    found = parts(["first", "second"], (1, 1), [None, None], [], 16, VOCAB)
    rows = routed(4, [0] * 4)
    rows = TeacherStage(fake(nan_row_ids=[1]), Request(top_k=16), str(tmp_path), part=found[0])(rows)
    rows = TeacherStage(fake(nan_row_ids=[2]), Request(top_k=16), str(tmp_path), part=found[1])(rows)
    assert rows.column(schema.WEIGHT).to_pylist() == [1.0, 0.0, 0.0, 0.0]
    errors = rows.column(schema.TEACHER_ERROR).to_pylist()
    assert errors[0] == ""
    assert errors[1].startswith("teacher 'first': ")
    assert errors[2].startswith("teacher 'second': ")
    assert [actor.rows_computed for actor in count_rows(tmp_path).actors] == [3, 2]
