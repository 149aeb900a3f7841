"""What a check says, what all say together, and what they know of the run so far."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ray_kd.config import RunConfig
from ray_kd.data.order import SlotOrder
from ray_kd.data.prepared import PreparedData

OK, WARNING, BROKEN = "ok", "warning", "broken"


@dataclass(frozen=True)
class Finding:
    """What one check saw."""

    check: str
    state: str
    """ok | warning (nothing is lost by it) | broken."""
    seen: str
    advice: str = ""
    blocks: bool = False
    """The run cannot go on, or should not, before this is put right."""
    mend: Callable[[], object] | None = field(default=None, repr=False)
    """What `fix` does about it."""

    def __str__(self) -> str:
        return f"{self.state:<9}{self.check:<15}{self.seen}{f': {self.advice}' if self.advice else ''}"


@dataclass(frozen=True)
class Report:
    """The findings of all checks, and what follows from them."""

    run_dir: str
    state: str
    """running | finished | resumable | blocked."""
    verdict: str
    findings: list[Finding]
    mended: list[Finding]
    """What was found first and has been put right."""

    @property
    def is_broken(self) -> bool:
        return any(finding.state == BROKEN for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        plain = {"run_dir": self.run_dir, "state": self.state, "verdict": self.verdict, "is_broken": self.is_broken}
        lists = {"findings": self.findings, "mended": self.mended}
        return plain | {name: [_plain(finding) for finding in found] for name, found in lists.items()}

    def __str__(self) -> str:
        return "\n".join([*(f"mended   {f.check:<15}{f.seen}" for f in self.mended), *map(str, self.findings),
                          "", self.verdict])  # fmt: skip


@dataclass
class Run:
    """A run folder under examination, and what the checks so far found in it."""

    folder: Path
    writers: list[str] = field(default_factory=list)
    checkpoints: dict[Path, dict[str, Any] | str] = field(default_factory=dict)
    """Folder -> its state.json, or what is wrong with it; each is read once."""
    newest: Path | None = None
    """The checkpoint that a start takes."""
    document: dict[str, Any] = field(default_factory=dict)
    """Its state.json."""
    config: RunConfig | None = None
    prepared: PreparedData | None = None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    quarantined_slots: set[int] = field(default_factory=set)
    counted: dict[str, int] = field(default_factory=dict)
    """Counts of summary.json, from the data, the newest checkpoint and the metrics."""
    is_finished: bool = False

    @property
    def step(self) -> int:
        """Steps that a start does not train again."""
        return int(self.document.get("step", 0))

    @property
    def order(self) -> SlotOrder | None:
        """The order of the rows, where config and prepared data can be read."""
        if self.config is None or self.prepared is None:
            return None
        return SlotOrder(
            num_rows=self.prepared.num_rows,
            global_batch_size=self.config.train.global_batch_size,
            epochs=self.config.train.epochs,
            max_steps=self.config.train.max_steps,
            seed=self.config.run.seed,
        )


def not_checked(check: str, what: str) -> Finding:
    """What a check says that could not look."""
    return Finding(check, WARNING, f"not checked: there is no usable {what}")


def _plain(finding: Finding) -> dict[str, Any]:
    return {item.name: getattr(finding, item.name) for item in fields(finding) if item.name != "mend"}


def name_in(folder: Path, path: Path) -> str:
    """A path as the report says it: from the run folder on."""
    return str(path).removeprefix(f"{folder}/")
