"""What was trained: counted from the rows that went through the optimiser, not from the slots that were planned.

Kept on every rank, saved by rank 0 with every checkpoint, so that it describes the surviving history of the run.
Cost: one byte a planned row in memory, about one bit in the checkpoint.
"""

import base64
import zlib
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ray_kd.trainer.step import StepResult


@dataclass
class Totals:
    """Sums over the surviving history. Seconds are of the training loop, of rank 0."""

    steps: int = 0
    tokens: int = 0  # non-padding inputs
    target_tokens: int = 0
    payload_nbytes: int = 0
    rows_duplicated: int = 0
    rows_refused: int = 0  # slots whose teacher answer was refused
    steps_skipped: int = 0  # not applied: bad, or fp16 overflow
    bad_steps: int = 0  # loss or gradient not finite
    wall_s: float = 0.0  # evaluation included
    step_s: float = 0.0  # waiting for rows and training on them
    timed_step_s: float = 0.0  # step_s without the first step of each attempt, which waits for the start-up
    wait_s: float = 0.0  # waiting for rows, in the timed steps


@dataclass
class Ledger:
    """Which (epoch, row) pairs were trained, and the totals."""

    num_rows: int  # of one epoch
    num_planned_rows: int  # (epoch, row) pairs of the whole run
    totals: Totals = field(default_factory=Totals)
    bad_in_a_row: list[int] = field(default_factory=list)
    """The bad steps since the last one that was applied."""

    def __post_init__(self) -> None:
        num_epochs = -(-self.num_planned_rows // self.num_rows)
        self._trained: NDArray[np.bool_] = np.zeros(self.num_rows * num_epochs, dtype=np.bool_)

    @property
    def rows_consumed(self) -> int:
        """Distinct (epoch, row) pairs trained."""
        return int(self._trained.sum())

    def add(self, result: "StepResult", *, step_s: float, wait_s: float, is_timed: bool) -> None:
        """Count one step: its rows, its tokens, the seconds it took and of those the seconds waited for rows.

        The rows of a bad step count as trained: they had their turn.
        """
        epochs = result.slots[result.is_trained] // self.num_rows
        pairs = epochs * self.num_rows + result.row_ids[result.is_trained]
        self.totals.rows_duplicated += int(self._trained[pairs].sum()) + len(pairs) - len(np.unique(pairs))
        self._trained[pairs] = True
        self.totals.rows_refused += int((~result.is_trained & (result.row_ids >= 0)).sum())
        self.totals.steps += 1
        self.totals.steps_skipped += not result.is_applied
        self.totals.bad_steps += result.is_bad
        if result.is_bad:
            self.bad_in_a_row.append(self.totals.steps)
        elif result.is_applied:
            self.bad_in_a_row.clear()
        self.totals.tokens += result.num_tokens
        self.totals.target_tokens += result.num_valid_tokens
        self.totals.payload_nbytes += result.payload_nbytes
        self.totals.step_s += step_s
        if is_timed:
            self.totals.timed_step_s += step_s
            self.totals.wait_s += wait_s

    def state(self) -> dict[str, Any]:
        """JSON for the checkpoint, which may be written when more steps have been added: a copy."""
        packed = zlib.compress(np.packbits(self._trained).tobytes())
        return {
            "totals": asdict(self.totals),
            "rows_consumed": self.rows_consumed,
            "trained": base64.b64encode(packed).decode(),
            "bad_in_a_row": list(self.bad_in_a_row),
        }

    @classmethod
    def from_state(cls, num_rows: int, num_planned_rows: int, state: dict[str, Any]) -> "Ledger":
        """What `state` returned, for the same run."""
        # A checkpoint from before steps could be bad has none.
        ledger = cls(num_rows, num_planned_rows, Totals(**state["totals"]), list(state.get("bad_in_a_row", [])))
        packed = np.frombuffer(zlib.decompress(base64.b64decode(state["trained"])), dtype=np.uint8)
        ledger._trained = np.unpackbits(packed, count=len(ledger._trained)).astype(np.bool_)
        return ledger
