"""The teacher stage as a plain callable: the wire it was told to use, and what it leaves alone."""

import numpy as np
import pyarrow as pa
import pytest

from ray_kd import schema
from ray_kd.payloads import TopKLogprobs
from ray_kd.teacher.engine import Request
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
