import json
from pathlib import Path

import pytest

pytest.importorskip("chitchat_dataset")
pytest.importorskip("zaragoza_construction_faq")

from jobs.quickstart_inputs import write_data


def test_data_is_deterministic_held_out_and_written_once(tmp_path: Path) -> None:
    assert write_data(tmp_path / "a")
    assert not write_data(tmp_path / "a")
    assert write_data(tmp_path / "b")
    lines = {}
    for name in ("train.jsonl", "eval.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        lines[name] = (tmp_path / "a" / name).read_text(encoding="utf-8").splitlines()
    assert not set(lines["train.jsonl"]) & set(lines["eval.jsonl"])
    total = len(lines["train.jsonl"]) + len(lines["eval.jsonl"])
    assert 0.02 <= len(lines["eval.jsonl"]) / total <= 0.04
    for line in lines["train.jsonl"] + lines["eval.jsonl"]:
        messages = json.loads(line)["messages"]
        assert [message["role"] for message in messages] == ["user", "assistant"] * (len(messages) // 2)
        assert all(message["content"].strip() for message in messages)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"train.jsonl", "eval.jsonl"}
