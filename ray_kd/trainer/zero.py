"""Everything about training that knows DeepSpeed: its configuration, the loss scaling, the step.

    engine = initialize(module, deepspeed_config(...), learning_rate=2e-4)
    for each step:
        set_learning_rate(engine, lr)
        for each of gradient_accumulation_steps micro-batches:
            loss = engine(...)                  # sum over this micro-batch's tokens / valid tokens of the global batch
            backward(engine, loss, world)
        outcome = step(engine, loss)            # loss: the step's, over all micro-batches and ranks

All ranks must run the same number of micro-batches, empty ones included (forward and backward both), or DeepSpeed
hangs. Checkpoints: `fragments.py`. Checked with deepspeed 0.19.8, held by `tests/integration/test_zero.py`.
"""

import importlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import nn

from ray_kd.errors import ConfigError
from ray_kd.trainer.fragments import inner_optimizer, load_scaler_state, scaler_state

_MUON = "deepspeed.runtime.zero.muon.original_muon"
DTYPES = ("float32", "bfloat16", "float16")

_OWN_KEYS = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "optimizer": "train.learning_rate and train.weight_decay",
    "scheduler": "train.schedule",
    "zero_optimization.stage": "train.zero_stage",
    "bf16.enabled": "student.dtype",
    "bfloat16": "student.dtype",
    "fp16.enabled": "student.dtype",
    "torch_autocast": "student.dtype",
}
"""Entry of DeepSpeed's configuration -> the key of ours that says it, to the trainer and to a resume as well."""

_FP32_STATE = "a checkpoint holds fp32 weights and moments"
_NOT_COVERED = "checkpoints do not cover it"
_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "bf16.check_grad_overflow": ((True,), "a NaN gradient would reach the weights"),
    "bf16.bf16_master_weights_and_grads": ((False,), _FP32_STATE),
    "bf16.bf16_optimizer_states": ((False,), _FP32_STATE),
    "fp16.fp16_master_weights_and_grads": ((False,), _FP32_STATE),
    "gradient_allreduce_op": (("mean",), "the loss is scaled for it"),
    "managed_gradient_accumulation": ((True,), "micro-batches are counted by it"),
    "zero_optimization.compute_grad_norm": ((True,), "the norm tells a step that is not finite"),
    "zero_optimization.round_robin_gradients": ((False,), _NOT_COVERED),
    "zero_optimization.zero_hpz_partition_size": ((1,), _NOT_COVERED),
    "zero_optimization.zenflow": ((None,), _NOT_COVERED),
    "zero_optimization.offload_optimizer.device": (("none", "cpu"), _NOT_COVERED),
    "zero_optimization.offload_param.device": (("none", "cpu"), _NOT_COVERED),
    "tensor_parallel": ((None,), _NOT_COVERED),
    "expert_parallel": ((None,), _NOT_COVERED),
}
"""Entry -> the values that `backward`, `step` and the fragments stand on, and why."""


def import_deepspeed(on_gpu: bool = False) -> ModuleType:
    """Import deepspeed quietly and without its compilers; the only way ray_kd imports it. 1-7 s the first time.

    On the CPU its communication backend builds an extension with g++ (38 s and more, behind a lock that a killed
    build leaves for ever) which training never calls: declared incompatible, it is not built.
    """
    if not on_gpu:
        # Read at import. A worker without a GPU of its own may still see the machine's, and DeepSpeed would take it.
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    from deepspeed.runtime import compiler

    if _MUON not in sys.modules:
        # ZeRO asks whether the optimizer is a Muon, and importing that runs torch.compile as a decorator: 2 s of
        # loading the compiler in each rank for functions nobody calls.
        torch_compile, compiler.compile = compiler.compile, lambda: compiler.dummy_decorator
        try:
            importlib.import_module(_MUON)
        finally:
            compiler.compile = torch_compile
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # deepspeed 0.19 under torch 2.13 warns of renamed collectives anew at every call on every rank.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is deprecated", category=FutureWarning)
    return deepspeed


