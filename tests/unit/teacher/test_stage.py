"""The teacher stage as a plain callable: the wire it was told to use, and what it leaves alone."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ray_kd import schema
from ray_kd.payloads import TopKLogprobs
from ray_kd.ray_metrics import Exporter
from ray_kd.teacher.engine import Request
from ray_kd.teacher.journal import read_journal
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from tests.fake_prepared import random_rows

VOCAB = 259


def block(num_rows, length):
    columns = random_rows(num_rows, length, VOCAB)
    lists = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(columns[name].reshape(-1)), length)
        for name in (schema.INPUT_IDS, schema.LABELS, schema.POSITION_IDS)
    }
    weight = np.ones(num_rows, np.float32)
    weight[-1] = 0.0
    slots = {schema.SLOT: pa.array(np.arange(num_rows)), schema.WEIGHT: pa.array(weight)}
    return pa.table({schema.ROW_ID: pa.array(np.arange(num_rows)), **lists, **slots})


@pytest.mark.parametrize(("wire", "magic"), [("plain", b"RKTK"), ("compact", b"RKTC")])
def test_answers_travel_on_the_wire_that_was_asked_for(tmp_path, wire, magic):
    spec = EngineSpec({"kind": "fake", "vocab_size": VOCAB}, "teacher", None, "auto", 2, num_gpus=0, threads=1)
    rows = TeacherStage(spec, Request(top_k=16), str(tmp_path), wire)(block(3, 128))
    payloads = rows.column(schema.TEACHER_PAYLOAD).to_pylist()
    assert [payload[:4] for payload in payloads] == [magic, magic, b""]
    assert TopKLogprobs.decode(payloads[0]).ids.shape[1] == 16


def test_prometheus_is_told_of_a_blocks_work(tmp_path):
    sent = []
    spec = EngineSpec({"kind": "fake", "vocab_size": VOCAB}, "teacher", None, "auto", 2, num_gpus=0, threads=1)
    stage = TeacherStage(spec, Request(top_k=16), str(tmp_path / "mine"))
    stage._exporter = Exporter(
        "mine", lambda metric, value, tags: sent.append((metric.name, value, tags)), pool="teacher"
    )
    stage(block(3, 128))
    stage(block(3, 128))
    (line, other) = read_journal(tmp_path / "mine")
    totals = {}
    for name, value, tags in sent:
        assert tags.items() <= {"run": "mine", "pool": "teacher", "teacher": ""}.items()
        totals[name] = totals.get(name, 0) + value
    assert totals["raykd_teacher_rows_computed_total"] == len(line["slots"]) + len(other["slots"]) == 4
    assert totals["raykd_teacher_busy_seconds_total"] == pytest.approx(line["busy_s"] + other["busy_s"], abs=1e-5)
    assert totals["raykd_teacher_idle_seconds_total"] == pytest.approx(line["idle_s"] + other["idle_s"], abs=1e-5)
    assert totals.get("raykd_tokens_total", 0) == line["tokens"] + other["tokens"]
    assert "raykd_teacher_rows_from_cache_total" not in totals


HANGS = """
import sys, time
import torch  # loading it is no part of the engine's seconds
from ray_kd.teacher.stage import EngineSpec, TeacherStage
from ray_kd.teacher.engine import Request
from tests.unit.teacher.test_stage import VOCAB, block

spec = EngineSpec({"kind": "fake", "vocab_size": VOCAB}, "teacher", None, "auto", 2, num_gpus=0, threads=1, timeout_s=5)
stage = TeacherStage(spec, Request(top_k=16), sys.argv[1])
stage(block(3, 128))
time.sleep(5.5)  # between two blocks it may wait for ever
stage._engine().annotate = lambda rows, request: time.sleep(60)
print("alive", flush=True)
stage(block(3, 128))
print("never", flush=True)
"""


def test_a_block_that_takes_too_long_ends_the_actor_with_its_stack(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parents[3], env=os.environ | {"PYTHONPATH": "."},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "alive\n")
    assert done.stderr.startswith("Timeout (0:00:05)!")
    assert "in <lambda>" in done.stderr
