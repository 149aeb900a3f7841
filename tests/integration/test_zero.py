"""The private fields of DeepSpeed that zero.py and fragments.py stand on, held by behaviour on 1, 2 and 4 gloo ranks.

Ranks are processes of zero_worker.py, one group per world size; every wait has a deadline. Where stage, ranks, dtype
and the like vary together, `make test` runs combinations in which every two values meet (`covering.py`), and
`make test-matrix` all of them. The model has the two parameter groups that zero.py makes (decayed and not), a frozen
layer and a tied head.
"""

import json
import math
import os
import queue
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ray_kd.trainer import fragments, zero
from tests.covering import matrix, pairwise

ROOT = Path(__file__).parents[2]
STAGES = (0, 1, 2, 3)
WORLDS = (1, 2, 4)
DTYPES = ("float32", "bfloat16", "float16")
DEADLINE_S = 240


class Group:
    """`world` ranks that run cases in lock-step."""

    def __init__(self, world: int, folder: Path) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.log = folder / f"world{world}.log"
        self.ranks = []
        with self.log.open("w") as log:
            for rank in range(world):
                command = [sys.executable, str(Path(__file__).with_name("zero_worker.py"))]
                process = subprocess.Popen(
                    [*command, str(rank), str(world), str(folder / f"store{world}")],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                    env=environment,
                )
                results: queue.Queue[str] = queue.Queue()
                threading.Thread(target=self._read, args=(process, results), daemon=True).start()
                self.ranks.append((process, results))

    @staticmethod
    def _read(process: subprocess.Popen[str], results: queue.Queue[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            results.put(line)
        results.put("")

    def call(self, **call: Any) -> list[Any]:
        is_half = call.get("dtype") == "float16" or call["case"] == "overflow"
        if is_half and not torch.ops.mkldnn._is_mkldnn_fp16_supported():
            pytest.skip("DeepSpeed refuses float16 on this CPU, which has no instructions for it")
        for process, _ in self.ranks:
            assert process.stdin is not None
            process.stdin.write(json.dumps(call) + "\n")
            process.stdin.flush()
        answers = []
        for rank, (_, results) in enumerate(self.ranks):
            try:
                line = results.get(timeout=DEADLINE_S)
            except queue.Empty:
                pytest.fail(f"{call}: rank {rank} gave no answer in {DEADLINE_S} s\n{self.log.read_text()[-4000:]}")
            answer = json.loads(line) if line else {"error": f"rank {rank} died\n{self.log.read_text()[-4000:]}"}
            answers.append(answer)
        for answer in answers:  # all are read: what is left would be taken for the next call's
            assert "ok" in answer, f"{call}: {answer['error']}"
        return [answer["ok"] for answer in answers]

    def close(self) -> None:
        for process, _ in self.ranks:
            assert process.stdin is not None
            process.stdin.close()
        for process, _ in self.ranks:
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(timeout=20)


class Runs:
    """Cases by name and arguments, each run once; rank 0's answer, after checking that all ranks agree."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.groups: dict[int, Group] = {}
        self.done: dict[str, Any] = {}

    def __call__(self, world: int, case: str, **arguments: Any) -> tuple[Any, Path]:
        """The answer, and the path its files are named after."""
        key = json.dumps([world, case, arguments])
        if key not in self.done:
            out = self.folder / f"{len(self.done):03d}-{case}"
            named = {} if case == "refused" else {"out": str(out)}
            if world not in self.groups:
                self.groups[world] = Group(world, self.folder)
            answers = self.groups[world].call(case=case, **named, **arguments)
            assert all(json.dumps(answer) == json.dumps(answers[0]) for answer in answers), answers
            self.done[key] = answers[0], out
        return self.done[key]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    runs = Runs(tmp_path_factory.mktemp("zero"))
    yield runs
    for group in runs.groups.values():
        group.close()


def saved_state(folder: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(parameter, kind) -> its elements, put together from the files of all ranks."""
    pieces: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    for file in folder.glob("rank*-*.safetensors"):
        for key, values in load_file(file).items():
            name, kind, start = key.rsplit("|", 2)
            pieces.setdefault((name, kind), {})[int(start)] = values
    return {key: torch.cat([parts[start] for start in sorted(parts)]) for key, parts in pieces.items()}


def saved_record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "rank00000.json").read_text())


