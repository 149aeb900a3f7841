"""Prints the account of the chaos suite: python -m tests.chaos.table FILE, a line a fault, the median of its rounds."""

import json
import sys
from pathlib import Path
from statistics import median

HEADINGS = ("fault", "what happened", "lost", "duplicated", "teacher rows again", "seconds lost", "bitwise", "rounds")


def table(lines: list[dict]) -> str:
    """Markdown."""
    by_fault: dict[str, list[dict]] = {}
    for line in lines:
        by_fault.setdefault(line["fault"], []).append(line)
    rows = [HEADINGS, ["---"] * len(HEADINGS)]
    for fault, rounds in by_fault.items():
        same = {line["is_same"] for line in rounds}
        rows.append(
            [
                fault,
                rounds[-1]["happened"],
                *(max(line[key] for line in rounds) for key in ("rows_lost", "rows_duplicated")),
                *(median(line[key] for line in rounds) for key in ("teacher_rows_again", "seconds_lost")),
                "-" if same == {None} else "no" if False in same else "yes",
                len(rounds),
            ]
        )
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


if __name__ == "__main__":
    print(table([json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]))
