"""The teacher's cache: what is put is what is read, damage is seen, and answers of another kind are refused by name."""

import hashlib
import json
import pickle
import random
import threading
from dataclasses import fields, replace

import numpy as np
import pyarrow as pa
import pytest

from ray_kd import schema
from ray_kd.data.order import SlotOrder
from ray_kd.errors import ConfigError, RetryableError
from ray_kd.payloads import FEATURES, HIDDEN_STATES, Features, FeatureSpec, HiddenStates, TopKLogprobs, topk_logprobs
from ray_kd.teacher import cache as caches
from ray_kd.teacher.cache import Cache, Contents, cut, open_cache
from ray_kd.teacher.engine import Request
from ray_kd.teacher.journal import count_rows
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from ray_kd.teacher_cache import covers
from tests.fake_prepared import random_rows

NUM_ROWS, TOP_K, VOCAB_SIZE = 40, 8, 259
ASKED = Contents.of(
    Request(top_k=TOP_K), data="d" * 64, num_rows=NUM_ROWS, tokenizer="tok", model="big", revision=None,
    teacher="a" * 64, dtype="auto", engine='{"kind": "hf"}', wire="plain",
)  # fmt: skip


def payloads(num_tokens=50):
    rng = np.random.default_rng(0)
    return [topk_logprobs.example(num_tokens, rng, top_k=TOP_K).encode() for _ in range(NUM_ROWS)]


@pytest.fixture
def filled(tmp_path):
    """A cache of all rows in files of 8, and the payloads."""
    cache, expected = open_cache(tmp_path, ASKED, "write_through", False), payloads()
    for start in range(0, NUM_ROWS, 8):
        cache.add(list(range(start, start + 8)), expected[start : start + 8])
    return cache, expected


@pytest.mark.usefixtures("filled")
def test_answers_over_other_ids_are_other_answers(tmp_path):
    over = Contents.of(
        Request(top_k=TOP_K, vocab_size=250), data="d" * 64, num_rows=NUM_ROWS, tokenizer="tok", model="big",
        revision=None, teacher="a" * 64, dtype="auto", engine='{"kind": "hf"}', wire="plain",
    )  # fmt: skip
    assert (over.request.vocab_size, ASKED.request.vocab_size) == (250, None)
    with pytest.raises(ConfigError, match="its vocab_size is None, not 250"):
        open_cache(tmp_path, over, "read", False)
    states = replace(over.request, kind=HIDDEN_STATES)
    assert Contents.of(states, **{name: getattr(over, name) for name in (
        "data", "num_rows", "tokenizer", "model", "revision", "teacher", "dtype", "engine", "wire")
    }).vocab_size is None  # fmt: skip


def files(cache):
    return sorted(cache.folder.glob("rows-*"))


def test_another_process_reads_what_was_put(filled):
    cache, expected = filled
    other = pickle.loads(pickle.dumps(cache))
    rows = [17, 3, 39, 3]
    assert other.read(rows) == [expected[row] for row in rows]
    assert open_cache(cache.folder.parent, ASKED, "read", False).read([0]) == [expected[0]]


def test_a_row_that_another_put_meanwhile_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(caches, "_REFRESH_SHARE", 1e9)  # look each time
    here, there = (open_cache(tmp_path, ASKED, "write_through", False) for _ in range(2))
    expected = payloads()
    assert there.read([1, 2]) == [None, None]
    assert there.is_empty
    here.add([1], [expected[1]])
    assert there.read([1, 2]) == [expected[1], None]
    assert not there.is_empty


def test_looking_for_the_files_of_others_takes_little_of_the_time(tmp_path, monkeypatch):
    cache = open_cache(tmp_path, ASKED, "write_through", False)
    looks = []
    monkeypatch.setattr(cache, "refresh", lambda: looks.append(1))
    monkeypatch.setattr(cache, "_next_refresh", float("inf"))
    cache.read([0])
    assert not looks


