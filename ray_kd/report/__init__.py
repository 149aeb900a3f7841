"""report.html: what a run did, or what several did beside each other, on one page that needs nothing else.

    folder.py     what is read of a run folder
    axes.py       scales, ticks, few enough points
    curves.py     the charts over the steps
    timeline.py   both pools over wall time
    page.py       what the templates say, in words and tables
    templates/    HTML, CSS and a few lines of script, filled in by jinja2, which escapes whatever comes from a run

Cost: one pass over metrics.jsonl and the journals, 0.4 s of CPU for 10,000 steps; a page stays below a megabyte.
"""

from collections.abc import Sequence
from pathlib import Path

from ray_kd import run_folder, storage
from ray_kd.report import folder, page


def write(run_dir: Path) -> None:
    """Write report.html into the folder of a run that is over. Raises as `render`."""
    storage.write_text(run_dir / run_folder.REPORT, render([(run_dir, ())]))


def render(runs: Sequence[tuple[Path, Sequence[str]]]) -> str:
    """The page of one run, or of several beside each other; each run's folder, and who writes there now.

    Who writes is what `locks.holders` says: nobody means that the run is over.
    Raises ConfigError for a folder that is no run's, DataError where something in it is damaged.
    """
    found = [folder.read(*run) for run in runs]
    text = page.of_run(found[0]) if len(found) == 1 else page.of_runs(found)
    return text.encode(errors="replace").decode()  # half a surrogate pair in somebody's data is no UTF-8
