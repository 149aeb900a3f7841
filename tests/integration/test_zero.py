"""The private fields of DeepSpeed that zero.py and fragments.py stand on, held by behaviour on one and two gloo ranks.

Ranks are processes of zero_worker.py, one group per world size; every wait has a deadline.
"""

import json
import math
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ray_kd.trainer import fragments, zero

ROOT = Path(__file__).parents[2]
STAGES = (0, 1, 2, 3)
WORLDS = (1, 2)
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
            assert "ok" in answer, f"{call}: {answer['error']}"
            answers.append(answer["ok"])
        return answers

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
        self.groups = {world: Group(world, folder) for world in WORLDS}
        self.done: dict[str, Any] = {}

    def __call__(self, world: int, case: str, **arguments: Any) -> tuple[Any, Path]:
        """The answer, and the path its files are named after."""
        key = json.dumps([world, case, arguments])
        if key not in self.done:
            out = self.folder / f"{len(self.done):03d}-{case}"
            named = {} if case == "refused" else {"out": str(out)}
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


def weights(out: Path, kind: str) -> dict[str, torch.Tensor]:
    return load_file(f"{out}.{kind}.safetensors")


def assert_bitwise(one: tuple[Any, Path], other: tuple[Any, Path]) -> None:
    assert one[0] == other[0]
    for kind in ("master", "working"):
        a, b = weights(one[1], kind), weights(other[1], kind)
        assert a.keys() == b.keys()
        assert [name for name in a if not torch.equal(a[name], b[name])] == []