def test_damage_is_never_read_and_the_file_is_set_aside(filled):
    cache, expected = filled
    (path, *_), draw = files(cache), random.Random(0)
    whole = path.read_bytes()
    rows_there = {row for row in range(NUM_ROWS) if cache._names[cache._file_of[row]] == path.name}
    num_set_aside = 0
    for trial in range(300):
        damaged = bytearray(whole)
        if trial % 3 == 0:
            damaged = damaged[: draw.randrange(len(damaged))]
        else:
            # In the whole file, or in the footer, where Parquet has no checksum.
            near_end = 900 if trial % 3 == 2 else len(damaged)
            damaged[len(damaged) - 1 - draw.randrange(near_end)] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        found = Cache(cache.folder, is_written=True).read(list(range(NUM_ROWS)))
        for row, payload in enumerate(found):
            assert payload == expected[row] or (payload is None and row in rows_there)
        aside = list((cache.folder / "damaged").glob("*"))
        assert bool(aside) == (None in found)
        num_set_aside += bool(aside)
        for left in aside:
            left.unlink()
    assert num_set_aside > 250


def test_any_damage_to_the_footer_is_seen(filled):
    """The names of the columns stand there, and Parquet has no checksum for them."""
    cache, expected = filled
    (path, *_) = files(cache)
    whole = path.read_bytes()
    length = int.from_bytes(whole[-8:-4], "little") + 8
    for place in range(len(whole) - length, len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x80]) + whole[place + 1 :])
        found = Cache(cache.folder, is_written=False).read(list(range(NUM_ROWS)))
        assert all(payload in (None, expected[row]) for row, payload in enumerate(found))
    assert path.exists(), "who may only read leaves a damaged file where it is"


@pytest.mark.parametrize(
    "error", [OSError(24, "Too many open files"), MemoryError(), PermissionError(13, "no")], ids=str
)
def test_what_the_machine_lacks_is_no_damage(filled, monkeypatch, error):
    cache, _ = filled

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(caches.pq, "ParquetFile", fail)
    with pytest.raises(type(error)):
        Cache(cache.folder, is_written=True)
    assert len(files(cache)) == 5


def test_files_of_another_cache_are_never_read(filled, tmp_path):
    cache, _ = filled
    other = open_cache(tmp_path / "other", replace(ASKED, teacher="b" * 64), "write_through", False)
    for path in files(cache):
        (other.folder / path.name).write_bytes(path.read_bytes())
    assert not Cache(other.folder, is_written=False).has(np.arange(NUM_ROWS)).any()


