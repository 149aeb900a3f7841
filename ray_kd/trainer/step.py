"""One optimiser step: fetch, count tokens, micro-batches, clip, step. And the module DeepSpeed wraps.

Sums are divided once, by what they count in the whole step (all ranks, all micro-batches: its valid tokens, or what a
feature term says), inside the loss; `zero.backward` holds the only compensation for DeepSpeed's averaging.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from ray_kd import models
from ray_kd.head import Head
from ray_kd.losses import LossOutput, fused_linear_dense_kd_loss, fused_linear_kd_loss
from ray_kd.losses.features import Term
from ray_kd.losses.terms import CE, KD, Factors, loss_name
from ray_kd.trainer import zero

if TYPE_CHECKING:
    from ray_kd.trainer.collate import MicroBatch

METRICS = ("loss", "kd_loss", "ce_loss", "teacher_topk_mass", "top1_agreement")


class DistillModule(nn.Module):
    """Student decoder without its head, then the fused loss on `lm_head.weight`: [B, T, V] never exists.

    loss_options: keyword arguments of `fused_linear_kd_loss` (divergence, tail, payload_temperature, chunk_size).
    teacher_head: for a teacher that sends hidden states, on the student's device; then `fused_linear_dense_kd_loss` is
    the loss, which has no tail. It is none of the module's parameters: nothing partitions, trains or saves it.
    features: the terms that compare what is inside the models, by name. Their projectors are parameters of this module
    and not of the student, drawn from the seed alone, in float32.
    """

    def __init__(
        self, student: nn.Module, loss_options: dict[str, Any], teacher_head: Head | None = None,
        features: Mapping[str, Term] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.student = student
        self._loss: Callable[..., LossOutput] = partial(fused_linear_kd_loss, **loss_options)
        if teacher_head is not None:
            self._loss = partial(fused_linear_dense_kd_loss, teacher_head=teacher_head, **loss_options)
        self.features = dict(features or {})
        self.projectors = nn.ModuleDict(
            {
                name: term.projectors.make(seed + place)
                for place, (name, term) in enumerate(self.features.items())
                if term.projectors is not None
            }
        )
        self._hidden_layers = _union(term.hidden_layers for term in self.features.values())
        self._attention_layers = _union(term.attention_layers for term in self.features.values())
        self.metrics: dict[str, torch.Tensor] = {}

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Of the sums that `forward` leaves in `metrics`."""
        return METRICS + tuple(loss_name(name) for name in self.features)

    @property
    def learning_rates(self) -> dict[str, float]:
        """Prefix of the names of parameters -> their peak learning rate, where it is one of their own."""
        return {
            f"projectors.{name}.": term.projectors.learning_rate
            for name, term in self.features.items()
            if term.projectors is not None and term.projectors.learning_rate is not None
        }

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        micro_batch: "MicroBatch | None" = None,
        scale: "Scale | None" = None,
    ) -> torch.Tensor:
        """The micro-batch's share of the step's loss (a scalar), or without targets the hidden states [B, T, H]."""
        if micro_batch is None:
            return models.decoder_hidden(self.student, input_ids, position_ids)
        assert scale is not None, "targets come with what their sums are divided by"
        outputs = models.decoder_outputs(
            self.student, input_ids, position_ids, self._hidden_layers, self._attention_layers
        )
        hidden = outputs.last
        head = models.base_causal_lm(self.student).get_output_embeddings()
        out = self._loss(
            hidden.flatten(0, 1)[micro_batch.targets.to(hidden.device)],
            head.weight,
            labels=micro_batch.labels.to(hidden.device),
            lm_head_bias=head.bias,
            num_valid_tokens=scale.num_valid_tokens,
            temperature=scale.factors.temperature,
            kd_weight=scale.factors.weight(KD),
            ce_weight=scale.factors.weight(CE),
            **{name: tensor.to(hidden.device) for name, tensor in micro_batch.teacher.items()},
        )
        loss, self.metrics = out.loss, dict(out.metrics)
        for name, value in self._feature_losses(outputs, micro_batch, scale):
            loss = loss + scale.factors.weight(name) * value
            self.metrics[loss_name(name)] = value.detach()
        self.metrics["loss"] = loss.detach()
        return loss

    def _feature_losses(
        self, outputs: models.DecoderOutputs, micro_batch: "MicroBatch", scale: "Scale"
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, this micro-batch's sum over the step's count) of each feature term."""
        if not self.features:
            return
        assert micro_batch.features is not None, "the payload has no features: validate refuses it"
        batch = micro_batch.features.to(outputs.last.device)
        hidden = dict(zip(self._hidden_layers, outputs.hidden, strict=True))
        attentions = dict(zip(self._attention_layers, outputs.attentions, strict=True))
        for name, term in self.features.items():
            chosen = [hidden[layer] for layer in term.hidden_layers]
            chosen += [attentions[layer] for layer in term.attention_layers]
            projectors: Any = self.projectors[name] if term.projectors is not None else None
            yield name, term(chosen, batch, projectors) / max(1, scale.counts[name])


def _union(layers: Iterable[Sequence[int]]) -> tuple[int, ...]:
    return tuple(sorted({layer for some in layers for layer in some}))


@dataclass(frozen=True)
class Scale:
    """What the sums of a micro-batch are weighed by and divided by, the same for all of a step."""

    num_valid_tokens: int
    """Of the global batch, at least 1."""
    factors: Factors
    counts: Mapping[str, int] = field(default_factory=dict)
    """Name of a feature term -> what it counts, over the global batch."""


@dataclass(frozen=True)
class StepResult:
    """What one step did, summed over all ranks and micro-batches; losses are per valid token of the step."""

    metrics: dict[str, float]
    grad_norm: float  # before clipping
    is_applied: bool  # False when the step changed nothing: it is bad, or the fp16 loss scale fell
    is_bad: bool  # its loss or gradient is not finite
    num_valid_tokens: int
    num_tokens: int
    payload_nbytes: int
    teacher_busy_s: float
    flags: "Flags"
    slots: NDArray[np.int64]  # [G], sorted
    row_ids: NDArray[np.int64]  # [G], in the order of the slots, -1 for dummies
    is_trained: NDArray[np.bool_]  # [G], False for dummies and refused answers

    @property
    def has_refused(self) -> bool:
        """Whether a row of the step, on any rank, has no usable teacher answer."""
        return bool((~self.is_trained & (self.row_ids >= 0)).any())

    def row_ids_sha256(self) -> str:
        """Digest of the step's row ids in slot order (int64, little endian): what an independent check recomputes."""
        return hashlib.sha256(self.row_ids.astype("<i8").tobytes()).hexdigest()


