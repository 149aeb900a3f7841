"""Every source on disk: the same data has the same identity anywhere, and its shards hold each record once."""

import json
import shutil

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_kd import plugins
from ray_kd.data.files import SHARD_RECORDS
from ray_kd.data.records import Record
from ray_kd.errors import ConfigError

KINDS = plugins.available("data.sources")
NUM_RECORDS = 2 * SHARD_RECORDS + 7


def jsonl(folder, texts):
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"paths": [str(folder / "*.jsonl")]}


def text(folder, texts):
    (folder / "a.txt").write_text("\n".join(texts))
    return {"paths": [str(folder / "a.txt")]}


def parquet(folder, texts):
    pq.write_table(pa.table({"text": texts}), folder / "a.parquet", row_group_size=3001)
    return {"paths": [str(folder)]}


def huggingface(folder, texts):
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(folder / "saved"))
    return {"path": str(folder / "saved")}


WRITERS = {"jsonl": jsonl, "text": text, "parquet": parquet, "huggingface": huggingface}


def build(kind, options):
    module, config = plugins.options("data.sources", {"kind": kind, **options}, "data.source")
    return module.Source(config)


def written(kind, folder, texts):
    folder.mkdir()
    return build(kind, WRITERS[kind](folder, texts))


def texts_of(source):
    records = [record for shard in source.shards() for record in source.read(json.loads(json.dumps(shard)))]
    assert all(isinstance(record, Record) and record.file for record in records)
    return records


def test_every_source_has_a_writer_here():
    assert set(WRITERS) == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_shards_hold_every_record_once_in_order(kind, tmp_path):
    texts = [f"record {number} ö" for number in range(NUM_RECORDS)]
    source = written(kind, tmp_path / "data", texts)
    records = texts_of(source)
    assert [record.data["text"] for record in records] == texts
    assert [record.line for record in records] == list(range(1, NUM_RECORDS + 1))
    assert 3 <= len(source.shards()) <= 4


@pytest.mark.parametrize("kind", KINDS)
def test_identity_is_the_content_and_not_the_place_or_the_time(kind, tmp_path):
    first = written(kind, tmp_path / "one", ["a", "b"])
    shutil.copytree(tmp_path / "one", tmp_path / "two", copy_function=shutil.copyfile)
    options = {key: value.replace("/one", "/two") if isinstance(value, str) else [v.replace("/one", "/two")
               for v in value] for key, value in WRITERS[kind](tmp_path / "one", ["a", "b"]).items()}  # fmt: skip
    assert build(kind, options).identity() == first.identity()
    assert json.loads(json.dumps(first.identity())) == first.identity()
    assert written(kind, tmp_path / "three", ["a", "c"]).identity() != first.identity()


@pytest.mark.parametrize("kind", KINDS)
def test_config_rebuilds_the_source_from_another_folder(kind, tmp_path, monkeypatch):
    source = written(kind, tmp_path / "data", ["a", "b"])
    monkeypatch.chdir(tmp_path)
    again = type(source)(source.config)
    assert [record.data for record in again.read(source.shards()[0])] == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_path_is_named(kind):
    options = {"path": "/nowhere/data"} if kind == "huggingface" else {"paths": ["/nowhere/data"]}
    with pytest.raises(ConfigError, match="/nowhere/data"):
        build(kind, options)