def assert_close(
    one: tuple[Any, Path], other: tuple[Any, Path], loss: float, norm: float, weight: float | None
) -> None:
    """loss and norm (of the gradient, of the first moment): relative; weight: absolute, None to leave weights out."""
    for a, b in zip(one[0]["steps"], other[0]["steps"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=loss)
        assert a["norm"] == pytest.approx(b["norm"], rel=norm)
        assert a["applied"] == b["applied"]
    if "moment" in one[0]:
        assert one[0]["moment"] == pytest.approx(other[0]["moment"], rel=norm)
    if weight is None:
        return
    a, b = weights(one[1], "master"), weights(other[1], "master")
    assert a.keys() == b.keys()
    assert max((a[name] - b[name]).abs().max().item() for name in a) <= weight


# fp16 adds only the loss scale, which is the same on all ranks.
@pytest.mark.parametrize(
    ("dtype", "world"), [("float32", 1), ("float32", 2), ("bfloat16", 1), ("bfloat16", 2), ("float16", 1)]
)
@pytest.mark.parametrize("stage", STAGES)
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


@pytest.mark.parametrize("world", WORLDS)
def test_resume_with_bf16_optimizer_is_bitwise(run: Runs, world: int) -> None:
    call = {"stage": 1, "dtype": "bfloat16", "options": {"data_types": {"grad_accum_dtype": "fp32"}}}
    whole = run(world, "train", **call)
    assert_bitwise(run(world, "train", load=str(whole[1]), **call), whole)


TRANSITIONS = [
    *((1, stage, 1, to) for stage in STAGES for to in STAGES if stage != to),
    *((2, stage, 2, (stage + 1) % 4) for stage in STAGES),
    *((world, stage, 3 - world, to) for world in WORLDS for stage in STAGES for to in (stage, (stage + world) % 4)),
]


@pytest.mark.parametrize(("world", "stage", "to_world", "to_stage"), TRANSITIONS)
def test_any_stage_and_rank_count_reads_any_other(
    run: Runs, world: int, stage: int, to_world: int, to_stage: int
) -> None:
    whole = run(world, "train", stage=stage, dtype="float32")
    resumed = run(to_world, "train", stage=to_stage, dtype="float32", load=str(whole[1]))
    assert_close(resumed, whole, loss=1e-6, norm=1e-6, weight=1e-6)
    assert resumed[0]["counters"] == whole[0]["counters"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_bf16_checkpoint_changes_stage(run: Runs, stage: int) -> None:
    whole = run(2, "train", stage=stage, dtype="bfloat16")
    resumed = run(1, "train", stage=(stage + 1) % 4, dtype="bfloat16", load=str(whole[1]))
    assert_close(resumed, whole, loss=2e-3, norm=2e-2, weight=None)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_split_files_hold_each_element_once(run: Runs, stage: int, world: int) -> None:
    whole = run(world, "train", stage=stage, dtype="float32")
    split = run(world, "train", stage=stage, dtype="float32", piece_elements=7, max_file_bytes=2000)
    files = sorted(split[1].glob("rank*-*.safetensors"))
    assert len(files) > 3 * world
    assert all(sum(t.nbytes for t in load_file(file).values()) <= 2000 for file in files)
    assert_bitwise(run(world, "train", stage=stage, dtype="float32", load=str(split[1])), whole)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_the_master_and_its_rounding(run: Runs, stage: int, dtype: str, world: int) -> None:
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


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_the_plain_sum_over_micro_batches_and_ranks(run: Runs, stage: int, world: int) -> None:
    plain = run(1, "plain")
    assert plain[0]["steps"][0]["norm"] > 0.3  # clipped
    split = run(world, "normalise", stage=stage, dtype="float32")
    assert_close(split, plain, loss=1e-6, norm=1e-5, weight=1e-5)
    assert_close(split, run(3 - world, "normalise", stage=stage, dtype="float32"), loss=1e-6, norm=1e-5, weight=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stage", STAGES)
def test_half_precision_differs_by_rounding_only(run: Runs, stage: int, dtype: str) -> None:
    half = run(2, "normalise", stage=stage, dtype=dtype)
    # Weights are no measure: Adam turns the sign noise of a tiny gradient into a full step.
    assert_close(half, run(1, "plain"), loss=3e-3, norm=2e-2, weight=None)


@pytest.mark.parametrize("kind", ["both", "loss", "gradient"])
@pytest.mark.parametrize(("dtype", "world"), [("float32", 1), ("float32", 2), ("bfloat16", 2), ("float16", 1)])
@pytest.mark.parametrize("stage", STAGES)
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


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("options", "bad"),
    [
        ({"initial_scale_power": 2, "hysteresis": 1}, [False, False, True, True]),  # 4, 2, and 1 is the smallest
        ({"loss_scale": 4}, [True, True, True, True]),
    ],
)
def test_an_fp16_overflow_is_bad_when_no_smaller_scale_is_left(
    run: Runs, stage: int, options: dict[str, Any], bad: list[bool]
) -> None:
    first, *overflows = run(1, "overflow", stage=stage, options=options)[0]
    assert (first["applied"], first["bad"]) == (True, False)
    assert [step["applied"] for step in overflows] == [False] * 4
    assert [step["bad"] for step in overflows] == bad


@pytest.mark.parametrize("stage", STAGES)
def test_an_engine_that_went_on_can_load(run: Runs, stage: int) -> None:
    answer, _ = run(2, "rollback", stage=stage, dtype="bfloat16")
    assert answer["first"] == answer["second"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("other size", "five is [5], the model's [4]"),
        ("missing", "more is missing"),
        ("frozen", "mlp.bias is not in the model, or frozen there"),
        ("round robin", "round_robin_gradients is true"),
        ("early step", "step after 1 of 2 micro-batches"),
        ("late step", "all micro-batches of the step are done"),
        ("inside a step", "between two steps only"),
    ],
)
def test_misuse_is_named(run: Runs, kind: str, message: str) -> None:
    _, folder = run(1, "train", stage=2, dtype="float32")
    for stage in (1, 2) if kind == "round robin" else STAGES:
        answer, _ = run(1, "refused", stage=stage, folder=str(folder), kind=kind)
        assert message in answer


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


def test_the_configuration_names_what_it_does_not_know() -> None:
    known = {"micro_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0}
    with pytest.raises(ValueError, match="zero_stage is 4"):
        zero.deepspeed_config(zero_stage=4, dtype="float32", **known)
    with pytest.raises(ValueError, match="dtype is 'int8', it must be one of float32, bfloat16, float16"):
        zero.deepspeed_config(zero_stage=2, dtype="int8", **known)
