"""Seconds of a teacher's and of a student's token on this machine: a few passes of models of their widths.

Random weights, layers of the two models' widths, the real vocabulary, the micro-batches of the config, the threads that
each process of the run has. Small models are timed as they are; of others one and three layers, and the time of L
layers is t(1) + (L - 1) (t(3) - t(1)) / 2 (10 % too little for SmolLM2-135M, whose single layers stay in the caches).
The teacher's pass is that of the engine `hf` (decoder, top-k), the student's that of `DistillModule` (decoder, fused
loss, backward), and the reduction of gradients with AdamW's step is timed by its parameters. Layers of `student.freeze`
are timed as if they trained; of what the decoder's backward takes, the share of its FLOPs that is left with them frozen
is counted. Packing, payloads and checkpoints are left out; half a core is Ray's. The median of some rounds.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from ray_kd import cluster, models, objectives, schema
from ray_kd.config import RunConfig
from ray_kd.head import Head
from ray_kd.losses import fused_linear_dense_kd_loss, fused_linear_kd_loss
from ray_kd.losses.terms import CE, KD, Schedules, parse_terms
from ray_kd.models.decoder import decoder_hidden, head_of
from ray_kd.payloads import HIDDEN_STATES
from ray_kd.plan.sizes import Size, size_of
from ray_kd.teacher.topk import topk_logprobs

_LAYERS = (1, 3)
_WHOLE = 250_000_000
"""Parameters up to which a model is timed with all of its layers: 2 GB with gradients in fp32."""

_RAY_CORES = 0.5
"""Of a local Ray's own processes (raylet, executor, controller, splitter) while a run is on, as `top` showed them."""

_STEPPED = 2**22
"""Parameters of which AdamW's step is timed: beyond the caches."""


@dataclass(frozen=True)
class Measured:
    """Seconds of this machine's GPU, or of all its cores: those of a process that uses half of them count half."""

    teacher: float
    """Of a position, one process alone."""
    student: float
    """The same, without the optimiser's step."""
    step: float
    """Of an optimiser step and its gradient's norm, all parameters that train."""


