"""One rank of a gloo group that runs the cases of test_zero.py: `python zero_worker.py RANK WORLD STORE_FILE`.

A line of JSON on stdin is a call {"case": name, ...arguments}, a line on the original stdout its result. One process
group runs many cases, for importing deepspeed takes seconds.
"""

import json
import math
import os
import random
import sys
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from ray_kd import models
from ray_kd.config import Lora
from ray_kd.losses import fused_linear_kd_loss
from ray_kd.trainer import fragments, rng, zero

if TYPE_CHECKING:
    from ray_kd.losses.terms import Factors
    from ray_kd.trainer.collate import MicroBatch
    from ray_kd.trainer.step import DistillModule

VOCAB, WIDTH, LENGTH = 64, 16, 12
RATE = 1e-2


class Tiny(nn.Module):
    """A causal-LM stand-in with what makes partitions awkward: tied, frozen, 5-element and bias parameters."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.frozen = nn.Linear(WIDTH, WIDTH)
        self.frozen.requires_grad_(False)
        self.mlp = nn.Linear(WIDTH, WIDTH)
        self.five = nn.Parameter(torch.linspace(-0.1, 0.1, 5))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        h = self.dropout(self.norm(self.embed(tokens)))
        h = h + torch.tanh(self.mlp(self.frozen(h)))
        h = h * F.pad(self.five, (0, WIDTH - 5), value=1.0)
        logits = self.head(self.dropout(h)[labels >= 0])
        return F.cross_entropy(logits.float(), labels[labels >= 0], reduction="sum") * scale


class Adapted(nn.Module):
    """A Llama with adapters under the fused loss, whose head is frozen, as the trainer has it."""

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
            num_attention_heads=2, initializer_range=0.2,
        )  # fmt: skip
        self.student = models.choose_trainable(LlamaForCausalLM(config), Lora(**options), [], seed=3)

    def forward(self, tokens: torch.Tensor, labels: torch.Tensor, scale: float) -> torch.Tensor:
        positions = torch.arange(LENGTH).expand_as(tokens)
        hidden = models.decoder_hidden(self.student, tokens, positions)[labels >= 0]
        labels = labels[labels >= 0]
        head = models.base_causal_lm(self.student).get_output_embeddings()
        teacher = labels[:, None], torch.full_like(labels[:, None], -0.1, dtype=torch.float32)
        return fused_linear_kd_loss(hidden, head.weight, *teacher, labels, num_valid_tokens=1).loss * scale


def full_parameters(
    engine: Any, module: nn.Module, *, master: bool = False
) -> Iterator[tuple[str, torch.Tensor | None]]:
    """(name, whole parameter on the CPU | None on ranks other than 0), one at a time, frozen ones included.

    master: the fp32 weights the optimizer steps on; else the working weights, in their dtype. A tied parameter comes
    once. Collective: every rank must run the iterator to its end. Costs one whole parameter on each rank's device.
    """
    deepspeed = zero.import_deepspeed()
    is_writer = torch.distributed.get_rank() == 0
    twins = fragments.master_twins(engine) if engine.zero_optimization_stage() == 0 else {}
    for name, p in module.named_parameters():
        value = None
        if master and p.requires_grad:
            value = twins[id(p)] if twins else deepspeed.utils.safe_get_full_fp32_param(p)
        with deepspeed.zero.GatheredParameters([p], enabled=value is None and hasattr(p, "ds_id")):
            source = (p if value is None else value).detach()
            dtype = torch.float32 if master else source.dtype
            copy = source.to("cpu", dtype, copy=True) if is_writer else None
        yield name, copy


def micro_batches(step: int, total: int, ragged: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The total micro-batches of a global batch, the same on any topology; ragged: uneven, 0 and 1 without a label."""
    generator = torch.Generator().manual_seed(1000 + step)
    batches = []
    for i in range(total):
        tokens = torch.randint(VOCAB, (2, LENGTH), generator=generator)
        labels = tokens.roll(-1, dims=1)
        valid = LENGTH - 1 if not ragged else 0 if i < 2 else 1 + (5 * i + step) % (LENGTH - 1)
        labels[:, valid:] = -100
        batches.append((tokens, labels))
    return batches


