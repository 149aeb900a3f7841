"""Whether a model folder is whole, by the headers of its files."""

import json
from pathlib import Path

from ray_kd import storage


def problem_of_model(folder: Path) -> str | None:
    """What is missing or cut in a model folder; of each weights file the header and the size are looked at."""
    try:
        config, index = folder / "config.json", folder / "model.safetensors.index.json"
        json.loads(storage.read_text(config))
        shards = {path.name for path in storage.children(folder) if path.suffix == ".safetensors"}
        if index.exists():
            shards |= set(json.loads(storage.read_text(index))["weight_map"].values())
        if not shards:
            return "no safetensors"
        if (outside := next((name for name in sorted(shards) if not storage.is_inside(name)), None)) is not None:
            return f"{index.name} names {outside!a}, which is no path inside the folder"
        for name in sorted(shards):
            _check_safetensors(folder / name)
    except FileNotFoundError as error:
        return f"'{error.filename or error}' is missing"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"cannot be opened ({type(error).__name__}: {error})"
    return None


def _check_safetensors(path: Path) -> None:
    """Raise ValueError for a file that is cut: https://github.com/huggingface/safetensors#format ."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > size:
            raise ValueError(f"{path.name} is cut, or not safetensors")
        tensors = json.loads(file.read(length))
    tensors.pop("__metadata__", None)
    end = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    if end != size:
        raise ValueError(f"{path.name} has {size} bytes, its header says {end}")