def measure(
    config: RunConfig, teacher: PreTrainedConfig, student: PreTrainedConfig, sizes: tuple[Size, Size],
    teacher_dtype: str, targets: float, rounds: int = 5,
) -> Measured:  # fmt: skip
    """Time both models here. targets: share of positions that have one. Seconds to a minute."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cores, threads = cluster.physical_cores(), cluster.Threads.of(config)
    threads_of = [min(cores, number) for number in (threads.of_teacher(config.teacher), threads.worker)]
    free = max(0.5, cores - _RAY_CORES)
    teacher_share, student_share = [1.0 if device == "cuda" else number / free for number in threads_of]
    depths = [
        (size.layers,) if size.parameters <= _WHOLE and not config.student.freeze else _LAYERS for size in sizes
    ]  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        of_teacher = [_teacher_pass(config, teacher, n, teacher_dtype, targets, device) for n in depths[0]]
        of_student = [_student_pass(config, student, sizes[0], n, targets, device) for n in depths[1]]
    rows = config.teacher.batch_size if config.teacher.batch_tokens is None else 1
    length = config.data.sequence_length
    torch.set_num_threads(threads_of[0])
    teacher_s = _extrapolated([_seconds(run, rounds) for run in of_teacher], sizes[0].layers)
    torch.set_num_threads(threads_of[1])
    both = [_seconds(run, rounds) for run, _ in of_student]
    student_s = _extrapolated(both, sizes[1].layers)
    if config.student.freeze:
        whole = size_of(student, "student")
        share = _backward(sizes[1], length) / _backward(whole, length)
        forwards = [_seconds(run, rounds) for _, run in of_student]
        student_s -= (1 - share) * sizes[1].layers * max(0.0, _per_layer(both) - _per_layer(forwards))
    return Measured(
        teacher_share * teacher_s / (rows * length),
        student_share * student_s / (config.train.micro_batch_size * length),
        student_share * _seconds(_adam_step(device), rounds) * sizes[1].trained / _STEPPED,
    )


def _extrapolated(seconds: list[float], layers: int) -> float:
    if len(seconds) == 1:  # of all layers
        return seconds[0]
    return seconds[0] + (layers - _LAYERS[0]) * _per_layer(seconds)


def _per_layer(seconds: list[float]) -> float:
    first, third = seconds
    return max(0.0, third - first) / (_LAYERS[1] - _LAYERS[0])


def _backward(size: Size, length: int) -> float:
    """FLOPs of a token in the backward of a decoder."""
    return size.backward + 2 * size.layers_that_flow * size.attention(length)


def _seconds(run: Callable[[], None], rounds: int) -> float:
    run()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def _model(config: PreTrainedConfig, layers: int, dtype: str, device: str) -> Any:
    total = int(config.get_text_config().num_hidden_layers)
    cut = copy.deepcopy(config) if total <= layers else models.config_of_layers(config, layers)
    with models.quiet(), torch.device(device):
        model = AutoModelForCausalLM.from_config(cut, attn_implementation="sdpa", dtype=getattr(torch, dtype))
    return model


def _rows(rows: int, length: int, vocab_size: int, targets: float, device: str) -> tuple[torch.Tensor, ...]:
    """input_ids and position_ids [B, T] of rows of two documents, and the places of targets [M]."""
    ids = torch.randint(0, vocab_size, (rows, length), device=device)
    half = length // 2
    positions = torch.cat([torch.arange(half), torch.arange(length - half)]).expand(rows, length).to(device)
    is_target = schema.target_positions(ids.cpu().numpy(), positions.cpu().numpy()).flatten()
    places = np.flatnonzero(is_target)
    places = places[: max(1, round(targets * rows * length))]
    return ids, positions, torch.from_numpy(places).to(device)


def _teacher_pass(
    config: RunConfig, teacher: PreTrainedConfig, layers: int, dtype: str, targets: float, device: str
) -> Callable[[], None]:
    model = _model(teacher, layers, dtype, device).eval()
    rows = config.teacher.batch_size if config.teacher.batch_tokens is None else 1
    ids, positions, places = _rows(rows, config.data.sequence_length, teacher.vocab_size, targets, device)
    head, is_dense = head_of(model), config.teacher.payload == HIDDEN_STATES

    @torch.inference_mode()
    def run() -> None:
        hidden = decoder_hidden(model, ids, positions).flatten(0, 1)[places]
        if not is_dense:
            topk_logprobs(hidden, head, config.teacher.top_k)

    return run


def _student_pass(
    config: RunConfig, student: PreTrainedConfig, teacher: Size, layers: int, targets: float, device: str
) -> tuple[Callable[[], None], Callable[[], None]]:
    """(a pass forward and back, the decoder's forward alone)."""
    base = _model(student, layers, config.student.dtype, device)
    ends = [part for part in config.student.freeze if part in ("embeddings", "head")]
    model = models.choose_trainable(base, config.student.lora, ends).train()
    if config.student.gradient_checkpointing:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids, positions, places = _rows(
        config.train.micro_batch_size, config.data.sequence_length, student.vocab_size, targets, device
    )
    factors = Schedules.of(parse_terms(config.loss.terms), config.loss.temperature).at(1)
    options: dict[str, Any] = {
        "divergence": config.loss.divergence, "chunk_size": config.loss.chunk_size,
        "temperature": factors.temperature, "kd_weight": factors.weight(KD), "ce_weight": factors.weight(CE),
        "labels": torch.randint(0, student.vocab_size, (len(places),), device=device),
    }  # fmt: skip
    loss: Callable[..., Any]
    if config.teacher.payload == HIDDEN_STATES:
        weight = torch.randn(teacher.vocab_size, teacher.width, device=device)
        options |= {"teacher_hidden": torch.randn(len(places), teacher.width, device=device),
                    "teacher_head": Head(weight)}  # fmt: skip
        loss = fused_linear_dense_kd_loss
    else:
        logprobs = torch.log_softmax(torch.randn(len(places), config.teacher.top_k, device=device), -1) - 0.1
        draws = torch.rand(len(places), student.vocab_size, device=device)
        options |= {"teacher_ids": draws.topk(config.teacher.top_k, -1).indices, "teacher_logprobs": logprobs,
                    "tail": config.loss.tail,
                    "payload_temperature": objectives.payload_temperature(config)}  # fmt: skip
        loss = fused_linear_kd_loss
    head = base.get_output_embeddings()

    def run() -> None:
        hidden = decoder_hidden(model, ids, positions).flatten(0, 1)[places]
        loss(hidden, head.weight, lm_head_bias=head.bias, **options).loss.backward()
        model.zero_grad(set_to_none=False)  # as between micro-batches: the next one adds to what is there

    def forward() -> None:
        decoder_hidden(model, ids, positions)

    return run, forward


def _adam_step(device: str) -> Callable[[], None]:
    weight = torch.nn.Parameter(torch.randn(_STEPPED, device=device))
    weight.grad = torch.randn(_STEPPED, device=device)
    optimizer = torch.optim.AdamW([weight], fused=True)
    parts = weight.grad.chunk(8)

    def run() -> None:
        # DeepSpeed's reduction at stage 0, of one worker as well: one flat tensor, and back.
        for part, reduced in zip(parts, torch.cat(parts).chunk(8), strict=True):
            part.copy_(reduced)
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()

    return run
