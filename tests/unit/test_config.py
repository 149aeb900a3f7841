"""The config: typed, closed, and helpful about what is wrong."""

from pathlib import Path

import pytest

from ray_kd import config, plugins
from ray_kd.errors import ConfigError

RECIPES = sorted(Path("configs").rglob("*.yaml"))
MINIMAL = """
run: {dir: runs/x}
data: {source: {kind: jsonl, paths: [train.jsonl]}}
teacher: {model: teacher}
student: {init: {layers: 2}}
"""


@pytest.fixture
def minimal(tmp_path):
    path = tmp_path / "minimal.yaml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_recipe_loads(path):
    assert config.load(path).run.dir


def test_overrides_win_over_yaml_and_keep_their_types(minimal):
    loaded = config.load(minimal, ["train.max_steps=50", "loss.divergence.kind=jsd", "loss.divergence.beta=0.3"])
    assert loaded.train.max_steps == 50
    assert loaded.loss.divergence == {"kind": "jsd", "beta": 0.3}
    assert config.load(minimal, ["student.init.layers=[0,1]"]).student.init.layers == [0, 1]
    assert config.load(minimal, ["student.init=null", "student.model=m"]).student.init is None


def test_a_plug_in_given_whole_replaces_another_with_its_options(minimal):
    jsonl = "data.source={kind: jsonl, paths: [a]}"
    assert config.load(minimal, [jsonl, "data.source={kind: huggingface, path: x/y}"]).data.source == {
        "kind": "huggingface", "path": "x/y",
    }  # fmt: skip
    kept = config.load(minimal, [jsonl, "data.source.kind=parquet"]).data.source
    assert kept["kind"] == "parquet"
    assert len(kept["paths"]) == 1
    assert config.load(minimal, ["data.source={kind: jsonl, paths: one.jsonl}"]).data.source["paths"] == [
        str(Path("one.jsonl").absolute())
    ]


def test_an_option_can_be_set_on_a_bare_kind(minimal):
    loaded = config.load(minimal, ["loss.divergence=jsd", "loss.divergence.beta=0.3"])
    assert loaded.loss.divergence == {"kind": "jsd", "beta": 0.3}


LINEAR = {"schedule": "linear", "start": 1, "end": 0, "steps": 3}


@pytest.mark.parametrize(
    ("overrides", "terms"),
    [
        ([], [{"kind": "kd", "weight": 1.0}]),
        (["loss.terms=[ce, {kind: kd, weight: 2}]"], [{"kind": "ce", "weight": 1.0}, {"kind": "kd", "weight": 2.0}]),
        (
            ["loss.terms=[kd, ce]", "loss.terms.1.weight=0.2"],
            [{"kind": "kd", "weight": 1.0}, {"kind": "ce", "weight": 0.2}],
        ),
        ([f"loss.terms.0.weight={LINEAR}"], [{"kind": "kd", "weight": LINEAR}]),
        (
            [f"loss.terms.0.weight={LINEAR}", "loss.terms.0.weight.start=5"],
            [{"kind": "kd", "weight": LINEAR | {"start": 5}}],
        ),
        (
            [f"loss.terms.0.weight={LINEAR}", "loss.terms.0.weight={schedule: constant, start: 2}"],
            [{"kind": "kd", "weight": {"schedule": "constant", "start": 2}}],
        ),
        (["loss.terms.0={kind: ce}"], [{"kind": "ce", "weight": 1.0}]),
    ],
)
def test_a_term_is_overridden_alone_or_with_all_others(minimal, overrides, terms):
    loaded = config.load(minimal, [override.replace("'", "") for override in overrides])
    assert loaded.loss.terms == terms


