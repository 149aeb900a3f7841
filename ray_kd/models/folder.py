"""A model folder or hub id before anything heavy: is it there, is it usable, which one is it.

Only configs, file lists, safetensors headers and a few blocks of weights are read here: milliseconds for any size.
"""

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from ray_kd import storage
from ray_kd.errors import ConfigError
from ray_kd.redact import redact

_GENERATIVE = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_SAMPLE_BYTES = 1 << 12
_LEFTOVER_AGE_S = 24 * 3600
_HUB_TIMEOUT_S = 30.0


def is_local(path_or_id: str) -> bool:
    """Whether a model is named by a path rather than a hub id (`name` or `owner/name`).

    True for what exists, for what begins like a path, and for a relative path whose parent folder exists.
    """
    path = Path(path_or_id).expanduser()
    if path.exists() or path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1:
        return True
    return "/" in path_or_id and path.parent.is_dir()


def local_folder(path_or_id: str) -> str:
    """The model as transformers wants it: a path (of a copy on this node, for a URI), or the hub id as it stands."""
    return str(storage.fetch(path_or_id, marker="config.json")) if is_local(path_or_id) else path_or_id


def check_model(path_or_id: str, revision: str | None, what: str, needs_weights: bool = True) -> PreTrainedConfig:
    """Refuse a model that could not be used, before a process or a GPU is asked for; returns its config.

    what: "teacher" or "student", for the messages. A local folder needs config.json and complete safetensors
    weights; a hub id is resolved through the hub, or the local hub cache when the hub cannot be reached.
    needs_weights: false for a teacher whose weights are on a server; config.json is enough then.
    Raises ConfigError (one line) for anything else: a missing path, weights in another format, truncated or missing
    shards, a model that is not decoder-only, one that needs its own code (trust_remote_code stays off), and a
    quantised student.
    """
    if is_local(path_or_id):
        _check_files(Path(path_or_id).expanduser(), what, needs_weights)
    else:
        names = _hub_model(path_or_id, revision, what).files
        if needs_weights and not any(name.endswith(".safetensors") for name in names):
            raise ConfigError(f"{what}.model '{path_or_id}' has no safetensors weights on the hub{_found(names)}")
    config = read_config(path_or_id, revision, what)
    _check_decoder_only(config, path_or_id, what)
    if what == "student" and getattr(config, "quantization_config", None):
        raise ConfigError(f"student.model '{path_or_id}' is quantised and cannot be trained; use the full weights")
    return config


