"""One loss on what layers compute a file; the file name is the kind of an entry of `loss.terms`.

A file holds a `Config` dataclass with the options and one function

    resolve(config, student, teacher, sequence_length, key) -> Term

student and teacher are the models' `ModelShape`s, key names the entry in messages. It raises ConfigError for what the
config.json of two models shows not to work; a Term is what is left, numbers alone, and computes the loss:

    term(features of the student, what the teacher sent, projectors) -> the sum over a micro-batch, a scalar
    term.count(what the teacher sent) -> what the sum is divided by, of this micro-batch

Defaults in `Config` are literals: `--help` prints them without importing the file.
Sum and count are added up over all micro-batches and ranks and divided once, so the value does not depend on how the
global batch was cut. Constants (width, heads, layers) are divided inside. Values are computed in float32 at least.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from ray_kd.losses.feature_batch import FeatureBatch
from ray_kd.payloads import FeatureSpec


class Term(Protocol):
    """A feature loss whose layers are known; picklable."""

    @property
    def asks(self) -> FeatureSpec:
        """What it needs of the teacher."""
        ...

    @property
    def hidden_layers(self) -> tuple[int, ...]:
        """The student's hidden states it takes, [B, T, H] each, in this order."""
        ...

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The student's attention maps it takes, [B, h, T, T] each, in this order; one of the two is empty."""
        ...

    @property
    def projectors(self) -> "Projectors | None":
        """What it learns besides the student; None: nothing."""
        ...

    def count(self, batch: FeatureBatch) -> int:
        """Of what the sum is taken, over this micro-batch: tokens, pairs or rows."""
        ...

    def __call__(
        self, student: Sequence[Tensor], batch: FeatureBatch, projectors: nn.ModuleList | None = None
    ) -> Tensor:
        """The sum, float32 (float64 for float64); 0 with a gradient of zeros where nothing is valid."""
        ...


@dataclass(frozen=True)
class Projectors:
    """One linear map without bias from the student's width to the teacher's for each of some layers."""

    count: int
    student_width: int
    teacher_width: int
    learning_rate: float | None
    """Theirs; None: the student's."""

    def make(self, seed: int) -> nn.ModuleList:
        """`nn.Linear`s in float32, normal with variance 1 / student_width: the same ones for a seed.

        They keep the variance of what they map. The global random state is left as it was.
        """
        generator = torch.Generator().manual_seed(seed)
        made = nn.ModuleList()
        for _ in range(self.count):
            linear = nn.Linear(self.student_width, self.teacher_width, bias=False, device="meta")
            weight = torch.randn(self.teacher_width, self.student_width, generator=generator)
            linear.weight = nn.Parameter(weight * self.student_width**-0.5)
            made.append(linear)
        return made