def build(
    stage: int,
    dtype: str,
    total: int,
    dropout: float = 0.0,
    clip: float = 1.0,
    zero_options: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
    module: nn.Module | None = None,
    adapters: dict[str, Any] | None = None,
) -> Any:
    world = torch.distributed.get_world_size()
    torch.manual_seed(7)
    module = module or (Tiny(dropout) if adapters is None else Adapted(adapters))
    config = zero.deepspeed_config(
        zero_stage=stage,
        micro_batch_size=2,
        gradient_accumulation_steps=total // world,
        dtype=dtype,
        max_grad_norm=clip,
    )
    # So that some of these tiny parameters are gathered for use and some are not.
    config["zero_optimization"].update({"stage3_param_persistence_threshold": 100} | (zero_options or {}))
    config.update(options or {})
    engine = zero.initialize(module, config, learning_rate=RATE, weight_decay=0.1, betas=(0.9, 0.95))
    torch.manual_seed(random.randrange(2**30))  # dropout differs between ranks, and a resumed process starts elsewhere
    return engine


def small_scale(dtype: str, **more: int) -> dict[str, Any]:
    """fp16 begins with a scale of 256, so that no step is skipped."""
    return {"fp16": {"enabled": True, "initial_scale_power": 8} | more} if dtype == "float16" else {}