def deepspeed_config(
    *,
    zero_stage: int,
    micro_batch_size: int,
    gradient_accumulation_steps: int,
    dtype: str,
    max_grad_norm: float,
    on_gpu: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """DeepSpeed's configuration. dtype: of the working weights, one of DTYPES. max_grad_norm: 0 for no clipping.

    Half precision keeps an fp32 master at every stage. Raises ValueError for a stage or dtype it does not know.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage is {zero_stage}, it must be 0, 1, 2 or 3")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is '{dtype}', it must be one of {', '.join(DTYPES)}")
    # Elements. On the CPU the default of 5e8 is memory for nothing; on a GPU 5e7 (100 MB in bf16) fills the links.
    bucket = 50_000_000 if on_gpu else 5_000_000
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": gradient_accumulation_steps,
        "gradient_clipping": max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": zero_stage,
            # gloo has no stream to overlap on: 2-3 times slower. Said for every stage, stage 3's default is true.
            "overlap_comm": on_gpu,
            "contiguous_gradients": True,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
            "stage3_prefetch_bucket_size": bucket,
            "round_robin_gradients": False,
        },
        # It synchronises the device twice a step to measure what the metrics measure anyway.
        "timers": {"throughput": {"enabled": False}},
    }
    if dtype == "bfloat16":
        # Without check_grad_overflow stages 1 and 2 let a NaN gradient reach bf16 weights.
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
        if zero_stage in (2, 3):
            # A sum of many micro-batches loses its last bits in bf16. Stage 0 cannot do better; stage 1 would take
            # BF16_Optimizer, which prints memory statistics and keeps all fp32 gradients on all ranks.
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    elif dtype == "float16":
        config["fp16"] = {"enabled": True}
    return _merged(config, overrides or {})


_SECTIONS = ("zero_optimization", "bf16", "fp16", "data_types", "timers", "timers.throughput")
_BUCKETS = tuple(
    f"zero_optimization.{name}"
    for name in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
)


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise ConfigError for an entry of `train.deepspeed` that has a key of its own, or that loses count or state.

    Also for a section that is no mapping and for a bucket that is no number of elements.
    """
    for path, value in _entries(overrides):
        if path in _SECTIONS and not isinstance(value, Mapping):
            raise ConfigError(f"train.deepspeed.{path} is {value!r}: allowed is a mapping of its options")
        is_size = isinstance(value, int | float) and not isinstance(value, bool) and value >= 1 and value % 1 == 0
        if path in _BUCKETS and not is_size:
            raise ConfigError(f"train.deepspeed.{path} is {value!r}: allowed is a whole number of elements, 1 or more")
        if (key := _OWN_KEYS.get(path)) is not None:
            raise ConfigError(f"train.deepspeed.{path} is {value!r}: allowed is to leave it to {key}")
        allowed, reason = _NEEDED.get(path, ((value,), ""))
        if value not in allowed:
            values = " | ".join(one if isinstance(one, str) else json.dumps(one) for one in allowed)
            raise ConfigError(f"train.deepspeed.{path} is {value!r}: allowed is {values} ({reason})")


def _entries(overrides: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value) of every entry, mappings among them."""
    for key, value in overrides.items():
        yield f"{prefix}{key}", value
        if isinstance(value, Mapping):
            yield from _entries(value, f"{prefix}{key}.")


def _merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """base with over's entries put over it, mapping by mapping."""
    merged = dict(base)
    for key, value in over.items():
        is_nested = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if is_nested else value
    return merged


def parameter_groups(
    module: nn.Module, weight_decay: float, rate_factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters, with weight_decay on matrices and embeddings and none on biases and norms (1-D).

    rate_factors: prefix of parameters' names -> what the learning rate is multiplied by for them, 1 for the others.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, p in module.named_parameters():
        if p.requires_grad:
            factor = next((f for prefix, f in (rate_factors or {}).items() if name.startswith(prefix)), 1.0)
            # ds_shape: under zero.Init p.shape is that of an empty placeholder.
            is_decayed = weight_decay > 0 and len(getattr(p, "ds_shape", p.shape)) >= 2
            groups.setdefault((factor, is_decayed), []).append(p)
    return [
        {"params": params, "weight_decay": weight_decay if is_decayed else 0.0, "rate_factor": factor}
        for (factor, is_decayed), params in groups.items()
        if params
    ]


def initialize(
    module: nn.Module,
    config: dict[str, Any],
    *,
    learning_rate: float,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    on_gpu: bool = False,
    learning_rates: Mapping[str, float] | None = None,
) -> Any:
    """Hand module to DeepSpeed with AdamW; returns the engine. Collective; torch.distributed must be initialised.

    module is changed in place (its dtype by config, its storage by the ZeRO stage). learning_rates: prefix of names of
    parameters -> the rate that is theirs when learning_rate is the others'; the two keep that ratio.
    """
    deepspeed = import_deepspeed(on_gpu)
    assert torch.distributed.is_initialized(), "the process group is made by the caller (Ray Train)"
    deepspeed.init_distributed(dist_init_required=False)
    factors = {prefix: own / learning_rate for prefix, own in (learning_rates or {}).items()}
    groups = parameter_groups(module, weight_decay, factors)
    optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)
    engine = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=False)[0]
    if engine.zero_optimization_stage() == 0 and engine.optimizer is not optimizer:
        # Upstream trap: stage 0's half-precision wrapper makes the moments by a real step with zero gradients. That
        # decays the master weights and leaves the step count at 1, so every bias correction is one step late.
        inner_optimizer(engine).state.clear()
        engine.optimizer.refresh_fp32_params()
    if engine.zero_optimization_stage() == 3:
        # The fused loss reads the head's weight outside the head's own forward.
        for name, parameter in module.named_parameters():
            if "lm_head." in name:
                deepspeed.zero.register_external_parameter(module, parameter)
    if engine.fp16_enabled() and engine.zero_optimization_stage() > 0:
        # At the smallest loss scale it would end the run; that is for the caller to decide, by `Outcome.is_bad`.
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    # DeepSpeed's own counter does not tell "before the last backward" from "after it"; see `step`.
    engine.ray_kd_micro_batches = 0
    return engine


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    """Set the learning rate for the steps that follow: that of parameters with a rate of their own in its ratio."""
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate * group["rate_factor"]