def weights(out: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(f"{out}.{kind}.safetensors")


def assert_bitwise(one: tuple[Any, Path], other: tuple[Any, Path]) -> None:
    assert one[0] == other[0]
    for kind in ("master", "working"):
        a, b = weights(one[1], kind), weights(other[1], kind)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def deviations(one: tuple[Any, Path], other: tuple[Any, Path]) -> dict[str, float]:
    """The largest differences. loss, norm (of the gradient, of the first moment): relative; weight: absolute."""
    steps = list(zip(one[0]["steps"], other[0]["steps"], strict=True))
    assert [a["applied"] for a, _ in steps] == [b["applied"] for _, b in steps]
    norms = [(a["norm"], b["norm"]) for a, b in steps]
    if "moment" in one[0]:
        norms.append((one[0]["moment"], other[0]["moment"]))
    a, b = weights(one[1], "master"), weights(other[1], "master")
    assert a.keys() == b.keys()
    return {
        "loss": max(abs(a["loss"] / b["loss"] - 1) for a, b in steps),
        "norm": max(abs(a / b - 1) for a, b in norms),
        "weight": max((a[name] - b[name]).abs().max().item() for name in a),
    }


@pytest.fixture
def assert_close(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Checks `deviations` against bounds by name, and notes them in the report (--junitxml)."""

    def check(one: tuple[Any, Path], other: tuple[Any, Path], **bounds: float) -> None:
        found = deviations(one, other)
        for name, value in found.items():
            record_property(name, value)
        assert {name: found[name] for name in bounds if not found[name] <= bounds[name]} == {}, bounds

    return check


@pytest.mark.parametrize(("stage", "dtype", "world"), matrix(STAGES, DTYPES, WORLDS))
def test_resume_on_the_same_topology_is_bitwise(run: Runs, stage: int, dtype: str, world: int) -> None:
    call: dict[str, Any] = {"stage": stage, "dtype": dtype, "dropout": 0.1}
    whole = run(world, "train", **call)
    resumed = run(world, "train", load=str(whole[1]), **call)
    assert_bitwise(resumed, whole)


def test_the_bitwise_comparison_sees_dropout(run: Runs) -> None:
    call: dict[str, Any] = {"stage": 1, "dtype": "float32", "dropout": 0.2}
    whole = run(2, "train", **call)
    (whole[1] / "rank00001.rng.safetensors").unlink()
    assert run(2, "train", load=str(whole[1]), **call)[0]["steps"] != whole[0]["steps"]


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.matrix) for world in (1, 4))])
def test_resume_with_bf16_optimizer_is_bitwise(run: Runs, world: int) -> None:
    call = {"stage": 1, "dtype": "bfloat16", "options": {"data_types": {"grad_accum_dtype": "fp32"}}}
    whole = run(world, "train", **call)
    assert_bitwise(run(world, "train", load=str(whole[1]), **call), whole)


RESIZES = (STAGES, WORLDS, STAGES, WORLDS, DTYPES)
# Half precision: three times the largest deviation of the 144 pairs.
AFTER_RESIZE = {
    "float32": {"loss": 1e-6, "norm": 1e-6, "weight": 1e-6},
    "bfloat16": {"loss": 1e-3, "norm": 6e-3, "weight": 5e-4},
    "float16": {"loss": 2.5e-4, "norm": 1.2e-3, "weight": 2e-4},
}


@pytest.mark.parametrize(("stage", "world", "to_stage", "to_world", "dtype"), matrix(*RESIZES))
def test_any_stage_and_rank_count_reads_any_other(
    run: Runs, assert_close: Callable[..., None], stage: int, world: int, to_stage: int, to_world: int, dtype: str
) -> None:
    """What is read is exactly what was written; the steps after it differ as two topologies do."""
    whole = run(world, "train", stage=stage, dtype=dtype)
    resumed = run(to_world, "train", stage=to_stage, dtype=dtype, load=str(whole[1]))
    before, after = saved_state(whole[1]), saved_state(resumed[1])
    assert before.keys() == after.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    for kind in ("saved_master", "saved_working"):  # the frozen ones too
        a, b = weights(whole[1], kind), weights(resumed[1], kind)
        assert [name for name in a if not torch.equal(a[name], b[name])] == []
    was, now = saved_record(whole[1]), saved_record(resumed[1])
    for key in ("optimizer_step", "global_steps", "skipped_steps", "parameters"):
        assert now[key] == was[key]
    if dtype == "float16":
        # Stage 0 counts no hysteresis; what both have is the same before and, at the end, after the steps.
        for a, b in ((was["loss_scaler"], now["loss_scaler"]), (whole[0]["scaler"], resumed[0]["scaler"])):
            assert {name: a[name] for name in a.keys() & b.keys()} == {name: b[name] for name in a.keys() & b.keys()}
        assert (was["loss_scaler"]["cur_scale"], was["loss_scaler"]["last_overflow_iter"]) == (128, 1)
        assert whole[0]["scaler"]["cur_scale"] == 256
    assert resumed[0]["counters"] == whole[0]["counters"]
    if (stage, world) == (to_stage, to_world):
        assert_bitwise(resumed, whole)
    assert_close(resumed, whole, **AFTER_RESIZE[dtype])


# Which elements are where is the stage's; the number of ranks only says how many of them each rank has.
@pytest.mark.parametrize(("stage", "world"), matrix(STAGES, WORLDS, chosen=[(0, 2), (1, 1), (2, 4), (3, 2)]))
def test_split_files_hold_each_element_once(run: Runs, stage: int, world: int) -> None:
    whole = run(world, "train", stage=stage, dtype="float32")
    split = run(world, "train", stage=stage, dtype="float32", piece_elements=7, max_file_bytes=2000)
    files = sorted(split[1].glob("rank*-*.safetensors"))
    assert len(files) >= 2 * world
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 2000 for file in files)
    assert_bitwise(run(world, "train", stage=stage, dtype="float32", load=str(split[1])), whole)


# The runs that are resized above.
@pytest.mark.parametrize(
    ("stage", "world", "dtype"),
    matrix(STAGES, WORLDS, DTYPES, chosen=[(row[0], row[1], row[4]) for row in pairwise(*RESIZES)]),
)
def test_export_is_the_master_and_its_rounding(run: Runs, stage: int, world: int, dtype: str) -> None:
    _, out = run(world, "train", stage=stage, dtype=dtype)
    master, working = weights(out, "saved_master"), weights(out, "saved_working")
    saved = {name: value.view(-1) for name, value in fragments.read_parameters(out)}
    frozen = {"frozen.weight", "frozen.bias"}
    assert frozen < master.keys()
    assert "head.weight" not in master  # tied: written once
    for name, value in master.items():
        assert value.dtype == torch.float32
        assert working[name].dtype == getattr(torch, dtype)
        assert torch.equal(value.to(working[name].dtype), working[name])
        assert name in frozen or torch.equal(saved[name].view(value.shape), value)


@pytest.mark.parametrize(("stage", "dtype", "world"), matrix(STAGES, DTYPES, WORLDS))
def test_a_step_is_the_plain_sum_over_micro_batches_and_ranks(
    run: Runs, assert_close: Callable[..., None], stage: int, dtype: str, world: int
) -> None:
    plain = run(1, "plain")
    assert plain[0]["steps"][0]["norm"] > 0.3  # clipped
    split = run(world, "normalise", stage=stage, dtype=dtype)
    if dtype == "float32":
        assert_close(split, plain, loss=1e-6, norm=1e-5, weight=1e-5)
    else:
        # Weights are no measure: Adam turns the sign noise of a tiny gradient into a full step.
        assert_close(split, plain, loss=3e-3, norm=2e-2)


@pytest.mark.parametrize(("stage", "world"), matrix(STAGES, WORLDS))
def test_feature_terms_are_divided_by_the_counts_of_all_ranks(
    run: Runs, assert_close: Callable[..., None], stage: int, world: int
) -> None:
    """Steps 3 and 4 of four, projectors at a rate of their own, as torch makes them of one sum on one rank."""
    plain = run(1, "plain_features")
    assert plain[0]["steps"][0]["norm"] > 1.0  # clipped
    split = run(world, "features", stage=stage, dtype="float32")
    assert_close(split, plain, loss=1e-5, norm=1e-4, weight=1e-4)
    names = set(weights(split[1], "master"))
    assert {name for name in names if name.startswith("projectors.")} == {
        "projectors.hidden_state_1.0.weight", "projectors.hidden_state_1.1.weight",
        "projectors.hidden_state_2.0.weight",
    }  # fmt: skip
    values = split[0]["steps"][0]["metrics"]
    weighed = 1.25 * values["kd_loss"] + 0.5 * values["ce_loss"] + 0.3 * values["hidden_state_loss_1"]
    weighed += 2.0 * values["attention_loss"] + 0.2 * values["hidden_state_loss_2"]
    assert values["loss"] == pytest.approx(weighed, rel=1e-5)


@pytest.mark.parametrize(("stage", "dtype", "world"), matrix(STAGES, DTYPES, WORLDS))
def test_resume_with_projectors_is_bitwise(run: Runs, stage: int, dtype: str, world: int) -> None:
    call: dict[str, Any] = {"stage": stage, "dtype": dtype}
    whole = run(world, "features", **call)
    assert "projectors.hidden_state_1.0.weight" in saved_record(whole[1])["parameters"]
    assert_bitwise(run(world, "features", load=str(whole[1]), **call), whole)


@pytest.mark.parametrize(("stage", "world", "to_stage", "to_world"), [(3, 2, 0, 1), (1, 1, 2, 2), (0, 2, 3, 1)])
def test_projectors_are_read_at_any_stage_and_rank_count(
    run: Runs, assert_close: Callable[..., None], stage: int, world: int, to_stage: int, to_world: int
) -> None:
    whole = run(world, "features", stage=stage, dtype="float32")
    resumed = run(to_world, "features", stage=to_stage, dtype="float32", load=str(whole[1]))
    before, after = saved_state(whole[1]), saved_state(resumed[1])
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert_close(resumed, whole, loss=1e-5, norm=1e-4, weight=1e-4)


@pytest.mark.parametrize(
    ("stage", "dtype", "world", "kind"), matrix(STAGES, DTYPES, WORLDS, ("both", "loss", "gradient"))
)
def test_a_step_that_is_not_finite_was_never_there(run: Runs, stage: int, dtype: str, world: int, kind: str) -> None:
    call: dict[str, Any] = {"stage": stage, "dtype": dtype}
    answer, out = run(world, "poison", **call, kind=kind)
    clean, clean_out = run(world, "poison", **call, kind="")
    good, bad, after = answer["steps"]
    is_overflow = dtype == "float16" and kind == "gradient"
    assert (bad["applied"], bad["bad"]) == (False, not is_overflow)
    assert math.isfinite(bad["loss"]) == (kind == "gradient")
    assert not math.isfinite(bad["norm"])
    assert answer["counters"] == [3, 1, 2]
    before, untouched = weights(out, "before"), weights(out, "after")
    assert all(torch.equal(before[name], untouched[name]) for name in before)
    assert answer["again"] == after
    if is_overflow:
        assert after["applied"]  # rounded otherwise, by a smaller scale
        return
    assert [good, after] == clean["steps"]
    assert_bitwise((after, out), (clean["steps"][-1], clean_out))


OVERFLOWS = {
    "dynamic": ({"initial_scale_power": 2, "hysteresis": 1}, [False, False, True, True]),  # 4, 2, and 1 is the smallest
    "static": ({"loss_scale": 4}, [True, True, True, True]),
}


# Stage 0 has a scaler of its own, the others share one.
@pytest.mark.parametrize(
    ("stage", "scale"),
    matrix(STAGES, OVERFLOWS, chosen=[(0, "dynamic"), (0, "static"), (1, "dynamic"), (2, "static"), (3, "dynamic")]),
)
def test_an_fp16_overflow_is_bad_when_no_smaller_scale_is_left(run: Runs, stage: int, scale: str) -> None:
    options, bad = OVERFLOWS[scale]
    first, *overflows = run(1, "overflow", stage=stage, options=options)[0]
    assert (first["applied"], first["bad"]) == (True, False)
    assert [step["applied"] for step in overflows] == [False] * 4
    assert [step["bad"] for step in overflows] == bad


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_went_on_can_load(run: Runs, stage: int) -> None:
    answer, _ = run(2, "rollback", stage=stage, dtype="bfloat16")
    assert answer["first"] == answer["second"]


ADAPTERS = {"lora": {"r": 8, "alpha": 16}, "dora": {"r": 8, "alpha": 16, "use_dora": True}}


@pytest.mark.parametrize(("stage", "dtype", "world", "kind"), matrix(STAGES, DTYPES, WORLDS, tuple(ADAPTERS)))
def test_adapters_resume_bitwise_and_the_base_stays(run: Runs, stage: int, dtype: str, world: int, kind: str) -> None:
    call: dict[str, Any] = {"stage": stage, "dtype": dtype, "adapters": ADAPTERS[kind] | {"dropout": 0.1}}
    whole = run(world, "train", **call)
    assert_bitwise(run(world, "train", load=str(whole[1]), **call), whole)
    held = {name for name, _ in saved_state(whole[1])}
    before, after = weights(whole[1], "saved_working"), weights(whole[1], "working")
    assert held == {name for name in before if "lora_" in name}
    assert {name for name in before if not torch.equal(before[name], after[name])} == held


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize(("stage", "to_stage", "to_world"), [(0, 3, 2), (3, 2, 1), (2, 1, 4), (1, 0, 2)])
def test_adapters_train_the_same_at_any_stage(
    run: Runs, assert_close: Callable[..., None], stage: int, to_stage: int, to_world: int, kind: str
) -> None:
    call: dict[str, Any] = {"dtype": "float32", "adapters": ADAPTERS[kind]}
    plain = run(1, "train", stage=0, **call)
    whole = run(2, "train", stage=stage, **call)
    assert_close(whole, plain, loss=1e-6, norm=1e-5, weight=1e-5)
    resumed = run(to_world, "train", stage=to_stage, load=str(whole[1]), **call)
    assert_close(resumed, whole, loss=1e-6, norm=1e-5, weight=1e-5)


MISUSE = {
    "other size": "five is [5], the model's [4]",
    "round robin": "round_robin_gradients is true",
    "missing": "more is missing",
    "frozen": "mlp.bias is not in the model, or frozen there",
    "early step": "step after 1 of 2 micro-batches",
    "late step": "all micro-batches of the step are done",
    "inside a step": "between two steps only",
}


# What refuses them knows no stage.
@pytest.mark.parametrize(
    ("kind", "stage"), matrix(MISUSE, STAGES, chosen=[(kind, i % 4) for i, kind in enumerate(MISUSE)])
)
def test_misuse_is_named(run: Runs, kind: str, stage: int) -> None:
    _, folder = run(1, "train", stage=2, dtype="float32")
    answer, _ = run(1, "refused", stage=stage, folder=str(folder), kind=kind)
    assert MISUSE[kind] in answer


@pytest.mark.parametrize("damage", ["rank", "file"])
def test_an_incomplete_set_of_fragments_is_refused(run: Runs, damage: str) -> None:
    _, folder = run(2, "train", stage=2, dtype="float32", dropout=0.5)
    if damage == "rank":
        (folder / "rank00001.json").rename(folder / "moved")
        message = "1 rank*.json of 2"
    else:
        (folder / "moved").rename(folder / "rank00001.json")
        record = json.loads((folder / "rank00001.json").read_text())
        (folder / "rank00001.json").write_text(json.dumps(record | {"files": []}))
        message = "fragments cover"
    answer, _ = run(1, "refused", stage=2, folder=str(folder), kind=damage)
    assert message in answer


LARGE = {f"part{i}": [4096, 2048] for i in range(10)}  # 1 GB of state
PIECE_ELEMENTS = 2**19
PIECES_A_FILE = 16
LARGE_FILE_BYTES = 12 * PIECE_ELEMENTS * PIECES_A_FILE  # 100 MB


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A checkpoint of four ranks with several files each, as fragments.py describes it."""
    folder, ranks, numel = tmp_path_factory.mktemp("large"), 4, 4096 * 2048
    for rank in range(ranks):
        starts = range(numel * rank // ranks, numel * (rank + 1) // ranks, PIECE_ELEMENTS)
        pieces = [(name, start) for name in LARGE for start in starts]
        files: list[str] = []
        for low in range(0, len(pieces), PIECES_A_FILE):
            tensors = {}
            for name, start in pieces[low : low + PIECES_A_FILE]:
                values = torch.arange(start, start + PIECE_ELEMENTS, dtype=torch.float32).remainder_(2**20)
                for kind, share in zip(fragments.KINDS, (1, 0.5, 0.25), strict=True):
                    tensors[f"{name}|{kind}|{start}"] = values * share
            files.append(f"rank{rank:05d}-{len(files):05d}.safetensors")
            save_file(tensors, folder / files[-1])
        record = {"format": fragments.FORMAT, "rank": rank, "world": ranks, "zero_stage": 3, "optimizer_step": 1,
                  "global_steps": 1, "skipped_steps": 0, "loss_scaler": None, "parameters": LARGE,
                  "files": files}  # fmt: skip
        (folder / f"rank{rank:05d}.json").write_text(json.dumps(record))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize(("stage", "world"), matrix(STAGES, WORLDS, chosen=[(0, 1), (3, 2)]))
def test_loading_takes_the_memory_of_a_file_not_of_the_checkpoint(
    run: Runs, large: Path, record_property: Callable[[str, object], None], stage: int, world: int
) -> None:
    taken, _ = run(world, "load_memory", stage=stage, folder=str(large), shapes=LARGE)
    record_property("extra", taken["extra"])
    assert taken["extra"] <= LARGE_FILE_BYTES


def test_training_loads_no_compiler(run: Runs) -> None:
    run(2, "train", stage=2, dtype="float32")
    names = ["deepspeed.runtime.zero.muon.original_muon", "torch._inductor.compile_fx"]
    assert run(2, "loaded", names=names)[0] == names[:1]


def test_weight_decay_is_for_matrices_only() -> None:
    module = torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    module[0].requires_grad_(False)
    decayed, others = zero.parameter_groups(module, weight_decay=0.1)
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.1, 0.0)
    assert decayed["params"] == [module[1].weight]
    assert others["params"] == [module[1].bias, module[2].weight, module[2].bias]
    assert len(zero.parameter_groups(module, weight_decay=0.0)) == 1


def test_parameters_with_a_rate_of_their_own_are_groups_of_their_own() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    groups = zero.parameter_groups(module, weight_decay=0.1, rate_factors={"1.": 5.0})
    assert [(group["rate_factor"], group["weight_decay"]) for group in groups] == [
        (1.0, 0.1), (1.0, 0.0), (5.0, 0.1), (5.0, 0.0),
    ]  # fmt: skip
    assert [group["params"] for group in groups] == [
        [module[0].weight], [module[0].bias], [module[1].weight], [module[1].bias],
    ]  # fmt: skip


def test_the_configuration_names_what_it_does_not_know() -> None:
    known = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match="zero_stage is 4"):
        zero.deepspeed_config(zero_stage=4, dtype="float32", **known)
    with pytest.raises(ValueError, match="dtype is 'int8', it must be one of float32, bfloat16, float16"):
        zero.deepspeed_config(zero_stage=2, dtype="int8", **known)
