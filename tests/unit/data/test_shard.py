"""One shard from records to a file of rows, without Ray: quarantine, splits, the eval side; then shuffled and read."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import uuid

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_kd import config, schema, storage
from ray_kd.data.files import SHARD_RECORDS
from ray_kd.data.manifest import MANIFEST_NAME, Manifest, PreparedFile, is_intact, report
from ray_kd.data.order import SlotOrder
from ray_kd.data.packing import has_target
from ray_kd.data.plan import plan_preparation
from ray_kd.data.prepared import NUM_TARGET_BYTES, ROWS_PER_FILE, ROWS_PER_GROUP, PreparedData, arrow_schema
from ray_kd.data.records import Document
from ray_kd.data.shard import bad_path, hash_text, is_held_out, part_path, prepare_shard, sketch
from ray_kd.data.shuffle import plan_files, write_file
from ray_kd.data.stream import read_slots
from ray_kd.errors import ConfigError, DataError, RetryableError
from tests.tiny import tiny_tokenizer

T = 32
NUM_DOCUMENTS = SHARD_RECORDS + 100


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    """Write lines of JSONL and return the data section that reads them as plain text."""

    def write(*lines, **settings):
        path = tmp_path / "data.jsonl"
        path.write_bytes(b"".join((x if isinstance(x, bytes) else json.dumps(x).encode()) + b"\n" for x in lines))
        source = {"kind": "jsonl", "paths": [str(path)]}
        return config.Data(**{"source": source, "format": {"kind": "text"}, "sequence_length": T} | settings)

    return write


def run(data, tokenizer_path, folder, shard=0):
    plan = plan_preparation(data, tokenizer_path, None, seed=0)
    (folder / "parts").mkdir(exist_ok=True)
    return prepare_shard(shard, *plan.shards[shard], plan.task, str(folder))


def quarantined(folder):
    return [json.loads(line) for line in bad_path(folder, 0).read_text().splitlines()]


def test_refused_records_are_listed_with_file_line_and_reason(data, tokenizer_path, tmp_path):
    given = data(
        {"text": "fine"}, b"{bad json", {"other": 1}, {"text": "  "}, b'{"text": "\xff"}', b'{"text": "\\ud800"}',
        b"[]", {"text": "x" * 1000 + "\ud800"},
    )  # fmt: skip
    result = run(given, tokenizer_path, tmp_path)
    listed = quarantined(tmp_path)
    assert [(r["line"], r["reason"].split(":")[0]) for r in listed] == [
        (2, "not JSON"),
        (3, "field 'text' is missing"),
        (4, "field 'text' is empty"),
        (5, "not UTF-8"),
        (6, r"text holds a lone surrogate '\ud800'"),
        (7, "not a JSON object but list"),
        (8, r"text holds a lone surrogate '\ud800'"),
    ]
    assert all(set(r) == {"file", "line", "reason", "excerpt"} and len(r["excerpt"]) <= 200 for r in listed)
    assert {r["file"] for r in listed} == {given.source["paths"][0]}
    assert (result.counts["records_read"], result.counts["quarantined"]) == (8, 7)
    assert result.counts["train_documents"] == 1


def test_records_with_nothing_to_train_on_are_refused(data, tokenizer_path, tmp_path):
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    given = data({"messages": [user]}, {"messages": [user, assistant]}, format={"kind": "messages"})
    run(given, tokenizer_path, tmp_path)
    assert [(r["line"], r["reason"]) for r in quarantined(tmp_path)] == [
        (1, "nothing to train on: no assistant message")
    ]


def test_a_tokenizer_that_cannot_serve_the_format_stops_everything(data, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    with pytest.raises(ConfigError, match="no chat template"):
        run(data({"messages": []}, format={"kind": "messages"}), str(tmp_path / "plain"), tmp_path)


def test_routes_are_text_and_records_without_one_are_refused(data, tokenizer_path, tmp_path):
    values = ["b", True, 7, "true", "7", " b", 1.5, None, ["b"], {"b": 1}, "\ud800"]
    records = [{"text": f"document {n}", "domain": value} for n, value in enumerate(values)] + [{"text": "no domain"}]
    result = run(data(*records, route_by="domain"), tokenizer_path, tmp_path)
    assert result.route_rows == {"train": {" b": 1, "7": 1, "b": 1, "true": 1}, "eval": {}}
    of_column = "column 'domain' of data.route_by is"
    assert [(r["line"], r["reason"]) for r in quarantined(tmp_path)] == [
        (7, f"{of_column} float: allowed is str, int, bool"),
        (8, f"{of_column} missing or null"),
        (9, f"{of_column} list: allowed is str, int, bool"),
        (10, f"{of_column} dict: allowed is str, int, bool"),
        (11, r"text holds a lone surrogate '\ud800'"),
        (12, f"{of_column} missing or null"),
    ]


def test_long_documents_are_split_and_counted(data, tokenizer_path, tmp_path):
    result = run(data({"text": "x" * 100}, {"text": "short"}), tokenizer_path, tmp_path)
    assert result.counts["split_documents"] == 1
    # 101 tokens with eos: 32, then 31 new ones a piece, so 4 pieces and 3 repeated tokens.
    assert result.counts["repeated_tokens"] == 3
    assert result.counts["train_tokens"] == 101 + 3 + 6
    assert result.counts["dropped_tokens"] == 0


def test_hashes_ignore_case_punctuation_and_spacing_only():
    assert hash_text("Hello,  World!") == hash_text("hello world\n")
    assert hash_text("hello world") != hash_text("hello word")
    assert hash_text("?!") != hash_text("!!")


def test_the_eval_side_holds_its_fraction_and_all_copies_of_a_document(data, tokenizer_path, tmp_path):
    texts = [{"text": f"text {n}"} for n in range(1000)]
    result = run(data(*texts, *texts[:300], eval_fraction=0.2), tokenizer_path, tmp_path)
    train, held_out = set(result.hashes["train"]), set(result.hashes["eval"])
    assert not train & held_out
    assert len(train | held_out) == 1000
    assert 150 < len(held_out) < 250
    assert part_path(tmp_path, "eval", 0).stat().st_size == result.counts["eval_rows"] * (3 * T + 1) * 4
    assert not any(is_held_out(n, 0, 0.0) for n in range(100))


def test_sketches_agree_for_texts_that_are_almost_the_same():
    rng = np.random.default_rng(0)

    def of(ids):
        return sketch(Document(ids, np.ones(len(ids), np.bool_), np.zeros(len(ids), np.int32)))

    agree = {"almost": 0, "other": 0}
    for _ in range(100):
        ids = rng.integers(0, 50_000, 400).astype(np.int32)
        changed = ids.copy()
        changed[0] += 1
        agree["almost"] += of(ids) == of(changed)
        agree["other"] += of(ids) == of(rng.integers(0, 50_000, 400).astype(np.int32))
    assert agree["almost"] > 90
    assert agree["other"] == 0


def test_a_first_token_is_no_target():
    assert not has_target(Document(np.array([1], np.int32), np.array([True]), np.array([1], np.int32)))


def written(data, tokenizer_path, folder):
    """Everything of a preparation but Ray, in this process."""
    plan = plan_preparation(data, tokenizer_path, None, seed=0)
    storage.make_folder(folder / "parts")
    results = [prepare_shard(i, *s, plan.task, str(folder)) for i, s in enumerate(plan.shards)]
    routes = sorted({route for result in results for route in result.route_rows["train"]})
    files = plan_files("train", [result.route_rows["train"] for result in results], routes, seed=0)
    done = [write_file(file, str(folder), T) for file in files]
    numbers = {name: 0 for name, f in Manifest.__dataclass_fields__.items() if f.type in (int, float)}
    manifest = Manifest(**numbers | {
        "fingerprint": plan.fingerprint, "sequence_length": T, "num_rows": sum(d.rows for d in done),
        "files": [PreparedFile(f.name, d.rows, d.nbytes, d.sha256) for f, d in zip(files, done, strict=True)],
        "eval_files": [], "routes": routes, "route_rows": [],
    })  # fmt: skip
    storage.write_text(folder / MANIFEST_NAME, manifest.to_json())
    return PreparedData(folder), done


def test_in_an_object_store_the_same_bytes_come_out(object_store, tokenizer_path, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps({"text": f"document {n}"}) for n in range(40)))
    source = {"kind": "jsonl", "paths": [str(tmp_path / "data.jsonl")]}
    given = config.Data(source=source, format={"kind": "text"}, sequence_length=T)
    there = storage.path(f"{object_store.uri}/{uuid.uuid4().hex}/prepared")
    here, expected = written(given, tokenizer_path, tmp_path / "out")
    away, done = written(given, tokenizer_path, there)
    assert done == expected
    assert away.manifest == here.manifest
    assert is_intact(there, here.manifest.fingerprint)
    ids = np.arange(here.num_rows)[::-1]
    assert away.read_rows(ids).equals(here.read_rows(ids))
    away.verify()

    (there / here.manifest.files[0].name).write_bytes(b"0" * here.manifest.files[0].nbytes)
    with pytest.raises(DataError, match="is not what its manifest says"):
        away.verify()
    shutil.rmtree(tmp_path / f"ray_kd-{os.getuid()}")
    with pytest.raises(RetryableError, match="did not arrive as its manifest says"):
        PreparedData(there).read_rows(ids)
    (there / here.manifest.files[0].name).unlink()
    assert not is_intact(there, here.manifest.fingerprint)


@pytest.fixture(scope="module")
def prepared(tokenizer_path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("many")
    lines = (json.dumps({"text": f"document {n} of many, many"}) for n in range(NUM_DOCUMENTS))
    (folder / "data.jsonl").write_text("\n".join(lines))
    source = {"kind": "jsonl", "paths": [str(folder / "data.jsonl")]}
    given = config.Data(source=source, format={"kind": "text"}, sequence_length=T)
    return written(given, tokenizer_path, folder / "out")


def test_rows_are_numbered_shuffled_and_all_there(prepared):
    rows, done = prepared
    columns = schema.to_numpy(rows.read_rows(np.arange(rows.num_rows)))
    assert columns[schema.ROW_ID].tolist() == list(range(rows.num_rows))
    tokenizer = tiny_tokenizer()
    said = [int(n) for ids in columns[schema.INPUT_IDS] for n in re.findall(r"document (\d+)", tokenizer.decode(ids))]
    assert sorted(said) == list(range(NUM_DOCUMENTS))
    assert np.corrcoef(said, np.arange(len(said)))[0, 1] < 0.1
    targets = schema.target_positions(columns[schema.LABELS], columns[schema.POSITION_IDS]).sum(axis=1)
    assert targets.min() > 0
    assert sum(d.target_tokens for d in done) == targets.sum()
    assert max(d.max_targets for d in done) == targets.max()
    assert sum(d.target_bytes for d in done) == columns[NUM_TARGET_BYTES].sum()


def test_many_rows_are_shuffled_into_files_of_one_size(tmp_path):
    length, counts = 4, [9000, 0, ROWS_PER_FILE, 10]
    (tmp_path / "parts").mkdir()
    first = 0
    for index, count in enumerate(counts):
        rows = np.zeros((count, 3 * length + 1), np.int32)
        rows[:, 0] = np.arange(first, first + count)
        rows[:, length : 2 * length] = 1
        rows[:, 2 * length : 3 * length] = np.arange(length)
        rows.tofile(part_path(tmp_path, "train", index))
        first += count
    of_parts = [{"a": count // 3, "b": count - count // 3} for count in counts]
    files = plan_files("train", of_parts, ["a", "b"], seed=3)
    done = [write_file(file, str(tmp_path), length) for file in files]
    assert [file.rows for file in done] == [ROWS_PER_FILE, sum(counts) - ROWS_PER_FILE]
    assert {file.max_targets for file in done} == {length - 1}
    tables = [pq.read_table(tmp_path / file.name) for file in files]
    columns = schema.to_numpy(pa.concat_tables(tables))
    assert columns[schema.ROW_ID].tolist() == list(range(sum(counts)))
    came_from = columns[schema.INPUT_IDS][:, 0]
    assert sorted(came_from) == list(range(sum(counts)))
    assert abs(np.corrcoef(came_from, np.arange(sum(counts)))[0, 1]) < 0.03
    is_b = np.concatenate([np.arange(count) >= count // 3 for count in counts])
    np.testing.assert_array_equal(columns[schema.ROUTE], is_b[came_from])
    assert pq.ParquetFile(tmp_path / files[0].name).metadata.row_group(0).num_rows == ROWS_PER_GROUP
    again = plan_files("train", of_parts, ["a", "b"], seed=4)
    assert not np.array_equal(again[0].rows, files[0].rows)


def test_documents_of_different_routes_share_no_row(tokenizer_path, tmp_path):
    domains = ["c", "b"] * (SHARD_RECORDS // 2) + ["a", "c"] * 50  # so that an index in a shard is none in the data
    lines = [json.dumps({"text": f"{domain} {n}", "domain": domain}) for n, domain in enumerate(domains)]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    source = {"kind": "jsonl", "paths": [str(tmp_path / "data.jsonl")]}
    given = config.Data(source=source, format={"kind": "text"}, sequence_length=T, route_by="domain")
    rows, _ = written(given, tokenizer_path, tmp_path / "out")
    columns = schema.to_numpy(rows.read_rows(np.arange(rows.num_rows)))
    assert columns[schema.ROUTE].dtype == np.int32
    found = []
    for ids, route in zip(columns[schema.INPUT_IDS], columns[schema.ROUTE], strict=True):
        said = re.findall(r"([abc]) (\d+)", tiny_tokenizer().decode(ids))
        assert {domain for domain, _ in said} == {"abc"[route]}
        found += [int(number) for _, number in said]
    assert sorted(found) == list(range(len(domains)))

    order = SlotOrder(rows.num_rows, global_batch_size=rows.num_rows + 3, epochs=1, max_steps=None, seed=0)
    slots = schema.to_numpy(read_slots(order, rows, 0, order.num_slots))
    row_ids = np.maximum(slots[schema.ROW_ID], 0)  # dummies are row 0
    np.testing.assert_array_equal(slots[schema.ROUTE], columns[schema.ROUTE][row_ids])


def test_target_bytes_are_those_of_the_decoded_targets(prepared):
    columns = schema.to_numpy(prepared[0].read_rows(np.arange(50)))
    mask = schema.target_positions(columns[schema.LABELS], columns[schema.POSITION_IDS])
    for targets, labels, nbytes in zip(mask, columns[schema.LABELS], columns[NUM_TARGET_BYTES], strict=True):
        text = tiny_tokenizer().decode(schema.next_labels(labels)[targets], skip_special_tokens=True)
        assert nbytes == len(text.encode())


def test_rows_come_in_the_order_asked_from_a_pickled_reader(prepared):
    rows = pickle.loads(pickle.dumps(prepared[0]))
    asked = np.array([5, 2 * ROWS_PER_GROUP + 1, 5, ROWS_PER_GROUP, 0, rows.num_rows - 1])
    table = rows.read_rows(asked)
    assert table.schema == arrow_schema(T)
    assert table[schema.ROW_ID].to_pylist() == asked.tolist()
    columns = schema.to_numpy(table)
    assert columns[schema.INPUT_IDS].shape == (6, T)
    assert columns[schema.INPUT_IDS].dtype == np.int32
    np.testing.assert_array_equal(columns[schema.INPUT_IDS][0], columns[schema.INPUT_IDS][2])
    assert rows.read_rows(np.arange(0)).num_rows == 0
    for outside in (-1, rows.num_rows):
        with pytest.raises(IndexError):
            rows.read_rows(np.array([outside]))
    with pytest.raises(IndexError):
        rows.read_rows(np.array([0]), split="eval")


def test_without_eval_data_the_arrays_are_empty(prepared):
    assert prepared[0].read_eval(10)[schema.INPUT_IDS].shape == (0, T)


def test_damage_is_found(data, tokenizer_path, tmp_path):
    rows, _ = written(data({"text": "one"}, {"text": "two"}), tokenizer_path, tmp_path / "out")
    fingerprint = rows.manifest.fingerprint
    rows.verify()
    assert is_intact(rows.folder, fingerprint)
    assert not is_intact(rows.folder, "another")
    path = rows.folder / "train-00000.parquet"
    content = bytearray(path.read_bytes())
    content[10] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="train-00000"):
        rows.verify()
    path.write_bytes(content[:-1])
    assert not is_intact(rows.folder, fingerprint)
    (rows.folder / MANIFEST_NAME).write_text("{}")
    assert not is_intact(rows.folder, fingerprint)
    with pytest.raises(DataError, match="manifest"):
        PreparedData(rows.folder)


def test_the_fingerprint_follows_what_determines_the_rows(data, tokenizer_path):
    def fingerprint(seed=0, **settings):
        return plan_preparation(data({"text": "a"}, **settings), tokenizer_path, None, seed).fingerprint

    first = fingerprint()
    assert fingerprint(max_bad_fraction=0.5, prepared_dir="elsewhere") == first
    changed = [
        fingerprint(seed=1),
        fingerprint(sequence_length=T + 1),
        fingerprint(eval_fraction=0.1),
        fingerprint(format={"kind": "text", "column": "b"}),
        fingerprint(format={"kind": "messages"}),
        fingerprint(route_by="domain"),
    ]
    assert len({first, *changed}) == 7


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eval_fraction": 0.1, "eval_source": {"kind": "jsonl", "paths": ["x"]}}, "at most one"),
        ({"eval_fraction": 1.0}, "below 1"),
        ({"sequence_length": 1}, "2 or more"),
    ],
)
def test_settings_out_of_range_are_config_errors(data, tokenizer_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        plan_preparation(data({"text": "a"}, **settings), tokenizer_path, None, 0)


def test_the_report_is_a_few_lines_whatever_the_routes_are(prepared):
    manifest = dataclasses.replace(prepared[0].manifest, routes=[], route_rows=[])
    assert 2 <= len(report(manifest).splitlines()) <= 4
    routed = dataclasses.replace(manifest, routes=["chat", "maths"], route_rows=[1200, 0])
    assert report(routed).splitlines()[2] == "routes: chat 1,200 rows, maths 0 rows"
    routed = dataclasses.replace(manifest, routes=[f"a\n{n}" for n in range(1000)], route_rows=[1] * 1000)
    line = report(routed).splitlines()[2]
    assert re.fullmatch(r"routes: a 0 1 rows, a 1 1 rows, .* \.\.\.", line)
    assert len(line) <= 300
