"""What a check says, what all say together, and what they know of the run so far."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ray_kd.cluster import Joined
from ray_kd.config import RunConfig
from ray_kd.errors import EXIT_DONE

if TYPE_CHECKING:
    from ray_kd.data.manifest import Manifest
    from ray_kd.data.plan import Plan
    from ray_kd.data.sample import Sample
    from ray_kd.validate import Models

OK, WARNING, FAILED, SKIPPED = "ok", "warning", "failed", "skipped"

Join = Callable[[RunConfig], AbstractContextManager[Joined]]


@dataclass(frozen=True)
class Finding:
    """What one check saw, in one line."""

    check: str
    state: str
    """ok | warning (the run starts all the same) | failed | skipped (it could not look, or was told not to)."""
    seen: str
    exit_code: int = EXIT_DONE
    """Of the run, where the check failed."""

    def __str__(self) -> str:
        return f"{self.state:<9}{self.check:<15}{self.seen}"


@dataclass(frozen=True)
class Report:
    """The findings of all checks."""

    findings: list[Finding]

    @property
    def exit_code(self) -> int:
        """What the run itself would end with, 0 where nothing failed.

        Codes rise in the order in which it would come to them: settings and models, records, what shows while it runs.
        """
        return min((finding.exit_code for finding in self.findings if finding.state == FAILED), default=EXIT_DONE)

    @property
    def verdict(self) -> str:
        """One line on what follows."""
        counts = {state: sum(f.state == state for f in self.findings) for state in (FAILED, WARNING, SKIPPED)}
        also = f", {counts[WARNING]} warning{'s' * (counts[WARNING] > 1)}" if counts[WARNING] else ""
        also += f", {counts[SKIPPED]} skipped" if counts[SKIPPED] else ""
        if not counts[FAILED]:
            return f"Nothing failed{also}: the run can start."
        return f"{counts[FAILED]} failed{also}: the run would end with exit code {self.exit_code}."

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "exit_code": self.exit_code,
            "verdict": self.verdict,
            "findings": [asdict(finding) for finding in self.findings],
        }

    def __str__(self) -> str:
        return "\n".join([*map(str, self.findings), "", self.verdict])


@dataclass
class Subject:
    """A run that is to be started, and what the checks so far found out about it; None: nothing yet."""

    config: RunConfig
    join: Join
    is_offline: bool
    loads: bool
    """Models may be loaded here."""
    has_values: bool = False
    """The values of plain keys are in their ranges: sums can be made of them."""
    has_settings: bool = False
    """... and go together."""
    has_sources: bool = False
    """The data section is right and its files exist."""
    models: "Models | None" = None
    trained: int | None = None
    """Parameters of the student that train."""
    total: int | None = None
    """Parameters of the student."""
    plan: "Plan | None" = None
    sample: "Sample | None" = None
    """Of the training source."""
    manifest: "Manifest | None" = None
    """Of the prepared data, where it is there already."""


def kind_of(value: Any) -> str | None:
    """The kind that a config value names; None for one that names none, which 'sources' or 'engine' refuses."""
    kind = value.get("kind") if isinstance(value, Mapping) else value
    return kind if isinstance(kind, str) else None
