"""Which layers learn from which, and what two config.json show not to work: each refused by name, in one line."""

from types import SimpleNamespace

import pytest

from ray_kd import plugins
from ray_kd.errors import ConfigError
from ray_kd.losses.layer_map import LayerMap, ModelShape, resolve_layers

KEY = "loss.terms[1]"
STUDENT, TEACHER = ModelShape(4, 64, 4), ModelShape(12, 64, 4)


@pytest.mark.parametrize(
    ("layers", "teacher_layers", "how", "extra", "expected"),
    [
        ([0, 1, 2, 3, 4], None, "proportional", 1, ((0, 1, 2, 3, 4), (0, 3, 6, 9, 12))),
        ([-1, -5], None, "proportional", 1, ((4, 0), (12, 0))),
        ([0, 1, 2, 3], None, "proportional", 0, ((0, 1, 2, 3), (2, 5, 8, 11))),
        ([-1, 0], None, "same", 1, ((4, 0), (12, 0))),
        ([-1, 0], None, "same", 0, ((3, 0), (11, 0))),
        ([1, 2], [-3, 0], "proportional", 1, ((1, 2), (10, 0))),
        ([1, 2], [7, 7], "proportional", 0, ((1, 2), (7, 7))),
        ([0, 1, 2, -1], None, None, 1, ((0, 1, 2, 4), (0, 3, 6, 12))),
        ([-1], None, None, 0, ((3,), (11,))),
    ],
)
def test_layers_are_resolved(layers, teacher_layers, how, extra, expected):
    assert resolve_layers(KEY, layers, teacher_layers, how, STUDENT, TEACHER, extra) == LayerMap(*expected)


@pytest.mark.parametrize(
    ("layers", "how", "extra", "expected"),
    [
        ([0, 1, 2, 3], None, 0, (0, 2, 3, 9)),
        # After layers 0, 2, 3 and, after the final norm, the last: the teacher's last one, which is after its norm.
        ([0, 1, 2, 3, 4], "origin", 1, (0, 1, 3, 4, 12)),
        ([1], "proportional", 1, (3,)),
    ],
)
def test_a_student_of_the_teachers_layers_learns_from_them(layers, how, extra, expected):
    student = ModelShape(4, 64, 4, origin=(0, 2, 3, 9))
    assert resolve_layers(KEY, layers, None, how, student, TEACHER, extra).teacher == expected


def test_an_origin_that_is_not_known_is_refused():
    with pytest.raises(ConfigError, match=r"map is 'origin', .* or student\.init\.layers as a list"):
        resolve_layers(KEY, [1], None, "origin", STUDENT, TEACHER, extra=1)