def test_a_temperature_is_a_number_or_a_schedule(minimal):
    linear = str(LINEAR).replace("'", "")
    assert config.load(minimal, ["loss.temperature=2"]).loss.temperature == 2.0
    assert config.load(minimal, [f"loss.temperature={linear}", "loss.temperature.end=4"]).loss.temperature["end"] == 4
    assert config.load(minimal, [f"loss.temperature={linear}", "loss.temperature=3"]).loss.temperature == 3.0
    constant = "loss.temperature={schedule: constant, start: 2}"
    loaded = config.load(minimal, [f"loss.temperature={linear}", constant])
    assert loaded.loss.temperature == {"schedule": "constant", "start": 2}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.max_step=4", "unknown key 'train.max_step'.*did you mean 'train.max_steps'"),
        ("train.seeds=1", "unknown key 'train.seeds' in override 'train.seeds=1'; did you mean 'train.*'"),
        ("trian.epochs=1", "unknown key 'trian'.*did you mean 'train'"),
        ("student.init.layer=3", "unknown key 'student.init.layer'.*'student.init.layers'"),
        ("train.max_steps=abc", "train.max_steps.*: 'abc' is no integer, for example 8"),
        ("train.async_checkpoints=maybe", "'maybe' is not one of true, false"),
        ("train=3", r"train \(3\).*allowed is a mapping, or its keys one by one"),
        ("teacher.cache=read", r"teacher.cache \('read'\).*allowed is a mapping"),
        ("teacher.top_k=", "teacher.top_k.*: a value is missing"),
        ("train.label_selector=a", "train.label_selector.*: allowed is a mapping, for example {key: value}"),
        ("loss.divergence=[jsd]", r"loss.divergence \(\['jsd'\]\).*: allowed is a kind, or a mapping"),
        ("student.init=15", "student.init.*allowed is a mapping, or its keys one by one"),
        ("loss.terms=kd", "loss.terms in .*: allowed is a list, for example"),
        ("loss.terms.3.weight=1", "loss.terms has no entry 3; allowed: 0"),
        ("loss.terms.0=ce", r"loss.terms.0 is 'ce': allowed are its keys \(loss.terms.0.KEY=VALUE\)"),
        ("loss.kd_weight=1", "unknown key 'loss.kd_weight'"),
        ("eval.prompts=hello", "eval.prompts.*allowed is a list, for example"),
        ("train.max_steps", "not key=value"),
        ("a=[", "cannot be read"),
    ],
)
def test_a_wrong_override_is_one_line(minimal, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(minimal, [override])
    assert "\n" not in str(caught.value)


def test_missing_keys_and_files_are_named(tmp_path, minimal):
    with pytest.raises(ConfigError, match=r"run\.dir is missing"):
        config.load(None)
    with pytest.raises(ConfigError, match="does not exist"):
        config.load(tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        config.load(broken)


def test_the_stable_core_keeps_its_defaults(minimal):
    """DESIGN.md's block of keys is a contract: other tools bind to these names and values."""
    loaded = config.to_dict(config.load(minimal))
    assert loaded["data"]["sequence_length"] == 512
    assert loaded["teacher"] | {"model": None} == loaded["teacher"] | {
        "model": None,
        "engine": {"kind": "hf"},
        "top_k": 64,
        "selection": "topk",
        "batch_size": 4,
        "dtype": "auto",
        "pool": {"min_actors": 1, "max_actors": 1, "num_cpus": 0.5, "num_gpus": 0, "label_selector": {}},
        "cache": {"mode": "disabled", "path": None, "file_rows": 64},
    }
    assert loaded["loss"]["divergence"] == {"kind": "forward_kl"}
    train = {
        "num_workers": 1, "cpus_per_worker": 0.5, "gpus_per_worker": 0, "zero_stage": 2, "micro_batch_size": 1,
        "global_batch_size": 8, "epochs": 1, "max_steps": None, "learning_rate": 2.0e-4, "schedule": "cosine",
        "warmup_steps": 10, "weight_decay": 0.0, "max_grad_norm": 1.0, "checkpoint_every": 100, "eval_every": 100,
        "log_every": 1, "max_bad_steps": 3, "max_failures": 3,
    }  # fmt: skip
    assert train.items() <= loaded["train"].items()
    assert {"address": None, "dashboard": None}.items() <= loaded["cluster"].items()


def test_every_key_has_a_sentence():
    fields = dict(config.describe())
    assert len(fields) > 60
    assert [key for key, field in fields.items() if not field.sentence] == []


def test_the_resolved_config_loads_back_to_itself(minimal, tmp_path):
    """`evaluate` and `export` read the config.yaml of a run."""
    loaded = config.load(minimal, ["eval.max_new_tokens=7"])
    (tmp_path / "again.yaml").write_text(config.to_yaml(loaded))
    assert config.load(tmp_path / "again.yaml") == loaded


TEACHERS = "teachers=[{model: org/big, batch_size: 2}, {model: org/code, weight: 3, rows: [py], name: coder}]"


def test_each_of_several_teachers_is_a_config_of_its_own(minimal, tmp_path):
    loaded = config.load(minimal, ["teacher.model=org/big", TEACHERS, "teacher.top_k=8", "teachers.0.pool.num_cpus=2"])
    (one, first), (two, second) = config.each_teacher(loaded)
    assert (one.name, two.name, two.rows) == ("big", "coder", ["py"])
    assert (first.teacher.model, first.teacher.batch_size, first.teacher.pool.num_cpus) == ("org/big", 2, 2)
    assert (second.teacher.model, second.teacher.batch_size, second.teacher.pool.num_cpus) == ("org/code", 4, 0.5)
    assert first.teacher.top_k == second.teacher.top_k == 8
    assert first.teachers == []
    assert loaded.teacher == first.teacher, "the first stands for all"
    (tmp_path / "again.yaml").write_text(config.to_yaml(loaded))
    assert config.load(tmp_path / "again.yaml") == loaded


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["teacher.batch_size=3"], "teacher.batch_size and teachers are both set: set batch_size in each of teachers"),
        (["teacher.model=org/other"], "teacher.model and teachers are both set"),
        (["teachers=[{weight: 1}]"], r"teachers\[0\].model is missing"),
        (["teachers.2.weight=1"], "teachers has no entry 2; allowed: 0, 1"),
        (["teachers.1.wieght=1"], r"unknown key 'teachers\[1\].wieght'.*did you mean"),
        (["teachers=[{modle: a/b}]"], "unknown key 'modle'.*did you mean 'model'"),
        (["teachers.1.weight=much"], r"teachers\[1\].weight in override .*: 'much' is no number, for example 0.5"),
        (["teachers=3"], "allowed is a list"),
        (["teachers.0=null"], "teachers.0 is None: allowed are its keys"),
        (["teachers.0.rows=[1.5]"], r"teachers\[0\].rows has \[1.5\]: one is float: allowed is str, int, bool"),
    ],
)
def test_what_is_wrong_about_teachers_is_one_line(minimal, overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(minimal, ["teacher.model=org/big", TEACHERS, *overrides])
    assert "\n" not in str(caught.value)


def test_an_entry_of_teachers_is_overridden_like_teacher(minimal, tmp_path):
    entries = "teachers=[{model: a/b, batch_size: 2, engine: {kind: http, url: u}}, {model: c/d, engine: vllm}]"
    base = ["teacher.model=a/b", entries]
    loaded = config.load(minimal, [*base, "teachers.0.engine={kind: vllm}", "teachers.1.rows=[x, true, 7]"])
    assert loaded.teachers[0].engine == {"kind": "vllm"}
    assert loaded.teachers[1].rows == ["x", "true", "7"], "as a record has them"
    loaded = config.load(minimal, [*base, "teachers.1.engine.tensor_parallel_size=2"])
    assert loaded.teachers[1].engine == {"kind": "vllm", "tensor_parallel_size": 2}
    (tmp_path / "again.yaml").write_text(config.to_yaml(loaded))
    assert config.load(tmp_path / "again.yaml", ["teachers.0.batch_size=16"]).teacher.batch_size == 16


def test_secrets_are_masked(minimal):
    loaded = config.load(minimal)
    loaded.data.source = {"kind": "jsonl", "paths": ["a"], "api_key": "s3cret"}
    assert "s3cret" not in config.to_yaml(loaded)


@pytest.mark.parametrize("group", plugins.GROUPS.values())
def test_plug_ins_are_described_without_importing_them(group):
    described = list(plugins.describe_kinds(group))
    assert [kind for kind, _, _ in described] == plugins.available(group)
    for kind, sentence, fields in described:
        assert sentence, f"{group}/{kind}.py has no docstring"
        assert all(field.sentence for field in fields), f"{group}/{kind}.py: a Config field has no sentence"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("jsonll", "unknown kind 'jsonll'; did you mean 'jsonl'"),
        ({"kind": "jsonl", "path": "a"}, "unknown option 'path'.*did you mean 'paths'"),
        ({"kind": "jsonl"}, "data.source.paths is missing"),
        ({"paths": ["a"]}, "data.source.kind is missing"),
        ({"kind": "jsonl", "paths": 3}, "data.source.paths"),
        ("no_such_package.module", "cannot be imported"),
    ],
)
def test_a_wrong_plug_in_is_one_line(value, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plugins.options("data.sources", value, "data.source")
    assert "\n" not in str(caught.value)


def test_a_third_party_file_is_a_kind(tmp_path, monkeypatch):
    (tmp_path / "my_source.py").write_text(
        "from dataclasses import dataclass\n@dataclass\nclass Config:\n    x: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text("")
    (tmp_path / "my_source.py").rename(tmp_path / "my_pkg" / "my_source.py")
    _, options = plugins.options("data.sources", {"kind": "my_pkg.my_source", "x": 3}, "data.source")
    assert options.x == 3


def test_relative_paths_become_absolute(minimal, tmp_path, monkeypatch):
    """Workers of a run do not share the driver's directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "teacher").mkdir()
    loaded = config.load(minimal, ["student.init=null", "student.model=org/student", "data.prepared_dir=~/prepared"])
    assert loaded.run.dir == str(tmp_path / "runs/x")
    assert loaded.data.source["paths"] == [str(tmp_path / "train.jsonl")]
    assert loaded.data.prepared_dir == str(Path.home() / "prepared")
    assert loaded.teacher.model == str(tmp_path / "teacher")
    assert loaded.student.model == "org/student"
    assert config.load(minimal, ["run.dir=s3://bucket/run"]).run.dir == "s3://bucket/run"


def test_a_mapping_for_a_list_is_refused_by_name(tmp_path):
    for override in ("loss.terms={kind: kd}", "student.freeze={kind: x}"):
        key = override.partition("=")[0]
        with pytest.raises(ConfigError, match=rf"^{key} is {{'kind': '\w+'}} in override .*: allowed is a list$"):
            config.load(None, [override])
    (tmp_path / "c.yaml").write_text("loss: {terms: {kd: {weight: 1}}}")
    with pytest.raises(ConfigError, match=r"^loss\.terms is {'kd': {'weight': 1}} in .*c\.yaml: allowed is a list$"):
        config.load(tmp_path / "c.yaml")


def test_a_key_that_was_renamed_says_what_it_is_now():
    with pytest.raises(ConfigError, match=r"^unknown key 'loss\.ce_weight' in .*: it is the weight of a term now"):
        config.load(None, ["loss.ce_weight=0.5"])
