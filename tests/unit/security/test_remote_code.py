"""Code that comes with a model is never run: not a teacher's, a student's or a tokenizer's, wherever they are loaded.

own.py writes a canary when it is imported. A model that needs it is refused in one line; one that brings it without
need (of a known architecture) is loaded with the code of transformers.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ray_kd import cli, models, results
from ray_kd import config as configuration
from ray_kd.data import tokenizer as data_tokenizer
from ray_kd.data.tokenizer import tokenizer_identity
from ray_kd.errors import ConfigError
from ray_kd.export import write_final
from tests.fake_run import write_run
from tests.tiny import tiny_llama
from tests.unit.security.payload import module

AUTO_MAP = {"AutoConfig": "own.Own", "AutoModel": "own.OwnModel", "AutoModelForCausalLM": "own.OwnModel"}
NEEDS_CODE = {"model_type": "own", "auto_map": AUTO_MAP}
TOKENIZER_NEEDS_CODE = {
    "tokenizer_class": "OwnTokenizer",
    "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]},
}
REFUSAL = r"^[^\n]*needs code of its own \(auto_map\), which is never run here; [^\n]*$"


@pytest.fixture
def canary(tmp_path):
    """Where own.py writes; after the test nothing is there, and no such module is known."""
    target = tmp_path / "canary"
    yield target
    assert not target.exists()
    assert not [name for name in sys.modules if name.split(".")[-1] == "own" or "transformers_modules" in name]


@pytest.fixture
def model(tmp_path, canary):
    """Makes a model folder with own.py, and other keys in its JSON files."""

    def make(name: str, config: dict | None = None, tokenizer: dict | None = None) -> str:
        folder = tiny_llama(tmp_path / name)
        for file in ("own.py", "generate.py"):
            (folder / file).write_text(module(canary))
        (folder / "custom_generate").mkdir()
        (folder / "custom_generate" / "generate.py").write_text(module(canary))
        for file, more in (("config.json", config), ("tokenizer_config.json", tokenizer)):
            path = folder / file
            path.write_text(json.dumps(json.loads(path.read_text()) | (more or {})))
        return str(folder)

    return make


def test_own_py_works(tmp_path, monkeypatch):
    (tmp_path / "own_that_works.py").write_text(module(tmp_path / "imported"))
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__("own_that_works")
    assert (tmp_path / "imported").exists()


@pytest.mark.parametrize("what", ["teacher", "student"])
def test_a_model_that_needs_its_own_code(model, what):
    folder = model("model", NEEDS_CODE)
    for needs_weights in (True, False):
        with pytest.raises(ConfigError, match=REFUSAL):
            models.check_model(folder, None, what, needs_weights)
    with pytest.raises(ConfigError, match=REFUSAL):
        models.load_causal_lm(folder)


def test_a_tokenizer_that_needs_its_own_code(model):
    folder = model("model", tokenizer=TOKENIZER_NEEDS_CODE)
    for load in (models.load_tokenizer, lambda path: data_tokenizer.load_tokenizer(path, None)):
        with pytest.raises(ConfigError, match=REFUSAL):
            load(folder)
    assert tokenizer_identity(folder, None)


def test_code_that_is_not_needed_is_not_run(model, tmp_path):
    folder = model("model", {"auto_map": AUTO_MAP}, {"auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]}})
    assert type(models.check_model(folder, None, "teacher")).__module__.startswith("transformers.")
    loaded = models.load_causal_lm(folder)
    assert type(loaded).__module__.startswith("transformers.models.llama")
    assert type(models.load_tokenizer(folder)).__module__.startswith("transformers.")
    assert loaded.generate(torch.tensor([[5, 6]]), max_new_tokens=2).shape == (1, 4)
    models.init_from_layers(folder, [0], str(tmp_path / "init"))
    write_final(
        tmp_path / "final", loaded.named_parameters(), config=loaded.config, tokenizer_path=folder, dtype="float32",
        card="",
    )  # fmt: skip
    for made in ("init", "final"):
        assert not list((tmp_path / made).rglob("*.py")), "it is not handed on"


@pytest.mark.parametrize("place", ["teacher.model", "student.model", "teacher.tokenizer", "student.tokenizer"])
def test_a_run_with_one_is_refused_before_ray_starts(model, tmp_path, capfd, monkeypatch, place):
    import ray

    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    what, part = place.split(".")
    settings = (NEEDS_CODE, None) if part == "model" else (None, TOKENIZER_NEEDS_CODE)
    other = {"teacher": "student", "student": "teacher"}[what]
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(
            {
                "run": {"dir": str(tmp_path / "run")},
                "data": {"source": {"kind": "jsonl", "paths": [str(tmp_path / "a.jsonl")]}, "format": {"kind": "text"}},
                what: {"model": model(what, *settings)},
                other: {"model": model(other)},
                "eval": {"kl": "topk"},
            }
        )
    )
    assert cli.main("distill", [str(recipe)]) == ConfigError.exit_code
    said = capfd.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "needs code of its own (auto_map), which is never run here" in errors[0]
    assert "Traceback" not in said.err + said.out


def test_no_setting_turns_it_on(tmp_path, model):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("{}")
    base = ["run.dir=r", "data.source=x", "teacher.model=t", "student.model=s"]
    for override in ("teacher.trust_remote_code=true", "student.trust_remote_code=true"):
        with pytest.raises(ConfigError, match="unknown key"):
            configuration.load(recipe, [*base, override])
    from ray_kd.teacher.engines import vllm

    assert "trust_remote_code" in Path(vllm.__file__).read_text().split("given: dict")[1].split("}")[0]
    with pytest.raises(ConfigError, match="trust_remote_code"):
        vllm._check_options({"trust_remote_code": True}, {"trust_remote_code"}, {"trust_remote_code"})


def test_jobs_on_a_run_whose_student_is_one(model, tmp_path, canary, capsys):
    """It was good when the run began; export reads its config and tokenizer."""
    run = write_run(tmp_path / "home")
    student = tmp_path / "home" / "student"
    (student / "own.py").write_text(module(canary))
    path = student / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | NEEDS_CODE))
    assert cli.main("export", [str(run), str(tmp_path / "out")]) == ConfigError.exit_code
    assert "needs code of its own" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=REFUSAL):
        results.evaluate(cli._config_of_run(run), model=str(student))