@pytest.mark.parametrize(("num_student", "num_teacher"), [(15, 30), (5, 7), (7, 5), (1, 9), (9, 1), (6, 6)])
def test_proportional_maps_keep_both_ends_and_the_order(num_student, num_teacher):
    for extra in (0, 1):
        layers = list(range(num_student + extra))
        shapes = ModelShape(num_student, 8, 2), ModelShape(num_teacher, 8, 2)
        found = resolve_layers(KEY, layers, None, "proportional", *shapes, extra).teacher
        assert found[-1] == num_teacher - 1 + extra
        assert list(found) == sorted(found)
        for layer, other in zip(layers, found, strict=True):
            depth, expected = layer + 1 - extra, (other + 1 - extra) / num_teacher
            assert depth / num_student == pytest.approx(expected, abs=0.5 / num_teacher + 1e-9) or other == 0
        if extra:
            assert found[0] == 0
        if num_student == num_teacher:
            assert list(found) == layers


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hidden_state", {"layers": [5]}, r"layers has 5: allowed is -5 to 4, the student has 5 of them"),
        ("hidden_state", {"layers": [-6]}, r"layers has -6: allowed is -5 to 4"),
        ("attention", {"layers": [4]}, r"layers has 4: allowed is -4 to 3, the student has 4 of them"),
        (
            "hidden_state",
            {"layers": [1], "teacher_layers": [13]},
            r"teacher_layers has 13: allowed is -13 to 12, the te",
        ),
        ("attention", {"layers": [1], "teacher_layers": [12]}, r"teacher_layers has 12: allowed is -12 to 11, the tea"),
        (
            "hidden_state",
            {"layers": [1, 2], "teacher_layers": [3]},
            r"teacher_layers has 1 entries: allowed is one for e",
        ),
        ("hidden_state", {"layers": []}, r"layers is \[\]: allowed is one layer or more"),
        (
            "attention",
            {"layers": [3, -1]},
            r"layers is \[3, -1\], of the student's layers \[3, 3\]: allowed is each once",
        ),
        (
            "hidden_state",
            {"map": "proportionl"},
            r"map is 'proportionl': allowed is proportional \| same \| origin; did you",
        ),
        ("hidden_state", {"measure": "kl"}, r"measure is 'kl': allowed is mse \| cosine"),
        ("attention", {"measure": "cosine"}, r"measure is 'cosine': allowed is mse \| kl"),
        ("attention", {"mask": "all"}, r"mask is 'all': allowed is targets \| attention"),
        ("hidden_state", {"mask": "all"}, r"mask is 'all': allowed is targets \| attention"),
        ("attention", {"heads": "sum"}, r"heads is 'sum': allowed is match \| mean"),
        ("hidden_state", {"projector": "mlp"}, r"projector is 'mlp': allowed is linear"),
        ("hidden_state", {"projector_learning_rate": 0.1}, r"projector_learning_rate is 0.1 and there is no projector"),
        (
            "hidden_state",
            {"projector": "linear", "projector_learning_rate": 0.0},
            r"projector_learning_rate is 0.0: allowed is a positive number, or null",
        ),
        ("attention", {"measure": "kl", "normalize_rows": False}, r"normalize_rows is False: allowed is true or null"),
    ],
)
def test_options_that_do_not_fit_are_refused(kind, options, message):
    module, config = plugins.options("losses.features", {"kind": kind, **options}, KEY)
    with pytest.raises(ConfigError, match=rf"^loss\.terms\[1\]\.{message}") as error:
        module.resolve(config, STUDENT, TEACHER, 512, KEY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "student", "teacher", "length", "message"),
    [
        (
            "hidden_state", ModelShape(4, 32, 4), TEACHER, 512,
            r"hidden states have width 32 and the teacher's 64: allowed is equal widths, or loss.terms\[1\].proj",
        ),
        (
            "attention", ModelShape(4, 64, 3), TEACHER, 512,
            r"the student has 3 heads and the teacher 4: allowed is as many, or loss.terms\[1\].heads=mean",
        ),
        ("attention", STUDENT, ModelShape(12, 64, None), 512, r"the teacher has no attention heads: allowed is"),
        ("attention", STUDENT, TEACHER, 1025, r"data.sequence_length is 1025: allowed is at most loss.terms\[1\].max"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(kind, student, teacher, length, message):
    module, config = plugins.options("losses.features", kind, KEY)
    with pytest.raises(ConfigError, match=message) as error:
        module.resolve(config, student, teacher, length, KEY)
    assert "\n" not in str(error.value)


def test_what_is_named_in_the_message_is_taken():
    module, config = plugins.options("losses.features", {"kind": "hidden_state", "projector": "linear"}, KEY)
    assert module.resolve(config, ModelShape(4, 32, 4), TEACHER, 9999, KEY).projectors.teacher_width == 64
    module, config = plugins.options("losses.features", {"kind": "attention", "heads": "mean"}, KEY)
    assert module.resolve(config, ModelShape(4, 64, 3), TEACHER, 1024, KEY).asks.mean_over_heads
    module, config = plugins.options("losses.features", {"kind": "attention", "max_sequence_length": 4096}, KEY)
    assert module.resolve(config, STUDENT, TEACHER, 4096, KEY).attention_layers == (3,)


def test_shapes_are_read_from_a_config():
    config = SimpleNamespace(num_hidden_layers=3, hidden_size=8, num_attention_heads=2, model_type="x")
    config.get_text_config = lambda: config
    assert ModelShape.of(config) == ModelShape(3, 8, 2)
    del config.num_attention_heads
    assert ModelShape.of(config).num_heads is None
    del config.hidden_size
    with pytest.raises(ConfigError, match="model_type 'x' names no num_hidden_layers and hidden_size"):
        ModelShape.of(config)