def test_of_two_that_begin_a_cache_at_once_one_is_refused(tmp_path):
    for trial in range(20):
        asked = [replace(ASKED, teacher=letter * 64) for letter in "ab"]
        barrier, outcomes = threading.Barrier(2), []

        def begin(contents, path=tmp_path / str(trial), barrier=barrier, outcomes=outcomes):
            barrier.wait()
            try:
                open_cache(path, contents, "write_through", False)
                outcomes.append("opened")
            except ConfigError as error:
                outcomes.append("another teacher" in str(error) and "refused")

        threads = [threading.Thread(target=begin, args=(contents,)) for contents in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(outcomes) == ["opened", "refused"]


def test_who_opens_a_cache_while_it_is_merged_sees_every_row(filled, monkeypatch):
    cache, _ = filled
    row_ids = Cache._row_ids
    merges = [cache.merge]

    def look(self, name):
        if self is not cache and merges:
            merges.pop()()
        return row_ids(self, name)

    monkeypatch.setattr(Cache, "_row_ids", look)
    assert Cache(cache.folder, is_written=False).has(np.arange(NUM_ROWS)).all()
    assert not merges


def test_two_merges_at_once_lose_nothing(filled, monkeypatch):
    cache, expected = filled
    other = Cache(cache.folder, is_written=True)
    monkeypatch.setattr(other, "refresh", lambda: None)
    cache.merge()
    other.merge()
    assert Cache(cache.folder, is_written=False).read(list(range(NUM_ROWS))) == expected


def test_merging_keeps_every_row_once_and_readers_go_on(filled):
    cache, expected = filled
    reader = Cache(cache.folder, is_written=False)
    cache.add([0, 1], expected[:2])  # again, as after a kill
    cache.merge()
    (merged,) = files(cache)
    assert pa.parquet.read_table(merged).column(schema.ROW_ID).to_pylist() == list(range(NUM_ROWS))
    for one in (cache, reader, Cache(cache.folder, is_written=False)):
        assert one.read(list(range(NUM_ROWS))) == expected


def test_the_same_rows_make_the_same_bytes(tmp_path):
    hashes = []
    for name in ("one", "two"):
        cache = open_cache(tmp_path / name, ASKED, "write_through", False)
        cache.add([2, 0, 1], payloads()[:3], name="000-002")
        hashes.append([(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files(cache)])
    assert hashes[0] == hashes[1]


MISMATCHES = {
    "teacher": (replace(ASKED, teacher="b" * 64, model="other"), "of another teacher: 'big' .*not 'other'"),
    "k": (replace(ASKED, top_k=16), r"K = 8 tokens, less than teacher\.top_k=16"),
    "temperature": (replace(ASKED, temperature=2.0), r"temperature is 1 and loss\.temperature 2.*renormalize"),
    "selection": (replace(ASKED, selection="sample", seed=0), "its selection is topk, not sample"),
    "engine": (replace(ASKED, engine='{"kind": "http"}'), "its engine is .*hf.*, not .*http"),
    "wire": (replace(ASKED, wire="compact"), "its wire is plain, not compact"),
    "dtype": (replace(ASKED, dtype="bfloat16"), "its dtype is auto, not bfloat16"),
    "payload": (replace(ASKED, payload=HIDDEN_STATES), "its payload is topk_logprobs, not hidden_states"),
    "version": (replace(ASKED, version=2), "is of version 1, this code reads 2"),
}


@pytest.mark.parametrize("case", MISMATCHES)
def test_other_answers_are_refused_by_name(filled, case):
    asked, message = MISMATCHES[case]
    for mode in ("read", "write_through"):
        with pytest.raises(ConfigError, match=rf"^teacher\.cache '.*' does not fit: .*{message}.*") as error:
            open_cache(filled[0].folder.parent, asked, mode, False)
        assert "\n" not in str(error.value)


def test_another_tokenizer_is_refused_by_name(filled, tmp_path):
    path = filled[0].folder.parent
    with pytest.raises(ConfigError, match=r"holds answers for another tokenizer \(tok\)"):
        open_cache(path, replace(ASKED, data="e" * 64, tokenizer="new"), "read", False)
    with pytest.raises(ConfigError, match=r"holds answers to other prepared data \(d{16}\)"):
        open_cache(path, replace(ASKED, data="e" * 64), "read", False)
    with pytest.raises(ConfigError, match="holds no cache: fill one with cache_teacher"):
        open_cache(tmp_path / "nothing", ASKED, "read", False)
    with pytest.raises(ConfigError, match="does not fit: its tokenizer is tok, not new"):
        open_cache(path, replace(ASKED, tokenizer="new"), "write_through", False)


LAYERS = FeatureSpec((1, 2), "attention", (0,), "targets")
ASKED_FEATURES = Contents.of(
    Request(FEATURES, top_k=TOP_K, features=LAYERS),
    **{name: getattr(ASKED, name) for name in ("data", "num_rows", "tokenizer", "model", "revision", "teacher", "dtype",
                                               "engine", "wire")},
)  # fmt: skip


def test_features_are_asked_for_again_as_they_were(tmp_path):
    cache = open_cache(tmp_path, ASKED_FEATURES, "write_through", False)
    assert Cache(cache.folder, is_written=False).contents == ASKED_FEATURES
    assert cache.contents.request == Request(FEATURES, top_k=TOP_K, features=LAYERS)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (
            replace(ASKED_FEATURES, features=replace(LAYERS, hidden_layers=(1,)).to_json()),
            r"its features is .*\[1, 2\]",
        ),
        (
            replace(ASKED_FEATURES, features=replace(LAYERS, mean_over_heads=True).to_json()),
            "its features is .*, not .*heads.: true",
        ),
        (replace(ASKED_FEATURES, top_k=4), r"its answers have K = 8 tokens, not teacher\.top_k=4"),
        (ASKED, "its payload is features, not topk_logprobs"),
    ],
)
def test_other_features_are_refused_by_name(tmp_path, asked, message):
    open_cache(tmp_path, ASKED_FEATURES, "write_through", False)
    with pytest.raises(ConfigError, match=rf"^teacher\.cache '.*' does not fit: {message}") as error:
        open_cache(tmp_path, asked, "read", False)
    assert "\n" not in str(error.value)