def run_step(engine: Any, step: int, total: int, ragged: bool = False, poison: str = "") -> dict[str, Any]:
    """One optimiser step as the trainer makes it. The loss is that of the global batch.

    poison: what becomes infinite or NaN in the last rank's first micro-batch: both | loss | gradient.
    """
    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    batches = micro_batches(step, total, ragged)
    num_valid = sum(int((labels >= 0).sum()) for _, labels in batches)
    zero.set_learning_rate(engine, rate(step))
    loss_sum = torch.zeros(())
    for i, batch in enumerate(batches[rank * total // world : (rank + 1) * total // world]):
        bad = poison if i == 0 and rank == world - 1 else ""
        loss = engine(*batch, math.inf if bad == "both" else 1.0 / num_valid)
        if bad == "loss":
            loss = loss + math.inf
        elif bad == "gradient":
            loss.register_hook(lambda gradient: gradient * math.nan)
        loss_sum += loss.detach()
        zero.backward(engine, loss, world)
    torch.distributed.all_reduce(loss_sum)
    norm, applied, bad_step = zero.step(engine, loss_sum.item())
    return {"loss": loss_sum.item(), "norm": norm, "applied": applied, "bad": bad_step}


def rate(step: int) -> float:
    return RATE / (1 + step)


def dump(engine: Any, path: str, master: bool = True) -> None:
    weights = dict(full_parameters(engine, engine.module, master=master))
    if torch.distributed.get_rank() == 0:
        save_file(weights, path)
    else:
        assert set(weights.values()) == {None}


def save(engine: Any, folder: str) -> None:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    Path(folder).mkdir(parents=True, exist_ok=True)
    files = fragments.write_fragments(fragments.copy_fragments(engine, engine.module, at_once=world == 2), Path(folder))
    assert all((Path(folder) / name).is_file() for name in files)
    rng.save_rng(rng.rng_state(), Path(folder), rank)


def train(
    stage: int,
    dtype: str,
    out: str,
    load: str = "",
    total: int = 4,
    piece_elements: int = 2**26,
    max_file_bytes: int = 2 * 10**9,
    options: dict[str, Any] | None = None,
    **build_options: Any,
) -> dict[str, Any]:
    """Steps 0-2, a checkpoint `out`, steps 3-5; with load only the latter, resumed from it, and `out` is it again.

    In fp16 step 1 overflows, which makes a loss scale of 128 of 256, and two or three good steps later it is 256 again.
    Dumps the weights of the checkpoint and of the end.
    """
    fragments._PIECE_ELEMENTS, fragments.MAX_FILE_BYTES = piece_elements, max_file_bytes
    options = small_scale(dtype, hysteresis=1, loss_scale_window=3) | (options or {})
    engine = build(stage, dtype, total, options=options, **build_options)
    if load:
        fragments.load_fragments(engine, engine.module, Path(load))
        rng.load_rng(Path(load), torch.distributed.get_rank())
    else:
        for step in range(3):
            run_step(engine, step, total, poison="gradient" if dtype == "float16" and step == 1 else "")
    save(engine, out)
    dump(engine, f"{out}.saved_master.safetensors")
    dump(engine, f"{out}.saved_working.safetensors", master=False)
    steps = [run_step(engine, step, total) for step in range(3, 6)]
    dump(engine, f"{out}.master.safetensors")
    dump(engine, f"{out}.working.safetensors", master=False)
    counters = {
        "global_steps": engine.global_steps,
        "skipped_steps": engine.skipped_steps,
        "global_samples": engine.global_samples,
        "micro_steps": engine.micro_steps * torch.distributed.get_world_size(),
    }
    scaler = fragments.scaler_state(engine)
    engine.destroy()
    return {"steps": steps, "counters": counters, "scaler": scaler}


def normalise(stage: int, dtype: str, out: str, total: int = 8) -> dict[str, Any]:
    """Three steps on ragged and empty micro-batches, with clipping at work."""
    engine = build(stage, dtype, total, clip=0.3, options=small_scale(dtype))
    steps = [run_step(engine, step, total, ragged=True) for step in range(3)]
    dump(engine, f"{out}.master.safetensors")
    moment = first_moment_norm(engine)
    engine.destroy()
    return {"steps": steps, "moment": moment}


def first_moment_norm(engine: Any) -> float:
    """Tells a gradient that reached Adam at another scale, which its update hides."""
    state = fragments.inner_optimizer(engine).state
    square = sum(
        (
            fragments._view(fragment, state[fragment.flat]["exp_avg"]).square().sum()
            for fragment in fragments.iter_fragments(engine, engine.module.named_parameters())
        ),
        torch.zeros(()),
    )
    if engine.zero_optimization_stage() > 0:
        torch.distributed.all_reduce(square)
    return square.sqrt().item()


def plain(out: str, total: int = 8) -> dict[str, Any]:
    """What `normalise` must give, in torch alone: one loss over the global batch."""
    torch.manual_seed(7)
    module = Tiny(0.0)
    decayed = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed}, {"params": others, "weight_decay": 0.0}], weight_decay=0.1, betas=(0.9, 0.95)
    )
    steps = []
    for step in range(3):
        batches = micro_batches(step, total, ragged=True)
        tokens, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        loss = module(tokens, labels, 1.0 / int((labels >= 0).sum()))
        loss.backward()
        norm = sum(p.grad.square().sum() for p in decayed + others).sqrt()
        for p in decayed + others:
            p.grad *= min(1.0, 0.3 / (norm.item() + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss.item(), "norm": norm.item(), "applied": True, "bad": False})
    save_file({name: p.detach() for name, p in module.named_parameters()}, f"{out}.master.safetensors")
    moment = sum(optimizer.state[p]["exp_avg"].square().sum() for p in decayed + others).sqrt().item()
    return {"steps": steps, "moment": moment}


def poison(stage: int, dtype: str, out: str, kind: str) -> dict[str, Any]:
    """Step 0, a step of other data that is poisoned by kind ("" leaves it out), a checkpoint, step 2."""
    engine = build(stage, dtype, total=4, options=small_scale(dtype))
    steps = [run_step(engine, 0, 4)]
    moment = first_moment_norm(engine)
    dump(engine, f"{out}.before.safetensors")
    if kind:
        steps.append(run_step(engine, 1, 4, poison=kind))
        assert first_moment_norm(engine) == moment
        dump(engine, f"{out}.after.safetensors")
    save(engine, out)
    steps.append(run_step(engine, 2, 4))
    dump(engine, f"{out}.master.safetensors")
    dump(engine, f"{out}.working.safetensors", master=False)
    counters = [engine.global_steps, engine.skipped_steps, fragments._optimizer_step(engine)]
    fragments.load_fragments(engine, engine.module, Path(out))
    again = run_step(engine, 2, 4)
    engine.destroy()
    return {"steps": steps, "again": again, "counters": counters}