def model_identity(path_or_id: str, revision: str | None = None) -> str:
    """Which model this is, by content and never by path or time: equal for copies, different after training.

    Local: "sha256:<hex>" over config.json, the shard index and, per safetensors file, its size, its header and the
    first, middle and last 4 KiB of every tensor: a training of any part shows, at a few MB read for any size.
    Hub: "<id>@<commit>". Raises ConfigError where neither can be read.
    """
    if not is_local(path_or_id):
        return f"{path_or_id}@{_hub_model(path_or_id, revision, 'teacher').commit}"
    folder = Path(path_or_id).expanduser()
    digest = hashlib.sha256()
    for path in sorted([folder / "config.json", *folder.glob("*.safetensors.index.json")]):
        if not path.is_file():
            raise ConfigError(f"model folder '{folder}' has no {path.name}")
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(length)
            digest.update(header)
            entries = json.loads(header)
            entries.pop("__metadata__", None)
            for start, stop in sorted(tuple(entry["data_offsets"]) for entry in entries.values()):
                last = max(start, stop - _SAMPLE_BYTES)
                for offset in sorted({start, (start + last) // 2, last}):
                    file.seek(8 + length + offset)
                    digest.update(file.read(min(_SAMPLE_BYTES, stop - offset)))
    return f"sha256:{digest.hexdigest()}"


def licence_of(path_or_id: str, revision: str | None = None) -> str:
    """The licence a model's card names (`license:` in README.md, or the hub's tag), else "unknown"."""
    if is_local(path_or_id):
        card = Path(path_or_id).expanduser() / "README.md"
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        front = text.split("---", 2)[1] if text.startswith("---") and text.count("---") > 1 else ""
        tags = [line.strip() for line in front.splitlines()]
    else:
        try:
            tags = _hub_model(path_or_id, revision, "teacher").tags
        except ConfigError:  # the hub cannot be reached: the card says unknown, the run goes on
            tags = []
    named = [tag.split(":", 1)[1].strip() for tag in tags if tag.startswith("license:")]
    return named[0] if named else "unknown"


@contextmanager
def atomic_folder(folder: str | Path) -> Iterator[Path]:
    """Write into the yielded folder; it becomes `folder` on success and is removed on failure.

    A reader sees the old folder, none, or the complete new one. What a killed writer left is swept after a day.
    """
    target = Path(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.partial-*"):
        if time.time() - leftover.stat().st_mtime > _LEFTOVER_AGE_S:
            storage.remove(leftover)
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        _readable(partial)
        if target.exists():
            old = target.parent / f".{target.name}.partial-old-{secrets.token_hex(4)}"
            os.rename(target, old)
            os.rename(partial, target)
            storage.remove(old)
        else:
            os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _readable(folder: Path) -> None:
    """Give files the permissions of the process's umask: safetensors writes 0600, unreadable on shared storage."""
    mode = 0o666 & (folder.stat().st_mode | 0o600)
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _check_files(folder: Path, what: str, needs_weights: bool) -> None:
    key = f"{what}.model"
    if not folder.exists():
        raise ConfigError(f"{key}: '{folder}' does not exist")
    if not folder.is_dir():
        hint = "; convert it to a model folder first" if folder.suffix == ".gguf" else ""
        raise ConfigError(f"{key}: '{folder}' is a file, not a model folder{hint}")
    names = sorted(entry.name for entry in folder.iterdir())
    if "config.json" not in names:
        hint = "; it is a PEFT adapter: merge it into its base model first" if "adapter_config.json" in names else ""
        raise ConfigError(f"{key}: '{folder}' has no config.json{hint or _found(names)}")
    if not needs_weights:
        return
    weights = [name for name in names if name.endswith(".safetensors")]
    if not weights:
        raise ConfigError(f"{key}: '{folder}' is a model folder without safetensors{_found(names)}")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text())["weight_map"].values())
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(f"{key}: '{index}' is not a readable shard index") from error
        missing = sorted(shards - set(weights))
        if missing:
            raise ConfigError(f"{key}: '{folder}' lacks {len(missing)} of {len(shards)} shards, first '{missing[0]}'")
    for name in weights:
        try:
            with safe_open(folder / name, framework="np"):
                pass
        except (SafetensorError, OSError) as error:
            raise ConfigError(f"{key}: '{folder / name}' is truncated or not safetensors ({_line(error)})") from error


def _found(names: list[str]) -> str:
    weights = [
        name for name in names if Path(name).suffix in (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")
    ]
    listed = weights or names
    return f" (found {', '.join(listed[:3])}{', ...' if len(listed) > 3 else ''})" if listed else " (it is empty)"


def read_config(path_or_id: str, revision: str | None, what: str) -> PreTrainedConfig:
    """The config of a model. Raises ConfigError for one that transformers cannot use without the model's own code."""
    try:
        return AutoConfig.from_pretrained(local_folder(path_or_id), revision=revision, trust_remote_code=False)
    # What transformers, and the validators under it, raise for bad JSON; an error of ours is of the copy of a URI.
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        raise ConfigError(f"{what}.model '{path_or_id}': config.json cannot be used: {why_not(error)}") from error


def _check_decoder_only(config: PreTrainedConfig, path_or_id: str, what: str) -> None:
    names = list(config.architectures or [])
    generative = not names or any(name.endswith(_GENERATIVE) for name in names)
    if config.is_encoder_decoder or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or not generative:
        raise ConfigError(
            f"{what}.model '{path_or_id}' is not a decoder-only language model"
            f" (model_type {config.model_type}, architectures {', '.join(names) or 'not given'})"
        )


@dataclass(frozen=True)
class _HubModel:
    commit: str
    files: list[str]
    tags: list[str]


def _hub_model(model_id: str, revision: str | None, what: str) -> _HubModel:
    """What the hub, or its local cache when the hub cannot be reached, knows about a model."""
    try:
        info = HfApi().model_info(model_id, revision=revision, timeout=_HUB_TIMEOUT_S)
    except (HFValidationError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        where = f" at revision '{revision}'" if revision else ""
        access = " (or it is private and no token was given)" if isinstance(error, RepositoryNotFoundError) else ""
        raise ConfigError(
            f"{what}.model '{model_id}' is neither a local folder nor a hub model{where}{access}"
        ) from error
    except Exception as error:  # the HTTP library under huggingface_hub changes its name with the version
        try:
            folder = Path(snapshot_download(model_id, revision=revision, local_files_only=True))
        except LocalEntryNotFoundError:
            raise ConfigError(
                f"{what}.model '{model_id}' is not a local folder, and the hub cannot be reached ({_line(error)})"
            ) from error
        return _HubModel(folder.name, [entry.name for entry in folder.iterdir()], [])
    return _HubModel(str(info.sha), [sibling.rfilename for sibling in info.siblings or []], info.tags or [])


def why_not(error: BaseException) -> str:
    """What transformers says of files that it cannot use, in one line; its advice to run their code is left out."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own (auto_map), which is never run here; allowed are architectures of transformers"
    return _line(error)


def _line(error: BaseException) -> str:
    text = redact(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."
