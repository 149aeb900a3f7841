"""The list of terms: names, weights over the steps, what is refused of it, and where layers are found."""

import pytest

from ray_kd.errors import ConfigError
from ray_kd.losses.layer_map import ModelShape
from ray_kd.losses.terms import Factors, Schedules, loss_name, parse_terms, resolve

FALLING = {"schedule": "linear", "start": 1.0, "end": 0.0, "steps": 4}


def test_terms_keep_their_order_and_are_numbered_where_there_are_several():
    entries = parse_terms(
        [{"kind": "hidden_state", "layers": [1]}, "ce", {"kind": "hidden_state", "layers": [2]}, "attention", "kd"]
    )
    assert [entry.name for entry in entries] == ["hidden_state_1", "ce", "hidden_state_2", "attention", "kd"]
    assert [entry.is_feature for entry in entries] == [True, False, True, True, False]
    assert [loss_name(entry.name) for entry in entries] == [
        "hidden_state_loss_1", "ce_loss", "hidden_state_loss_2", "attention_loss", "kd_loss",
    ]  # fmt: skip
    assert [entry.weight(1) for entry in entries] == [1.0] * 5
    assert entries[2].key == "loss.terms[2]"


def test_factors_follow_the_step_and_only_what_changes_is_logged():
    entries = parse_terms([{"kind": "kd", "weight": 2}, {"kind": "ce", "weight": FALLING}])
    over_steps = Schedules.of(entries, {"schedule": "cosine", "start": 4.0, "end": 1.0, "steps": 2})
    assert over_steps.at(1) == Factors(4.0, {"kd": 2.0, "ce": 1.0})
    assert over_steps.at(3) == Factors(1.0, {"kd": 2.0, "ce": 0.5})
    assert over_steps.at(3).weight("attention") == 0.0
    assert over_steps.metrics(2) == {"train/temperature": 2.5, "train/weight/ce": 0.75}
    assert Schedules.of(parse_terms(["kd"]), 2.0).metrics(1) == {}


def test_a_weight_that_is_zero_at_first_is_trained_later():
    (entry,) = parse_terms([{"kind": "ce", "weight": FALLING | {"start": 0.0, "end": 1.0}}])
    assert entry.weight.values == (0.0, 1.0)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "^loss.terms: it is empty: nothing would be trained"),
        ([{"kind": "kd", "weight": 0}, {"kind": "ce", "weight": 0}], "^loss.terms: all weights are 0"),
        (["kd", "kd"], "^loss.terms has several terms of kind 'kd': allowed is one"),
        ([{"kind": "ce"}, "ce"], "^loss.terms has several terms of kind 'ce'"),
        (["kd", {"kind": "mine.kd", "weight": 7}], "^loss.terms has several terms of kind 'kd'"),
        ([{"kind": "mine.kd"}], r"^loss.terms\[0\]: a kind 'mine.kd' would be named 'kd'"),
        ([3], r"^loss.terms\[0\] is 3: allowed is {kind: ..., weight: ..., options}. Available: kd, ce, attention"),
        ([{"weight": 1}], r"^loss.terms\[0\] is {'weight': 1}: allowed is"),
        (["kdd"], r"^loss.terms\[0\]: unknown kind 'kdd'; did you mean 'kd'\? Available: kd, ce, attention, hidden"),
        (
            [{"kind": "kd", "wieght": 1}],
            r"^loss.terms\[0\]: unknown option 'wieght' of kind 'kd'; did you mean 'weight'",
        ),
        (["kd", {"kind": "ce", "weight": -1}], r"^loss.terms\[1\].weight is -1: allowed is 0 or more"),
        ([{"kind": "ce", "weight": FALLING | {"end": -0.5}}], r"^loss.terms\[0\].weight is -0.5: allowed is 0 or more"),
        ([{"kind": "ce", "weight": "much"}], r"^loss.terms\[0\].weight is 'much': allowed is a number"),
        ([{"kind": "hidden_state", "layer": [1]}], r"^loss.terms\[0\]: unknown option 'layer'.*did you mean 'layers'"),
        ([{"kind": "hidden_state", "layers": 1}], r"^loss.terms\[0\].layers: allowed is a list"),
        ([{"kind": "no.such.module"}], r"^loss.terms\[0\]: kind 'no.such.module' cannot be imported"),
    ],
)
def test_what_is_no_objective_is_one_line(entries, message):
    with pytest.raises(ConfigError, match=message) as error:
        parse_terms(entries)
    assert "\n" not in str(error.value)


def test_layers_are_found_by_term():
    entries = parse_terms(["kd", {"kind": "hidden_state", "layers": [1, -1]}, {"kind": "attention", "layers": [-1]}])
    terms = resolve(entries, ModelShape(2, 8, 4), ModelShape(4, 8, 4), sequence_length=16)
    assert list(terms) == ["hidden_state", "attention"]
    assert terms["hidden_state"].hidden_layers == (1, 2)
    assert terms["hidden_state"].asks.hidden_layers == (2, 4)
    assert terms["attention"].attention_layers == (1,)
    assert terms["attention"].asks.attention_layers == (3,)
    with pytest.raises(ConfigError, match=r"^loss.terms\[1\].*width 6.*8.*projector"):
        resolve(entries, ModelShape(2, 6, 4), ModelShape(4, 8, 4), sequence_length=16)