def test_a_cache_from_before_there_were_features_stays_what_it_is(filled):
    cache, expected = filled
    manifest = cache.folder / "manifest.json"
    older = json.loads(manifest.read_text())
    del older["features"], older["vocab_size"]
    manifest.write_text(json.dumps(older))
    assert older.keys() == {field.name for field in fields(Contents)} - {"features", "vocab_size"}
    # The digest that stands in the files of such a cache, computed as it was then.
    then = hashlib.sha256(json.dumps({**older, "model": None}, sort_keys=True).encode()).hexdigest()[:32]
    again = open_cache(cache.folder.parent, ASKED, "read", False)
    assert again.contents.digest == then
    assert again.read([0, 39]) == [expected[0], expected[39]]


def test_a_damaged_manifest_is_an_error_of_one_line(filled):
    (filled[0].folder / "manifest.json").write_text('{"data": ')
    with pytest.raises(ConfigError, match=r"manifest\.json' is no manifest of a teacher cache"):
        open_cache(filled[0].folder.parent, ASKED, "read", False)


def test_a_temperature_that_the_loss_can_rescale_and_a_larger_k_fit(filled):
    asked = replace(ASKED, temperature=2.0, top_k=4)
    assert open_cache(filled[0].folder.parent, asked, "read", any_temperature=True).contents == ASKED


@pytest.mark.parametrize("wire", topk_logprobs.WIRES)
def test_a_larger_k_is_cut_to_the_most_likely(wire):
    rng = np.random.default_rng(1)
    whole = topk_logprobs.example(30, rng, top_k=16)
    small = TopKLogprobs.decode(cut(whole.encode(wire), 4, wire))
    sent = TopKLogprobs.decode(whole.encode(wire))
    assert small.ids.shape == (30, 4)
    for ids, logprobs, of_ids, of_logprobs in zip(small.ids, small.logprobs, sent.ids, sent.logprobs, strict=True):
        best = sorted(zip(-of_logprobs, of_ids, strict=True))[:4]
        np.testing.assert_allclose(sorted(logprobs), sorted(-value for value, _ in best), atol=8e-3)
        assert {i for i in ids if i >= 0} <= {i for i in of_ids if i >= 0}
    assert cut(whole.encode(wire), 16, wire) == whole.encode(wire)


# -- in the teacher stage -------------------------------------------------------------------------------------------

LENGTH = 32
SPEC = EngineSpec(
    {"kind": "fake", "vocab_size": VOCAB_SIZE, "nan_row_ids": [5]}, "teacher", None, "auto", 2, num_gpus=0, threads=1
)


def block(row_ids, dummies=()):
    columns = random_rows(NUM_ROWS, LENGTH, VOCAB_SIZE)
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(columns[name][row_ids].reshape(-1)), LENGTH)
        for name in (schema.INPUT_IDS, schema.LABELS, schema.POSITION_IDS)
    }
    weight = np.array([0.0 if row in dummies else 1.0 for row in row_ids], np.float32)
    slots = {schema.SLOT: pa.array(np.arange(len(row_ids))), schema.WEIGHT: pa.array(weight)}
    return pa.table({schema.ROW_ID: pa.array(row_ids), **lists, **slots})


def answers(table):
    return table.column(schema.TEACHER_PAYLOAD).to_pylist()


def stage(run_dir, cache, spec=SPEC, top_k=TOP_K):
    return TeacherStage(spec, cache.contents.request, str(run_dir), "plain", cache, top_k)


