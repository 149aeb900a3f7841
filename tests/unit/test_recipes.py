"""Every YAML in configs/ is a page that loads, passes validation, and whose sums are right.

Models are folders of a config.json with the published sizes, a tokenizer of a few ids and no weights: validation reads
no more of them. Nothing here says how well a recipe trains.
"""

import math
import re
import warnings
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

from ray_kd import config
from ray_kd.payloads import topk_logprobs
from ray_kd.validate import validate
from tests.tiny import tiny_tokenizer

RECIPES = sorted(Path("configs").glob("*.yaml"))
ON_GPUS = ("qwen3_8b_to_0.6b", "llama3_70b_http_to_8b", "one_gpu_24gb")

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
          "max_position_embeddings": 40960}  # fmt: skip
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "tie_word_embeddings": False,
           "max_position_embeddings": 131072}  # fmt: skip
MODELS = {
    "Qwen/Qwen3-8B": _QWEN3 | {"num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288,
                               "num_attention_heads": 32, "tie_word_embeddings": False},
    "Qwen/Qwen3-1.7B": _QWEN3 | {"num_hidden_layers": 28, "hidden_size": 2048, "intermediate_size": 6144,
                                 "num_attention_heads": 16, "tie_word_embeddings": True},
    "Qwen/Qwen3-0.6B": _QWEN3 | {"num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
                                 "num_attention_heads": 16, "tie_word_embeddings": True},
    "meta-llama/Llama-3.1-70B-Instruct": _LLAMA3 | {"num_hidden_layers": 80, "hidden_size": 8192,
                                                    "intermediate_size": 28672, "num_attention_heads": 64},
    "meta-llama/Llama-3.1-8B-Instruct": _LLAMA3 | {"num_hidden_layers": 32, "hidden_size": 4096,
                                                   "intermediate_size": 14336, "num_attention_heads": 32},
    # HuggingFaceTB/SmolLM2-135M-Instruct, which quickstart_inputs.py puts there
    "runs/quickstart-inputs/teacher": {
        "model_type": "llama", "vocab_size": 49152, "num_hidden_layers": 30, "hidden_size": 576,
        "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
        "max_position_embeddings": 8192,
    },
}  # fmt: skip
"""Name in a recipe -> the sizes in its config.json; the pages of the models are named in the recipes."""


def config_of(name):
    sizes = dict(MODELS[name])
    return transformers.AutoConfig.for_model(sizes.pop("model_type"), **sizes)


@pytest.fixture
def folder_of(tmp_path):
    """A model's folder as far as validation looks."""

    def made(name):
        folder = tmp_path / name.replace("/", "-")
        if not folder.exists():
            folder.mkdir()
            values = config_of(name)
            values.architectures = ["Qwen3ForCausalLM" if values.model_type == "qwen3" else "LlamaForCausalLM"]
            values.save_pretrained(folder)
            tiny_tokenizer(folder)
            save_file({}, folder / "model.safetensors")
        return str(folder)

    return made


def header_of(recipe):
    """The comment at the top as one line of text."""
    lines = recipe.read_text().splitlines()
    end = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    return " ".join(" ".join(line.removeprefix("#") for line in lines[:end]).split())


def load(recipe, *overrides):
    # The absolute path of a model that is a folder here, or its name on the hub.
    loaded = config.load(recipe, overrides)
    names = [loaded.teacher.model, loaded.student.model]
    return loaded, [name if name is None else name.removeprefix(f"{Path.cwd()}/") for name in names]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_passes_validation(recipe, folder_of, tmp_path, caplog):
    (tmp_path / "records.jsonl").write_text("{}\n")
    loaded, (teacher, student) = load(recipe)
    overrides = [f"run.dir={tmp_path}/run", f"data.source.paths=[{tmp_path}/records.jsonl]",
                 f"teacher.model={folder_of(teacher)}"]  # fmt: skip
    if student is not None:
        overrides.append(f"student.model={folder_of(student)}")
    if loaded.data.eval_source is not None:
        overrides.append(f"data.eval_source.paths=[{tmp_path}/records.jsonl]")
    if recipe.stem in ON_GPUS:
        overrides.append("cluster.address=10.0.0.1:6379")  # whose GPUs are not looked for here
    caplog.set_level("WARNING", logger="ray_kd")
    learned = validate(load(recipe, *overrides)[0])
    assert learned.vocab_size == MODELS[teacher]["vocab_size"]
    assert caplog.messages == []


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_a_complete_page(recipe):
    header = header_of(recipe)
    for heading in ("Hardware", "Command", "A good run"):
        assert f" {heading} " in f" {header} ", heading
    assert recipe.stem == "quickstart" or " Memory " in header
    named = re.findall(r"jobs/distill\.py (\S+\.yaml)", header)
    assert named, "the command"
    assert set(named) == {str(recipe)}
    if recipe.stem in ON_GPUS:
        assert "Not run here" in header


@pytest.mark.parametrize("name", ON_GPUS)
def test_the_sums_of_a_recipe_are_right(name):
    """Numbers of parameters are those of the architectures, and every product in the header has the result it says."""
    recipe = Path(f"configs/{name}.yaml")
    header, (loaded, models) = header_of(recipe), load(recipe)
    counts = [num_parameters(model) for model in models]
    said = [int(count.replace(",", "")) for count in re.findall(r"(\d[\d,]{8,}) parameters", header)]
    assert sorted(said) == sorted(counts)
    sums = re.findall(r"(\d[\d,]*(?: x [\d,]+)+(?: / \d+)?) = ([\d.]+) GB", header)
    assert len(sums) >= 6
    for product, result in sums:
        factors, *divisor = product.replace(",", "").split(" / ")
        value = math.prod(map(int, factors.split(" x "))) / int(divisor[0] if divisor else 1)
        assert f"{value / 1e9:.1f}" == result, product
    # The numbers that the products are made of are those of the config.
    student, train = MODELS[models[1]], loaded.train
    length, workers = loaded.data.sequence_length, train.num_workers
    vocab = student["vocab_size"]
    layers = f"{student['num_hidden_layers']} x {train.micro_batch_size} x {length} x {student['hidden_size']} x 2 ="
    for expected in (layers, f"{loaded.loss.chunk_size} x {vocab} x 2 ="):
        assert expected in header
    own = f"{counts[1]:,} x 18 =" if workers == 1 else f"{counts[1]:,} x 16 / {workers} ="
    assert own in header
    if "bytes a token (64 ids" in header:
        assert f"{topk_logprobs.nbytes_per_token(loaded.teacher.top_k, vocab)} bytes a token (64 ids" in header


def num_parameters(name):
    """Of the architecture, built without memory; tied weights count once."""
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config_of(name))
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())
