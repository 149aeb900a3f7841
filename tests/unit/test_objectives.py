"""What the terms ask of the teacher and of the link, from the config and two config.json."""

import itertools
import json
import pickle
import subprocess
import sys
from dataclasses import replace

import pytest

from ray_kd import config, objectives, teacher_cache
from ray_kd.errors import ConfigError
from ray_kd.payloads import FeatureSpec, features, topk_logprobs
from ray_kd.teacher.mixture import mixed_width, parts
from ray_kd.trainer.feed import ExpectedFeatures
from tests.tiny import tiny_llama

TERMS = [
    "kd",
    {"kind": "hidden_state", "layers": [1], "mask": "attention"},
    {"kind": "hidden_state", "layers": [-1]},
    {"kind": "attention", "layers": [0], "heads": "mean"},
]
ASKED = FeatureSpec((2, 4), "attention", (1,), "targets", True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("objectives")
    tiny_llama(folder / "teacher", layers=4)
    tiny_llama(folder / "student", layers=2)
    return folder


@pytest.fixture
def load(models):
    def loaded(*overrides):
        base = [f"run.dir={models}/run", "data.source=jsonl", f"teacher.model={models}/teacher",
                f"student.model={models}/student", "teacher.top_k=16", "data.sequence_length=32"]  # fmt: skip
        return config.load(None, [*base, *overrides])

    return loaded


def with_features(load, *overrides):
    return load("teacher.payload=features", f"loss.terms={json.dumps(TERMS)}", *overrides)


def test_the_teacher_is_asked_once_for_all_terms(load):
    one = with_features(load)
    assert objectives.asked_features(one) == ASKED
    assert teacher_cache.asked_of_teacher(one).features == ASKED
    assert objectives.expected_features(one) == ExpectedFeatures(ASKED, width=64, num_heads=4)
    assert objectives.planned_nbytes_per_token(one) == features.nbytes_per_token(
        ASKED, top_k=16, vocab_size=259, width=64, num_heads=4, sequence_length=32
    )


def test_a_student_of_some_of_the_teachers_layers_has_that_many(load):
    made = with_features(load, "student.model=null", "student.init.layers=2")
    assert objectives.asked_features(made) == ASKED
    made = with_features(load, "student.model=null", "student.init.layers=[0, 2]")
    of_origin = replace(ASKED, hidden_layers=(1, 4), attention_layers=(0,))
    assert objectives.asked_features(made) == of_origin


def test_without_feature_terms_no_model_is_read(load):
    plain = load("teacher.model=/no/such", "student.model=/none")
    assert objectives.features_of(plain)() == {}
    assert objectives.expected_features(plain) is None
    assert teacher_cache.asked_of_teacher(plain).features is None


def test_what_the_workers_get_is_light(load):
    """Ray Train's worker starts the stream first: nothing before that may import torch."""
    sent = pickle.dumps(objectives.features_of(with_features(load)))
    code = f"import pickle, sys; pickle.loads({sent!r}); print({{'torch', 'transformers'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    assert list(pickle.loads(sent)()) == ["hidden_state_1", "hidden_state_2", "attention"]


@pytest.mark.parametrize(
    ("temperature", "asked"),
    [("2.0", 2.0), ("{schedule: constant, start: 3}", 3.0),
     ("{schedule: linear, start: 4, end: 2, steps: 9}", 1.0)],
)  # fmt: skip
def test_the_teacher_answers_at_one_temperature(load, temperature, asked):
    one = load(f"loss.temperature={temperature}")
    assert objectives.payload_temperature(one) == asked
    assert teacher_cache.asked_of_teacher(one).temperature == asked


@pytest.mark.parametrize("rows", itertools.product([None, ["a"], ["a", "b"], ["c"]], repeat=2))
@pytest.mark.parametrize("top_k", [8, 30, 40])
def test_the_width_of_a_mixture_is_known_before_its_data(rows, top_k):
    """Of data with all the routes that a teacher takes, and one that only those for all rows do."""
    routes = sorted({route for own in rows for route in own or []}) + (["other"] if None in rows else [])
    known = parts(["one", "two"], [1.0, 1.0], rows, routes, top_k, vocab_size=40)[0].width
    assert mixed_width(rows, top_k, 40) == known
    assert topk_logprobs.nbytes_per_token(known, 40) > 0


def test_terms_are_idle_until_their_weight_begins_to_grow(load):
    growing = "{schedule: cosine, start: 0, end: 1, steps: 10, from_step: 5}"
    falling = "{schedule: linear, start: 1, end: 0, steps: 1}"
    loaded = load(f"loss.terms=[{{kind: kd, weight: {growing}}}, {{kind: ce, weight: {falling}}}]")
    assert [objectives.idle_terms(loaded, steps) for steps in (1, 5, 6, None)] == [
        ["loss.terms[0]"], ["loss.terms[0]"], [], []
    ]  # fmt: skip
    alone = load(f"loss.terms=[{{kind: kd, weight: {growing}}}]")
    assert objectives.idle_terms(alone, None) == []
    with pytest.raises(ConfigError, match=r"all weights are 0 at each of the run's 5 steps"):
        objectives.idle_terms(alone, 5)