def backward(engine: Any, loss: torch.Tensor, world_size: int) -> None:
    """Add the gradient of loss, the tensor that `engine(...)` returned, to the step's.

    loss: this micro-batch's sum over tokens divided by the valid tokens of the global batch, so that the step's
    gradient is the plain sum over micro-batches and ranks. DeepSpeed divides by the accumulation steps and averages
    over ranks; both are undone here and nowhere else. (`scale_wrt_gas=False` would be the tool for the former, but
    0.19 divides anyway at stage 0 when given the forward's own output.) AssertionError for one micro-batch too many.

    A loss that is not finite gets a gradient that is not either, so that `step` leaves the step out on every rank.
    """
    assert engine.ray_kd_micro_batches < engine.gradient_accumulation_steps(), "all micro-batches of the step are done"
    factor = float(world_size * engine.gradient_accumulation_steps())
    if engine.fp16_enabled() and engine.zero_optimization_stage() == 0:
        # Upstream bug: engine.backward scales fp16 losses for the ZeRO optimizers only, yet stage 0's wrapper divides
        # the gradient by the scale: Adam saw gradients 65536 times too small, next to its eps, and never clipped.
        factor *= engine.optimizer.loss_scale
    loss = loss.float()  # an fp16 loss would overflow
    # Infinite losses may have finite gradients (a label of probability 0): 0 * inf and 0 * NaN are NaN.
    engine.backward(loss * (factor + 0 * loss.detach()))
    engine.ray_kd_micro_batches += 1
    if engine.ray_kd_micro_batches < engine.gradient_accumulation_steps():
        engine.step()  # away from the boundary it only counts the micro-batch


class Outcome(NamedTuple):
    """What became of a step, the same on all ranks."""

    grad_norm: float  # before clipping
    is_applied: bool  # False: weights, moments and their step count are as before
    is_bad: bool  # loss or gradient are not finite, and no smaller fp16 loss scale is left to try


def step(engine: Any, loss: float) -> Outcome:
    """Clip and apply the accumulated gradient, unless it or the loss (of all ranks and micro-batches) is not finite.

    At any stage such a step is dropped, and only counted in the engine's global and skipped steps. In fp16 a gradient
    may overflow because of the loss scale: then the scale falls, which is no bad step. It does not for a bad loss.
    Collective. AssertionError unless exactly gradient_accumulation_steps backwards came before.
    """
    done, wanted = engine.ray_kd_micro_batches, engine.gradient_accumulation_steps()
    assert done == wanted, f"step after {done} of {wanted} micro-batches"
    engine.ray_kd_micro_batches = 0
    if engine.optimizer is inner_optimizer(engine):
        norm, is_applied = _step_unwrapped(engine)
        return Outcome(norm, is_applied, is_bad=not is_applied)
    before = scaler_state(engine)
    engine.step()
    norm, is_finite = float(engine.get_global_grad_norm()), engine.was_step_applied()
    if before is None:
        return Outcome(norm, is_finite, is_bad=not is_finite)
    after = scaler_state(engine)
    assert after is not None
    if engine.zero_optimization_stage() == 0:
        norm /= before["cur_scale"]  # reported as it is in the scaled gradients
    elif engine.zero_optimization_stage() == 3:
        norm *= after["cur_scale"] / before["cur_scale"]  # divided by the scale after its update
    if not math.isfinite(loss):
        load_scaler_state(engine, before)
        return Outcome(norm, is_finite, is_bad=True)
    # Hysteresis: so many overflows before the scale falls. The smallest scale, and a static one, stay.
    has_fallen = any(after[name] < before[name] for name in ("cur_scale", "cur_hysteresis") if name in before)
    return Outcome(norm, is_finite, is_bad=not is_finite and not has_fallen)


def _step_unwrapped(engine: Any) -> tuple[float, bool]:
    """Stage 0 in fp32: DeepSpeed reports no norm and would apply a NaN. Gradients are already reduced here."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
    if math.isfinite(norm):
        engine.step()
        return norm, True
    engine.zero_grad()
    engine.skipped_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()
    engine.micro_steps += 1
    return norm, False
