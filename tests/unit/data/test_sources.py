"""What files may hold: bad lines are named with their place, good ones beside them are kept."""

import gzip

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ray_kd.data.files import SHARD_RECORDS, expand
from ray_kd.data.records import BadRecord, Record
from ray_kd.data.sources import huggingface, jsonl, parquet, text
from ray_kd.errors import ConfigError


def read(source):
    return [record for shard in source.shards() for record in source.read(shard)]


def test_bad_lines_of_jsonl_are_named_and_good_ones_kept(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [b'\xef\xbb\xbf{"a": 1}\r', b"", b"{broken", b'"text"', b'{"a": "\xff"}', b"[" * 100_000, b'{"a": 2}']
    path.write_bytes(b"\n".join(lines))
    records = read(jsonl.Source(jsonl.Config([str(path)])))
    assert [(r.line, r.data) for r in records if isinstance(r, Record)] == [(1, {"a": 1}), (7, {"a": 2})]
    bad = {r.line: r for r in records if isinstance(r, BadRecord)}
    reasons = {
        3: "not JSON: Expecting",
        4: "not a JSON object but str",
        5: "not UTF-8: invalid",
        6: "not readable JSON",
    }
    assert {line: bad[line].reason.startswith(reason) for line, reason in reasons.items()} == dict.fromkeys(bad, True)
    assert all(r.file == str(path) and len(r.excerpt) <= 200 and "\n" not in r.reason for r in bad.values())


def test_paths_may_be_patterns_and_folders(tmp_path, monkeypatch):
    for name in ("b.jsonl", "a.jsonl", "c.txt", ".hidden.jsonl"):
        (tmp_path / name).write_text("{}\n")
    monkeypatch.chdir(tmp_path)
    assert expand(["*.jsonl"]) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert expand([str(tmp_path)]) == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.txt")]
    for missing in (["*.json"], ["d.txt"], []):
        with pytest.raises(ConfigError):
            expand(missing)


def test_small_files_share_a_shard_and_large_ones_are_cut(tmp_path):
    for number in range(30):
        (tmp_path / f"{number:02d}.jsonl").write_text("{}\n" * 100)
    assert len(jsonl.Source(jsonl.Config([str(tmp_path)])).shards()) == 2
    (tmp_path / "99.jsonl").write_text("{}\n" * (3 * SHARD_RECORDS))
    source = jsonl.Source(jsonl.Config([str(tmp_path)]))
    assert len(source.shards()) == 5
    assert len(read(source)) == 30 * 100 + 3 * SHARD_RECORDS


def test_long_records_make_small_shards(tmp_path):
    (tmp_path / "a.txt").write_text(("x" * 1000 + "\n") * 5000)
    source = text.Source(text.Config([str(tmp_path / "a.txt")]))
    assert len(source.shards()) == 3
    assert len(read(source)) == 5000


def test_compressed_files_are_refused(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(ConfigError, match="gunzip"):
        jsonl.Source(jsonl.Config([str(tmp_path)])).identity()


@pytest.mark.parametrize(
    ("sample_by", "expected"),
    [
        ("line", [(1, "one"), (2, "two"), (5, "three")]),
        ("paragraph", [(1, "one\ntwo"), (5, "three")]),
        ("document", [(1, "one\ntwo\n\n \nthree")]),
    ],
)
def test_text_by_line_paragraph_and_document(tmp_path, sample_by, expected):
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n")
    records = read(text.Source(text.Config([str(tmp_path / "a.txt")], sample_by)))
    assert [(r.line, r.data["text"]) for r in records] == expected


def test_paragraphs_are_never_cut(tmp_path):
    paragraphs = [f"{n}\nmore of {n}" for n in range(SHARD_RECORDS + 10)]
    (tmp_path / "a.txt").write_text("\n\n\n".join(paragraphs))
    source = text.Source(text.Config([str(tmp_path / "a.txt")], "paragraph"))
    assert [r.data["text"] for r in read(source)] == paragraphs
    assert len(source.shards()) == 2


def test_text_that_is_not_utf8_is_named(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    fine, bad = read(text.Source(text.Config([str(tmp_path / "a.txt")])))
    assert isinstance(fine, Record)
    assert isinstance(bad, BadRecord)
    assert (bad.line, bad.reason) == (2, "not UTF-8: invalid start byte at byte 0")
    with pytest.raises(ConfigError, match="sample_by"):
        text.Source(text.Config([str(tmp_path / "a.txt")], "word"))


def test_large_row_groups_are_cut_and_columns_chosen(tmp_path):
    path = tmp_path / "a.parquet"
    rows = 5 * SHARD_RECORDS + 3
    pq.write_table(pa.table({"a": range(rows), "b": range(rows)}), path, row_group_size=rows - 100)
    source = parquet.Source(parquet.Config([str(path)], ["a"]))
    assert [(r.line, r.data) for r in read(source)] == [(n + 1, {"a": n}) for n in range(rows)]
    assert len(source.shards()) > 4
    with pytest.raises(ConfigError, match="no column 'c'; it has a, b"):
        parquet.Source(parquet.Config([str(path)], ["c"])).shards()


def test_what_is_not_parquet_is_named(tmp_path):
    (tmp_path / "a.parquet").write_text("no")
    with pytest.raises(ConfigError, match=r"a\.parquet' is not a Parquet file"):
        parquet.Source(parquet.Config([str(tmp_path)])).shards()


def test_huggingface_reads_folders_of_files_and_names_a_missing_split(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"a": 1}\n{"a": 2}\n')
    source = huggingface.Source(huggingface.Config(str(tmp_path / "data")))
    assert [r.data for r in read(source)] == [{"a": 1}, {"a": 2}]
    with pytest.raises(ConfigError, match="split dev"):
        huggingface.Source(huggingface.Config(str(tmp_path / "data"), split="dev"))
