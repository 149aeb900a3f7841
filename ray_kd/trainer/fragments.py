"""Training state as named fragments: written by every rank for itself, read by any number of ranks at any ZeRO stage.

Every stage holds on each rank flat fp32 tensors and the inner torch optimizer's moments on them. A `Fragment` says
which elements of which parameter lie where in them. Files: `rank00000-00000.safetensors` (at most about 2 GB each)
with 1-D fp32 tensors `name|fp32|start`, `name|exp_avg|start`, `name|exp_avg_sq|start` (start: first element in the
flattened parameter), and `rank00000.json`. 12 bytes a trainable parameter in all, no collective, no gather, no pickle.
Working weights and gradients are not stored: the former are rebuilt from the master, and between steps the latter are
none. Frozen parameters come from the base model. Same stage and ranks: bitwise.

Reads private fields of deepspeed 0.19 (`tests/integration/test_zero.py` holds them). Not covered: offload to NVMe,
experts, tensor parallel, hpZ.
"""

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ray_kd import storage
from ray_kd.checkpoint import CorruptCheckpoint
from ray_kd.errors import ConfigError

FORMAT = 1
KINDS = ("fp32", "exp_avg", "exp_avg_sq")
MAX_FILE_BYTES = 2 * 10**9
# safetensors wants a file's tensors in host memory once more; pieces keep one huge embedding from being the measure.
_PIECE_ELEMENTS = 2**26
_SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


class Fragment(NamedTuple):
    """Elements [start, start + length) of parameter name (numel in all) are flat.view(-1)[offset : offset + length]."""

    name: str
    numel: int
    start: int
    flat: torch.Tensor
    offset: int
    length: int


def inner_optimizer(engine: Any) -> torch.optim.Optimizer:
    """The torch optimizer whose state is keyed by the flat tensors; DeepSpeed wraps it except at stage 0 in fp32."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def master_twins(engine: Any) -> dict[int, torch.Tensor]:
    """id(parameter) -> its fp32 master at stage 0 in half precision; the parameter itself at stage 0 in fp32."""
    optimizer = engine.optimizer
    if optimizer is inner_optimizer(engine):
        return {id(p): p for group in optimizer.param_groups for p in group["params"]}
    return {
        id(working): master
        for group in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
        for working, master in zip(*group, strict=True)
    }


def scaler_state(engine: Any) -> dict[str, float] | None:
    """What the fp16 loss scale is and depends on; None in other dtypes."""
    if not engine.fp16_enabled():
        return None
    scaler = _scaler(engine)
    return {name: getattr(scaler, name) for name in _SCALER_FIELDS if hasattr(scaler, name)}


def load_scaler_state(engine: Any, state: Mapping[str, float]) -> None:
    """Put the fp16 loss scale back, as far as this stage's scaler has the fields."""
    scaler = _scaler(engine)
    for name, value in state.items():
        if hasattr(scaler, name):
            setattr(scaler, name, value)


def _scaler(engine: Any) -> Any:
    optimizer = engine.optimizer
    return optimizer.loss_scaler if hasattr(optimizer, "loss_scaler") else optimizer.loss_scale_config


