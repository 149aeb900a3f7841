import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from ray_kd import models
from ray_kd.export import model_card, write_final
from tests.tiny import tiny_llama


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def student_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("student"), tie=request.param)


def export(student_path: Path, folder: Path, **changes) -> torch.nn.Module:
    model = models.load_causal_lm(str(student_path))
    options = {
        "parameters": model.named_parameters(),
        "config": model.config,
        "tokenizer_path": str(student_path),
        "dtype": "float32",
        "card": "# card\n",
    }
    write_final(folder, **(options | changes))
    return model


@pytest.mark.parametrize("max_shard_bytes", [60_000, 10**9])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_folder_loads_as_the_same_model(
    student_path: Path, tmp_path: Path, dtype: str, max_shard_bytes: int
) -> None:
    final = tmp_path / "run" / "final"
    trained = export(student_path, final, dtype=dtype, max_shard_bytes=max_shard_bytes)
    trained.to(getattr(torch, dtype))
    loaded, info = AutoModelForCausalLM.from_pretrained(final, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert loaded.dtype == trained.dtype
    ours, theirs = dict(trained.named_parameters()), dict(loaded.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, theirs[name]), name
    assert (
        AutoTokenizer.from_pretrained(final)("ab")["input_ids"]
        == AutoTokenizer.from_pretrained(student_path)("ab")["input_ids"]
    )
    assert loaded.generation_config.eos_token_id == 2
    assert (final / "README.md").read_text() == "# card\n"
    assert models.check_model(str(final), None, "student").architectures == ["LlamaForCausalLM"]
    assert [path.name for path in final.parent.iterdir()] == ["final"]


def test_shards_are_bounded_indexed_and_without_the_tied_duplicate(student_path: Path, tmp_path: Path) -> None:
    model = export(student_path, tmp_path / "final", max_shard_bytes=60_000)
    index = json.loads((tmp_path / "final" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "final").glob("*.safetensors"))
    assert len(files) > 2
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert index["weight_map"].keys() == dict(model.named_parameters()).keys()
    assert ("lm_head.weight" in index["weight_map"]) == (not model.config.tie_word_embeddings)
    for file in files:
        with safe_open(file, framework="pt") as content:
            sizes = [content.get_tensor(name).nbytes for name in content.keys()]  # noqa: SIM118 - not a dict
            assert sum(sizes) <= 60_000 or len(sizes) == 1
            assert content.metadata() == {"format": "pt"}


def test_a_tied_duplicate_that_is_given_is_left_out(student_path: Path, tmp_path: Path) -> None:
    model = models.load_causal_lm(str(student_path))
    export(student_path, tmp_path / "final", parameters=iter(model.state_dict().items()))
    with safe_open(tmp_path / "final" / "model.safetensors", framework="pt") as content:
        assert ("lm_head.weight" in content.keys()) == (not model.config.tie_word_embeddings)  # noqa: SIM118


def test_wrong_parameters_write_nothing_and_keep_the_old_folder(student_path: Path, tmp_path: Path) -> None:
    final = tmp_path / "final"
    model = export(student_path, final)
    before = models.model_identity(str(final))
    parameters = list(model.named_parameters())

    def killed() -> Iterator[tuple[str, torch.Tensor]]:
        yield parameters[0]
        raise RuntimeError("killed")

    for given, error, message in (
        (iter(parameters[:-1]), ValueError, "1 parameters were not given, first"),
        (iter([*parameters, parameters[0]]), ValueError, "was given twice"),
        (iter([("projector.weight", parameters[0][1])]), ValueError, "has no such parameter"),
        (iter([(parameters[0][0], parameters[0][1][:5])]), ValueError, r"\(5, 64\); llama has \(259, 64\)"),
        (killed(), RuntimeError, "killed"),
    ):
        with pytest.raises(error, match=message):
            export(student_path, final, parameters=given)
        assert [path.name for path in tmp_path.iterdir()] == ["final"]
        assert models.model_identity(str(final)) == before


def test_exporting_again_replaces_the_folder(student_path: Path, tmp_path: Path) -> None:
    export(student_path, tmp_path / "final", max_shard_bytes=60_000)
    export(student_path, tmp_path / "final", dtype="bfloat16")
    assert sorted(path.name for path in (tmp_path / "final").glob("model*")) == ["model.safetensors"]
    assert models.load_causal_lm(str(tmp_path / "final")).dtype == torch.bfloat16


def test_the_card_says_where_the_student_comes_from() -> None:
    card = model_card(
        teachers={"HuggingFaceTB/SmolLM2-135M-Instruct": "sha256:abc", "org/coder": "sha256:def"},
        student_init="layers [0, 1, 29] of the teacher",
        data_identity="prepared data 1234",
        licences={"teacher": "apache-2.0", "data": "unknown"},
        config_yaml="run:\n  seed: 0\n",
        metrics={"before": {"kl": 2.5, "perplexity": 30.123456789}, "after": {"kl": 0.5, "bits_per_byte": 1.25}},
    )
    assert card.startswith("---\nlicense: apache-2.0\n")
    for part in (
        "- teacher: `HuggingFaceTB/SmolLM2-135M-Instruct` (sha256:abc)\n- teacher: `org/coder` (sha256:def)\n",
        "layers [0, 1, 29] of the teacher",
        "prepared data 1234",
        "- data: unknown",
        "| kl | 2.5 | 0.5 |",
        "| perplexity | 30.1235 |  |",
        "  seed: 0",
        f"torch {torch.__version__}",
    ):
        assert part in card
    unknown = model_card(
        teachers={"x": "y"}, student_init="z", data_identity="d",
        licences={"teacher": "unknown"}, config_yaml="", metrics=None,
    )  # fmt: skip
    assert "license:" not in unknown
    assert "metrics" not in unknown
