"""Preparation on a real Ray: the same bytes on any number of tasks, found again, and refused by name."""

import dataclasses
import json
import logging
import re

import numpy as np
import pytest
import ray

from ray_kd import config, schema
from ray_kd.data.prepare import prepare
from ray_kd.errors import ConfigError, DataError
from tests.tiny import tiny_tokenizer

pytestmark = pytest.mark.ray

WORDS = ["teacher", "says", "what", "the", "student", "will", "learn", "to", "say", "on", "two", "small", "cores"]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A local Ray of this module's own, and a folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("prepare")
    tiny_tokenizer(folder / "tokenizer")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("RAY_AUTH_MODE", "disabled"), ("RAY_USAGE_STATS_ENABLED", "0"), ("HOME", str(folder))):
            patch.setenv(name, value)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield folder
        ray.shutdown()


def conversation(number):
    rng = np.random.default_rng(number)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(2, 12))) + f" {number}." for _ in range(2)]
    return {
        "messages": [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]
    }


@pytest.fixture(scope="module")
def records(workplace):
    """Three shards of records: some longer than a row, some twice, three that cannot be used."""
    lines = [json.dumps(conversation(number)) for number in range(4500)] + [json.dumps(conversation(0))] * 2
    lines += ["{broken", json.dumps({"messages": []}), json.dumps({"other": 1})]
    path = workplace / "train.jsonl"
    path.write_text("\n".join(lines))
    return path


def data(path, **settings):
    return config.Data(source={"kind": "jsonl", "paths": [str(path)]}, **{"sequence_length": 256} | settings)


def bytes_of(prepared):
    return {path.name: path.read_bytes() for path in sorted(prepared.folder.iterdir())}


def test_the_same_bytes_on_any_number_of_tasks_and_found_again(workplace, records, caplog):
    given = data(records, eval_fraction=0.05)
    tokenizer = str(workplace / "tokenizer")
    with caplog.at_level(logging.WARNING):
        one = prepare(
            given, tokenizer, None, 0, workplace / "one", workplace / "run" / "quarantine.jsonl", num_blocks=1
        )
    assert "2 documents repeat an earlier one" in caplog.text
    many = prepare(given, tokenizer, None, 0, workplace / "many", num_blocks=3)
    assert set(bytes_of(one)) == {"train-00000.parquet", "eval-00000.parquet", "quarantine.jsonl", "manifest.json"}
    assert bytes_of(one) == bytes_of(many)
    assert [path.name for path in (workplace / "many").iterdir()] == [many.folder.name]
    one.verify()

    manifest = one.manifest
    assert manifest.fingerprint.startswith(one.folder.name)
    assert (manifest.records_read, manifest.quarantined, manifest.duplicates) == (4505, 3, 2)
    assert manifest.documents + manifest.eval_documents == 4502
    assert manifest.packing_efficiency > 0.9
    train = schema.to_numpy(one.read_rows(np.arange(one.num_rows)))
    held_out = one.read_eval()
    for columns, tokens in ((train, manifest.target_tokens), (held_out, manifest.eval_target_tokens)):
        assert schema.target_positions(columns[schema.LABELS], columns[schema.POSITION_IDS]).sum() == tokens
    assert held_out["num_target_bytes"].sum() == manifest.eval_bytes
    assert held_out[schema.ROW_ID].tolist() == list(range(manifest.eval_rows))
    np.testing.assert_array_equal(one.read_eval(3)[schema.INPUT_IDS], held_out[schema.INPUT_IDS][:3])

    listed = (workplace / "run" / "quarantine.jsonl").read_text()
    assert listed == (one.folder / "quarantine.jsonl").read_text()
    assert [json.loads(line)["line"] for line in listed.splitlines()] == [4503, 4504, 4505]

    before = {path: path.stat().st_mtime_ns for path in one.folder.iterdir()}
    again = prepare(given, tokenizer, None, 0, workplace / "one", workplace / "later" / "quarantine.jsonl")
    assert {path: path.stat().st_mtime_ns for path in again.folder.iterdir()} == before
    assert (workplace / "later" / "quarantine.jsonl").read_text() == listed
    assert again.manifest == manifest


def test_an_eval_source_is_kept_apart_and_compared(workplace, tmp_path, caplog):
    for name, numbers in (("train", range(50)), ("eval", range(45, 60))):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(conversation(n)) for n in numbers))
    given = data(tmp_path / "train.jsonl", eval_source={"kind": "jsonl", "paths": [str(tmp_path / "eval.jsonl")]})
    with caplog.at_level(logging.WARNING):
        manifest = prepare(given, str(workplace / "tokenizer"), None, 0, tmp_path / "out").manifest
    assert (manifest.documents, manifest.eval_documents) == (50, 15)
    assert manifest.near_duplicates_train_eval == 5
    assert "5 of 15 eval documents resemble" in caplog.text