@dataclass(frozen=True)
class Flags:
    """What the ranks tell each other in a step's own reduction: of this rank going in, the number of ranks coming out.

    So all ranks see the same after the same step, and act together.
    """

    stop: int
    """Asked to stop."""
    is_written: int
    """Its files of the started checkpoint are written."""
    ask_for_notice: int
    """It is time to ask whether a node is about to be taken away."""


def train_step(
    engine: Any, micro_batches: Sequence["MicroBatch"], device: torch.device, flags: Flags, factors: Factors
) -> StepResult:  # fmt: skip
    """Train one global batch. A collective: every rank calls it with the same number of micro-batches.

    factors: the step's, of `Schedules.at`.
    """
    features: Mapping[str, Term] = engine.module.features
    num_flags = len(astuple(flags))
    valid, tokens, nbytes, busy_s, *rest = all_reduce(
        [
            sum(len(m.labels) for m in micro_batches),
            sum(m.num_tokens for m in micro_batches),
            sum(m.payload_nbytes for m in micro_batches),
            sum(m.teacher_busy_s for m in micro_batches),
            *astuple(flags),
            *(_count(term, micro_batches) for term in features.values()),
        ],
        device,
    )
    counts = dict(zip(features, map(int, rest[num_flags:]), strict=True))
    scale = Scale(max(1, int(valid)), factors, counts)

    sums = dict.fromkeys(engine.module.metric_names, 0.0)
    for micro_batch in micro_batches:
        loss = engine(micro_batch.input_ids.to(device), micro_batch.position_ids.to(device), micro_batch, scale)
        zero.backward(engine, loss, dist.get_world_size())
        for name in sums:
            sums[name] = sums[name] + engine.module.metrics[name].detach().double()
    totals = dict(zip(sums, all_reduce([float(value) for value in sums.values()], device), strict=True))
    grad_norm, is_applied, is_bad = zero.step(engine, totals["loss"])

    slots, row_ids, is_trained = _gather_rows(micro_batches, device)
    return StepResult(
        metrics=totals,
        grad_norm=grad_norm,
        is_applied=is_applied,
        is_bad=is_bad,
        num_valid_tokens=int(valid),
        num_tokens=int(tokens),
        payload_nbytes=int(nbytes),
        teacher_busy_s=busy_s,
        flags=Flags(*map(int, rest[:num_flags])),
        slots=slots,
        row_ids=row_ids,
        is_trained=is_trained,
    )


def _count(term: Term, micro_batches: Sequence["MicroBatch"]) -> float:
    """Of this rank's part of the step."""
    return float(sum(term.count(m.features) for m in micro_batches if m.features is not None))


def all_reduce(values: Sequence[float], device: torch.device) -> list[float]:
    """Sums over all ranks, in float64."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor)
    return tensor.tolist()


def _gather_rows(
    micro_batches: Sequence["MicroBatch"], device: torch.device
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
    """Slots, row ids and trained flags of the global batch, in the order of the slots."""
    own = np.stack(
        [
            np.concatenate([m.slots for m in micro_batches]),
            np.concatenate([m.row_ids for m in micro_batches]),
            np.concatenate([[not error for error in m.errors] for m in micro_batches]) * 1,
        ]
    )
    mine = torch.from_numpy(np.ascontiguousarray(own)).to(device)
    everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, mine)
    rows = torch.cat(everyone, dim=1).cpu().numpy()
    slots, row_ids, usable = rows[:, np.argsort(rows[0])]
    return slots, row_ids, (usable > 0) & (row_ids >= 0)