def iter_fragments(engine: Any, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> Iterator[Fragment]:
    """What this rank holds of each trainable parameter, in the order given.

    Stage 0: each parameter whole, on every rank. Stages 1-3: the rank's part, nothing where it has none.
    """
    stage, optimizer, rank = engine.zero_optimization_stage(), engine.optimizer, torch.distributed.get_rank()
    twins = master_twins(engine) if stage == 0 else {}
    p: Any  # DeepSpeed hangs its addresses on parameters
    for name, p in named_parameters:
        if not p.requires_grad:
            continue
        if stage == 0:
            yield Fragment(name, p.numel(), 0, twins[id(p)], 0, p.numel())
        elif stage == 3:
            group, offset, partition = optimizer.grad_position[optimizer.get_param_id(p)]
            start = partition * rank
            length = min(partition, p.ds_numel - start)  # the last partitions are padded
            if length > 0:
                flat = optimizer.fp32_partitioned_groups_flat[group]
                yield Fragment(name, p.ds_numel, start, flat, offset, length)
        elif (mapping := p._hp_mapping) is not None:
            address = mapping.lp_fragment_address
            flat = _flats(engine)[mapping.param_group_index]
            yield Fragment(name, p.numel(), address.start, flat, mapping.hp_fragment_address.start, address.numel)


@dataclass(frozen=True)
class Copy:
    """What this rank holds of the training state between two optimizer steps."""

    parts: Iterator[dict[str, torch.Tensor]]
    """The tensors of each file, in host memory and nobody else's."""
    record: dict[str, Any]


def copy_fragments(engine: Any, module: nn.Module, *, at_once: bool) -> Copy:
    """Copy this rank's fragments: now, or a file at a time while they are written, when no step may be made.

    Now costs host memory for all of them (over all ranks 12 bytes a trainable parameter), else for one file (about
    2 GB). At stage 0, where all ranks hold all, each copies its 1 / world.
    Raises ConfigError with `round_robin_gradients`, whose order DeepSpeed's own fragment addresses do not describe.
    """
    _check_engine(engine)
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    record = {
        "format": FORMAT,
        "rank": rank,
        "world": world,
        "zero_stage": int(engine.zero_optimization_stage()),
        "optimizer_step": _optimizer_step(engine),
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "loss_scaler": scaler_state(engine),
        "parameters": _shapes(module),
    }
    parts = _parts(engine, module, rank, world)
    return Copy(_emptied(list(parts)) if at_once else parts, record)


def write_fragments(copy: Copy, folder: Path) -> list[str]:
    """Write a copy into folder; returns the names of the files. A part that is written is let go."""
    rank = copy.record["rank"]
    files: list[str] = []
    for part in copy.parts:
        files.append(f"rank{rank:05d}-{len(files):05d}.safetensors")
        save_file(part, folder / files[-1])
    name = f"rank{rank:05d}.json"
    (folder / name).write_text(json.dumps(copy.record | {"files": files}, indent=1), encoding="utf-8")
    return [*files, name]


def _parts(engine: Any, module: nn.Module, rank: int, world: int) -> Iterator[dict[str, torch.Tensor]]:
    state = inner_optimizer(engine).state
    part: dict[str, torch.Tensor] = {}
    for fragment in iter_fragments(engine, module.named_parameters()):
        if engine.zero_optimization_stage() == 0:
            fragment = _share(fragment, rank, world)
        for piece in _pieces(fragment):
            if part and sum(tensor.nbytes for tensor in part.values()) + 12 * _PIECE_ELEMENTS > MAX_FILE_BYTES:
                yield part
                part = {}
            moments = state.get(piece.flat, {})
            for kind in KINDS:
                tensor = piece.flat if kind == "fp32" else moments.get(kind)
                # No moments exist before the first step; zeros are what that step will start from.
                values = torch.zeros(piece.length) if tensor is None else _view(piece, tensor)
                part[f"{piece.name}|{kind}|{piece.start}"] = values.to("cpu", torch.float32, copy=True)
    yield part  # a rank that holds nothing writes an empty file


def _emptied(parts: list[dict[str, torch.Tensor]]) -> Iterator[dict[str, torch.Tensor]]:
    parts.reverse()
    while parts:
        yield parts.pop()


def load_fragments(engine: Any, module: nn.Module, folder: Path) -> None:
    """Restore master weights, moments, step counters and the fp16 loss scale; call on all ranks (collective).

    Any stage and rank count reads any other; each rank reads only the bytes it needs, and has one tensor of a file
    (about 0.3 GB at most) in host memory at a time. Working weights are rebuilt from the master. The learning rate and
    random state are not touched (`set_learning_rate`, `rng.load_rng`). The folder must have been verified
    (`checkpoint.verify`). Raises ValueError naming parameters that are missing, unknown or of another size, and for an
    incomplete set of fragments.
    """
    _check_engine(engine)
    records = _read_records(folder)
    record = records[0]
    _compare_parameters(record["parameters"], _shapes(module), folder)
    optimizer = inner_optimizer(engine)
    for flat in _flats(engine):
        # torch makes this state in the first step; made here, it must look the same (fused: step is an fp32 tensor).
        state = optimizer.state[flat]
        if not state:
            state.update({kind: torch.zeros_like(flat, requires_grad=False) for kind in KINDS[1:]})
        state["step"] = torch.tensor(float(record["optimizer_step"]), dtype=torch.float32, device=flat.device)
    source = _Source(folder, records)
    with torch.no_grad():
        for fragment in iter_fragments(engine, module.named_parameters()):
            for kind in KINDS:
                tensor = fragment.flat if kind == "fp32" else optimizer.state[fragment.flat][kind]
                source.copy(fragment, kind, _view(fragment, tensor))
    _refresh_working_weights(engine)

    if engine.fp16_enabled() and record["loss_scaler"]:
        load_scaler_state(engine, record["loss_scaler"])
    engine.global_steps = record["global_steps"]
    engine.skipped_steps = record["skipped_steps"]
    engine.global_samples = engine.global_steps * engine.train_batch_size()
    # Counted with this run's accumulation, so that the boundary falls right when the number of ranks has changed.
    engine.micro_steps = engine.global_steps * engine.gradient_accumulation_steps()


def read_parameters(folder: Path, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, fp32 master) of every trainable parameter, one at a time, without DeepSpeed: what export writes.

    prefix: removed from the names; parameters without it are left out. The folder must have been verified.
    """
    records = _read_records(folder)
    source = _Source(folder, records)
    for name, shape in records[0]["parameters"].items():
        if name.startswith(prefix):
            flat = torch.empty(torch.Size(shape).numel())
            source.copy(Fragment(name, flat.numel(), 0, flat, 0, flat.numel()), "fp32", flat)
            yield name.removeprefix(prefix), flat.view(shape)


class _Piece(NamedTuple):
    """A saved tensor: elements [start, start + length) of a parameter."""

    start: int
    length: int
    path: Path
    key: str


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:  # the manifest is of this file: it was written so
        raise CorruptCheckpoint(f"{path}: is no safetensors file ({error})") from error


class _Source:
    """All fragments in a folder: where each stretch of each parameter lies, read lazily.

    A file is mapped only while one tensor is copied from it: pages of a map that stays count as this process's memory,
    and of a checkpoint that was read to its end they are the checkpoint.
    """

    def __init__(self, folder: Path, records: list[dict[str, Any]]) -> None:
        self._pieces: dict[tuple[str, str], list[_Piece]] = defaultdict(list)
        for path in [folder / file for record in records for file in record["files"]]:
            with _opened(path) as file:
                for key in file.keys():  # noqa: SIM118 (not a mapping)
                    name, kind, start = key.rsplit("|", 2)
                    length = file.get_slice(key).get_shape()[0]
                    self._pieces[name, kind].append(_Piece(int(start), length, path, key))
        for pieces in self._pieces.values():
            pieces.sort()
        for name, shape in records[0]["parameters"].items():
            for kind in KINDS:
                end = 0
                for piece in self._pieces[name, kind]:
                    if piece.start != end:
                        break
                    end += piece.length
                numel = torch.Size(shape).numel()
                if end != numel:
                    raise ConfigError(f"{folder}: {name} ({kind}): fragments cover {end} of {numel} elements")

    def copy(self, fragment: Fragment, kind: str, target: torch.Tensor) -> None:
        """Fill target [fragment.length] from the pieces that overlap the fragment."""
        stop = fragment.start + fragment.length
        copied = 0
        for start, length, path, key in self._pieces[fragment.name, kind]:
            low, high = max(start, fragment.start), min(start + length, stop)
            if low < high:
                with safe_open(path, framework="pt") as file:
                    values = file.get_slice(key)[low - start : high - start]
                    target[low - fragment.start : high - fragment.start].copy_(values)
                    del values  # it holds the map
                copied += high - low
        assert copied == fragment.length, f"{fragment.name} ({kind}): copied {copied} of {fragment.length} elements"


def _view(fragment: Fragment, tensor: torch.Tensor) -> torch.Tensor:
    # view, never reshape: a copy would be filled in the place of the state.
    return tensor.detach().view(-1)[fragment.offset : fragment.offset + fragment.length]


def _share(fragment: Fragment, rank: int, world: int) -> Fragment:
    """Rank's part of a fragment that every rank holds; empty for some ranks when it has fewer elements than ranks."""
    low, high = (fragment.length * r // world for r in (rank, rank + 1))
    return fragment._replace(start=fragment.start + low, offset=fragment.offset + low, length=high - low)


def _pieces(fragment: Fragment) -> Iterator[Fragment]:
    for low in range(0, fragment.length, _PIECE_ELEMENTS):
        length = min(_PIECE_ELEMENTS, fragment.length - low)
        yield fragment._replace(start=fragment.start + low, offset=fragment.offset + low, length=length)


def _flats(engine: Any) -> list[torch.Tensor]:
    """The tensors the inner optimizer steps on. Not its param_groups: stage 3 empties those between steps."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 0:
        return list(master_twins(engine).values())
    if stage == 3:
        return optimizer.fp32_partitioned_groups_flat
    if hasattr(optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer: stage 1, bf16, gradients summed in fp32
        return optimizer.fp32_groups_flat_partition
    return optimizer.single_partition_of_fp32_groups


@torch.no_grad()
def _refresh_working_weights(engine: Any) -> None:
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        # The order of stage 3's own step: release what a forward left gathered, write partitions, gather persistent.
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
    elif stage in (1, 2):
        optimizer.update_lp_params()
    elif optimizer is not inner_optimizer(engine):
        for working, master in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            for p, twin in zip(working, master, strict=True):
                p.copy_(twin)


def _optimizer_step(engine: Any) -> int:
    steps = {int(state["step"]) for state in inner_optimizer(engine).state.values()}
    assert len(steps) <= 1, f"parameters are at different steps: {sorted(steps)}"
    return steps.pop() if steps else 0


def _shapes(module: nn.Module) -> dict[str, list[int]]:
    """Trainable parameters and their shapes; under ZeRO-3 `p.shape` is that of an empty placeholder."""
    return {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters() if p.requires_grad}


def _check_engine(engine: Any) -> None:
    assert engine.ray_kd_micro_batches == 0, "between two steps only: gradients are not part of a checkpoint"
    if engine.zero_round_robin_gradients():
        raise ConfigError("zero_optimization.round_robin_gradients is true; checkpoints need it false")


def _read_records(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("rank*.json"))
    records = [json.loads(path.read_bytes()) for path in paths]
    if not records:
        raise ConfigError(f"{folder}: no rank*.json, not a training checkpoint")
    for name in (name for record in records for name in record["files"]):
        if not storage.is_inside(name):
            raise ConfigError(f"{folder}: {name!a} is no path inside the checkpoint")
    first = records[0]
    if first["format"] != FORMAT:
        raise ConfigError(f"{folder}: fragment format {first['format']}, this code reads {FORMAT}")
    if [record["rank"] for record in records] != list(range(first["world"])):
        raise ConfigError(f"{folder}: {len(records)} rank*.json of {first['world']}")
    for key in ("world", "optimizer_step", "global_steps", "parameters"):
        if any(record[key] != first[key] for record in records):
            raise ConfigError(f"{folder}: ranks disagree about {key}")
    return records


def _compare_parameters(saved: Mapping[str, list[int]], wanted: Mapping[str, list[int]], folder: Path) -> None:
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} is not in the model, or frozen there" for name in saved if name not in wanted]
    problems += [
        f"{name} is {saved[name]}, the model's {shape}"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise ConfigError(f"{folder} does not fit the model: {'; '.join(problems[:5])}{more}")