def test_each_route_has_rows_of_its_own_on_both_sides(workplace, tmp_path):
    values = {"train": ["maths", "chat", True], "eval": ["maths", "chat", True, "only eval"]}
    written_as = {"maths": "maths", "chat": "chat", True: "true", "only eval": "only eval"}
    route_of = {}
    for first, (name, domains) in enumerate(values.items()):
        lines = []
        for number in range(1000 * first, 1000 * first + 200):
            domain = domains[number % len(domains)]
            route_of[number] = written_as[domain]
            lines.append(json.dumps(conversation(number) | {"domain": domain}))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    given = data(
        tmp_path / "train.jsonl", eval_source={"kind": "jsonl", "paths": [str(tmp_path / "eval.jsonl")]},
        route_by="domain", sequence_length=512,
    )  # fmt: skip
    tokenizer = str(workplace / "tokenizer")
    one = prepare(given, tokenizer, None, 0, tmp_path / "one", num_blocks=1)
    assert bytes_of(one) == bytes_of(prepare(given, tokenizer, None, 0, tmp_path / "many", num_blocks=2))

    assert one.manifest.routes == ["chat", "maths", "only eval", "true"]
    sides = [schema.to_numpy(one.read_rows(np.arange(one.num_rows))), one.read_eval()]
    assert one.manifest.route_rows == np.bincount(sides[0][schema.ROUTE], minlength=4).tolist()
    assert one.manifest.route_rows[2] == 0
    numbers = set()
    for columns in sides:
        for ids, route in zip(columns[schema.INPUT_IDS], columns[schema.ROUTE], strict=True):
            said = {int(number) for number in re.findall(r"(\d+)\.", tiny_tokenizer().decode(ids))}
            assert {route_of[number] for number in said} == {one.manifest.routes[route]}
            numbers |= said
    assert numbers == set(route_of)

    plain = prepare(dataclasses.replace(given, route_by=None), tokenizer, None, 0, tmp_path / "plain")
    assert (plain.manifest.routes, plain.manifest.route_rows) == ([], [])
    assert plain.num_rows <= one.num_rows
    assert not plain.read_rows(np.arange(plain.num_rows))[schema.ROUTE].to_numpy().any()


@pytest.mark.parametrize("source", ["jsonl", "text"])
def test_a_route_that_no_record_has_is_one_line(workplace, tmp_path, source):
    (tmp_path / "lines").write_text("\n".join(json.dumps({"text": f"line {n}"}) for n in range(3)))
    given = config.Data(
        source={"kind": source, "paths": [str(tmp_path / "lines")]}, format={"kind": "text"}, route_by="domain"
    )
    with pytest.raises(
        DataError,
        match=r"^3 of 3 records .* first, .*lines:1: column 'domain' of data\.route_by is missing or null; .*l$",
    ):
        prepare(given, str(workplace / "tokenizer"), None, 0, tmp_path / "out")


def test_too_many_bad_records_are_listed_and_refused(workplace, tmp_path):
    lines = [json.dumps(conversation(0)), "{broken", *(json.dumps(conversation(n)) for n in range(1, 9))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    tokenizer, listed = str(workplace / "tokenizer"), tmp_path / "run" / "quarantine.jsonl"
    given = data(tmp_path / "train.jsonl")
    with pytest.raises(
        DataError, match=r"^1 of 10 records \(10.0%\).*train.jsonl:2: not JSON.*quarantine.jsonl$"
    ) as raised:
        prepare(given, tokenizer, None, 0, tmp_path / "out", listed)
    assert raised.value.exit_code == 65
    assert json.loads(listed.read_text())["line"] == 2
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(DataError, match=r"out/.*quarantine\.jsonl$"):
        prepare(given, tokenizer, None, 0, tmp_path / "out")
    # Allowed, prepared, and then asked for with a lower limit: the data is there, the answer is still no.
    assert prepare(data(tmp_path / "train.jsonl", max_bad_fraction=0.2), tokenizer, None, 0, tmp_path / "out").num_rows
    with pytest.raises(DataError, match=r"more than data\.max_bad_fraction=0\.05"):
        prepare(given, tokenizer, None, 0, tmp_path / "out", listed)


@pytest.mark.parametrize(
    ("lines", "settings", "error", "message"),
    [
        ([], {}, DataError, "data.source has no records"),
        (
            ["{}"],
            {"max_bad_fraction": 1.0},
            DataError,
            "1 of 1 records .* cannot be used; .*field 'messages' is missing",
        ),
        ([json.dumps(conversation(1))], {"eval_fraction": 0.001}, ConfigError, "leaves none for evaluation"),
        ([json.dumps(conversation(1))], {"eval_fraction": 0.999}, ConfigError, "leaves none to train on"),
    ],
)
def test_nothing_left_is_one_line(workplace, tmp_path, lines, settings, error, message):
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    with pytest.raises(error, match=message):
        prepare(data(tmp_path / "train.jsonl", **settings), str(workplace / "tokenizer"), None, 0, tmp_path / "out")


def test_errors_of_a_task_reach_the_user_as_they_are(workplace, tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "plain")
    (tmp_path / "train.jsonl").write_text(json.dumps(conversation(1)))
    with pytest.raises(ConfigError, match="no chat template"):
        prepare(data(tmp_path / "train.jsonl"), str(tmp_path / "plain"), None, 0, tmp_path / "out")