def overflow(stage: int, out: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Five fp16 steps, all but the first with a NaN gradient and a finite loss."""
    engine = build(stage, "float16", total=2, options={"fp16": {"enabled": True} | options})
    steps = [run_step(engine, step, 2, poison="gradient" if step else "") for step in range(5)]
    engine.destroy()
    return steps


def rollback(stage: int, dtype: str, out: str) -> dict[str, Any]:
    """Load into an engine that has already gone on."""
    engine = build(stage, dtype, total=2)
    run_step(engine, 0, 2)
    save(engine, out)
    first = [run_step(engine, step, 2) for step in (1, 2)]
    fragments.load_fragments(engine, engine.module, Path(out))
    second = [run_step(engine, step, 2) for step in (1, 2)]
    engine.destroy()
    return {"first": first, "second": second}


def refused(stage: int, folder: str, kind: str) -> str:
    """The message of the ValueError or AssertionError that a misuse raises."""
    module = Tiny(0.0)
    if kind == "other size":
        module.five = nn.Parameter(torch.zeros(4))
    elif kind == "missing":
        module.more = nn.Parameter(torch.zeros(3))
    elif kind == "frozen":
        module.mlp.bias.requires_grad_(False)
    options = {"round_robin_gradients": True} if kind == "round robin" else {}
    engine = build(stage, "float32", 2, module=module, zero_options=options)
    try:
        if kind == "early step":
            batch = micro_batches(0, 2, False)[0]
            zero.backward(engine, engine(*batch, 1.0), 1)
            zero.step(engine, 0.0)
        elif kind == "late step":
            for batch in micro_batches(0, 3, False):
                zero.backward(engine, engine(*batch, 1.0), 1)
        elif kind == "inside a step":
            zero.backward(engine, engine(*micro_batches(0, 2, False)[0], 1.0), 1)
            save(engine, folder)
        elif kind == "round robin":
            save(engine, folder)
        else:
            fragments.load_fragments(engine, engine.module, Path(folder))
    except (ValueError, AssertionError) as error:
        return str(error)
    finally:
        engine.destroy()
    return "nothing was raised"


class Large(nn.Module):
    """Parameters and nothing else: it is loaded, not run."""

    def __init__(self, shapes: dict[str, list[int]]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def load_memory(stage: int, out: str, folder: str, shapes: dict[str, list[int]]) -> dict[str, int]:
    """The most bytes, of any rank, that loading took besides the moments, which did not exist before; file pages too.

    Element i of each parameter must be i modulo 2**20, its moments a half and a quarter of that.
    """
    engine = build(stage, "float32", total=2, module=Large(shapes))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = memory("VmRSS")
    fragments.load_fragments(engine, engine.module, Path(folder))
    taken = memory("VmHWM") - before
    state = fragments.inner_optimizer(engine).state
    flats = {fragment.flat for fragment in fragments.iter_fragments(engine, engine.module.named_parameters())}
    moments = sum(2 * flat.nbytes for flat in flats)
    for fragment in fragments.iter_fragments(engine, engine.module.named_parameters()):
        stop = fragment.start + fragment.length
        expected = torch.arange(fragment.start, stop, dtype=torch.float32).remainder_(2**20)
        for kind, share in zip(fragments.KINDS, (1, 0.5, 0.25), strict=True):
            tensor = fragment.flat if kind == "fp32" else state[fragment.flat][kind]
            assert torch.equal(fragments._view(fragment, tensor), expected * share), (fragment.name, kind)
    engine.destroy()
    numbers = torch.tensor([taken - moments, moments])
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MAX)
    return dict(zip(("extra", "moments"), numbers.tolist(), strict=True))


def memory(field: str) -> int:
    """Bytes, of this process."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def loaded(out: str, names: list[str]) -> list[str]:
    """Which of these modules this process has imported."""
    return [name for name in names if name in sys.modules]


def features(stage: int, dtype: str, out: str, load: str = "", total: int = 4) -> dict[str, Any]:
    """The trainer's own steps 1-2 with every kind of term, a checkpoint `out`, steps 3-4; with load only the latter.

    Some rows are refused, one micro-batch has none that is usable. The temperature and a weight change.
    """
    module = _distill_module()
    config = zero.deepspeed_config(
        zero_stage=stage, micro_batch_size=3, gradient_accumulation_steps=total // torch.distributed.get_world_size(),
        dtype=dtype, max_grad_norm=1.0,
    ) | small_scale(dtype)  # fmt: skip
    config["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    engine = zero.initialize(
        module, config, learning_rate=RATE, weight_decay=0.1, learning_rates=module.learning_rates
    )  # fmt: skip
    if load:
        fragments.load_fragments(engine, engine.module, Path(load))
    else:
        first = [_feature_step(engine, step, total) for step in (1, 2)]
        assert all(step["applied"] for step in first)
    save(engine, out)
    steps = [_feature_step(engine, step, total) for step in (3, 4)]
    dump(engine, f"{out}.master.safetensors")
    dump(engine, f"{out}.working.safetensors", master=False)
    engine.destroy()
    return {"steps": steps}


def _distill_module() -> "DistillModule":
    from ray_kd.trainer.step import DistillModule
    from tests import fake_stream

    options = {"divergence": "forward_kl", "tail": "renormalize", "payload_temperature": 1.0, "chunk_size": 8}
    return DistillModule(fake_stream.student(torch.float32), options, features=fake_stream.terms(), seed=4)


def _feature_step(engine: Any, step: int, total: int) -> dict[str, Any]:
    from ray_kd.trainer.step import Flags, train_step

    zero.set_learning_rate(engine, rate(step))
    result = train_step(engine, _feature_batches(step, total), torch.device("cpu"), Flags(0, 0, 0, 0), _factors(step))
    return {"loss": result.metrics["loss"], "norm": result.grad_norm, "applied": result.is_applied,
            "metrics": result.metrics}  # fmt: skip


def _feature_batches(step: int, total: int) -> "list[MicroBatch]":
    """This rank's of the global batch, which is the same on any topology."""
    from tests import fake_stream

    world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    usable = [(1, 1, 1), (0, 1, 0), (0, 0, 0), (1, 0, 1)]
    return [
        fake_stream.micro_batch(10 * step + i, usable[i % 4], first_slot=3 * i)
        for i in range(rank * total // world, (rank + 1) * total // world)
    ]


def _factors(step: int) -> "Factors":
    from ray_kd.losses.terms import Schedules, parse_terms
    from tests import fake_stream

    falling = {"schedule": "linear", "start": 2.0, "end": 0.5, "steps": 4}
    terms = [fake_stream.TERMS[0] | {"weight": falling}, *fake_stream.TERMS[1:]]
    return Schedules.of(parse_terms(terms), {"schedule": "cosine", "start": 3.0, "end": 1.0, "steps": 4}).at(step)


def plain_features(out: str, total: int = 4) -> dict[str, Any]:
    """What `features` must give, on one rank and by torch's AdamW."""
    from ray_kd.trainer.step import Scale

    module = _distill_module()
    own_rate = ("projectors.hidden_state_1.", 3e-2 / RATE)
    groups = []
    for name, p in module.named_parameters():
        factor = own_rate[1] if name.startswith(own_rate[0]) else 1.0
        groups.append({"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0, "factor": factor})
    optimizer = torch.optim.AdamW(groups, lr=RATE)
    steps = []
    for step in range(1, 5):
        batches, factors = _feature_batches(step, total), _factors(step)
        counts = {name: sum(term.count(b.features) for b in batches) for name, term in module.features.items()}
        scale = Scale(sum(len(b.labels) for b in batches), factors, counts)
        loss = sum(module(b.input_ids, b.position_ids, b, scale) for b in batches)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step) * group["factor"]
        optimizer.step()
        optimizer.zero_grad()
        steps.append({"loss": loss.item(), "norm": norm.item(), "applied": True})
    save_file({name: p.detach() for name, p in module.named_parameters()}, f"{out}.master.safetensors")
    return {"steps": steps[2:]}


CASES = {
    case.__name__: case
    for case in (
        train, normalise, plain, poison, overflow, rollback, refused, load_memory, loaded, features, plain_features
    )
}  # fmt: skip


def main() -> None:
    rank, world, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    # Libraries print to stdout: keep the real one for results.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=180)
    )
    for line in sys.stdin:
        call = json.loads(line)
        try:
            result = {"ok": CASES[call.pop("case")](**call)}
        except Exception:
            result = {"error": traceback.format_exc()}
        print(json.dumps(result), file=results, flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