def test_what_was_computed_once_is_read_and_a_refused_row_is_asked_again(tmp_path):
    cache = open_cache(tmp_path / "cache", ASKED, "write_through", False)
    first = stage(tmp_path / "one", cache)(block([3, 5, 7, 9], dummies=[9]))
    expected = answers(TeacherStage(SPEC, ASKED.request, str(tmp_path / "plain"))(block([3, 5, 7, 9], dummies=[9])))
    assert answers(first) == expected
    assert [bool(payload) for payload in expected] == [True, False, True, False]

    second = stage(tmp_path / "two", Cache(cache.folder, is_written=True))(block([7, 5, 3, 11]))
    assert answers(second)[:3] == [expected[2], b"", expected[0]]
    assert second.column(schema.WEIGHT).to_pylist() == [1, 0, 1, 1]
    rows = count_rows(tmp_path / "two")
    assert (rows.computed, rows.from_cache, rows.repeated) == (2, 2, 0)


def test_hidden_states_have_no_k_to_cut(tmp_path, monkeypatch):
    bits = np.arange(60, dtype=np.uint16).reshape(6, 10)

    class Stub:
        def annotate(self, rows, request):
            assert request.kind == HIDDEN_STATES
            return [HiddenStates(bits)] * len(rows["row_id"])

    monkeypatch.setattr(EngineSpec, "build", lambda self, request: Stub())
    hidden = replace(ASKED, payload=HIDDEN_STATES, top_k=None, temperature=None, selection=None)
    cache = open_cache(tmp_path / "cache", hidden, "write_through", False)
    for _ in range(2):
        (sent,) = answers(stage(tmp_path / "run", cache, top_k=4)(block([4])))
        np.testing.assert_array_equal(HiddenStates.decode(sent).bits, bits)


def test_features_are_read_as_they_were_computed(tmp_path):
    cache = open_cache(tmp_path / "cache", ASKED_FEATURES, "write_through", False)
    computed = answers(stage(tmp_path / "one", cache)(block([3, 4, 7], dummies=[7])))
    assert [bool(payload) for payload in computed] == [True, True, False]
    assert {Features.decode(payload).spec for payload in computed[:2]} == {LAYERS}
    read = stage(tmp_path / "two", Cache(cache.folder, is_written=False), spec=None)
    assert answers(read(block([4, 3]))) == [computed[1], computed[0]]


@pytest.mark.parametrize("num_rows", [5, 51])
def test_covered_means_every_row_from_the_slot_on(tmp_path, num_rows):
    order = SlotOrder(num_rows=num_rows, global_batch_size=4, epochs=3, max_steps=None, seed=0)
    for missing in range(num_rows):
        cache = open_cache(tmp_path / str(missing), replace(ASKED, num_rows=num_rows), "write_through", False)
        rows = [row for row in range(num_rows) if row != missing]
        cache.add(rows, [b"-"] * len(rows))
        for start in range(0, order.num_slots, 4):
            assert covers(cache, np.ones(num_rows, bool), order, start) == (
                missing not in order.rows(start, order.num_slots)
            )


def test_a_cache_that_is_only_read_stays_as_it_is(tmp_path):
    open_cache(tmp_path, ASKED, "write_through", False)
    cache = open_cache(tmp_path, ASKED, "read", False)
    assert all(answers(stage(tmp_path / "run", cache)(block([1, 2]))))
    assert files(cache) == []


def test_without_an_engine_a_row_that_is_missing_can_be_tried_again(tmp_path):
    cache = open_cache(tmp_path / "cache", ASKED, "write_through", False)
    expected = answers(stage(tmp_path / "one", cache)(block([1, 2])))
    covered = stage(tmp_path / "two", cache, spec=None)
    assert answers(covered(block([2, 1]))) == expected[::-1]
    with pytest.raises(RetryableError, match="not there any more"):
        covered(block([3]))


def test_the_student_is_sent_the_k_it_asked_for(tmp_path):
    cache = open_cache(tmp_path / "cache", ASKED, "write_through", False)
    for _ in range(2):  # computed, then read
        (sent,) = answers(stage(tmp_path / "run", cache, top_k=3)(block([4])))
        assert TopKLogprobs.decode(sent).ids.shape[1] == 3
    assert TopKLogprobs.decode(cache.read([4])[0]).ids.shape[1] == TOP_K
