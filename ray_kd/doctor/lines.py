"""Files of JSON lines that a kill may have cut: what can be read of them, and what `fix` does about the rest."""

import json
from collections.abc import Collection, Generator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ray_kd import storage
from ray_kd.doctor.report import BROKEN, WARNING, Finding, Run, name_in

DAMAGED_LINES = "damaged.jsonl"
"""In the run folder: the lines that `fix` took out of other files."""


@dataclass
class Lines:
    """A file of JSON lines."""

    whole: list[tuple[bytes, dict[str, Any]]] = field(default_factory=list)
    bad: list[tuple[int, bytes]] = field(default_factory=list)
    """(number from 1, what stands there) of the lines that are no object with the keys wanted."""
    rest: bytes = b""
    """What follows the last newline: a line that was being written."""


def read_lines(path: Path, keys: Collection[str]) -> Lines:
    """The lines of a file, those good that are objects with these keys; none of a file that is not there."""
    content = path.read_bytes() if path.exists() else b""
    *texts, rest = content.split(b"\n")
    lines = Lines(rest=rest)
    for number, text in enumerate(texts, start=1):
        try:
            document = json.loads(text)
        except ValueError:
            document = None
        if isinstance(document, dict) and document.keys() >= set(keys):
            lines.whole.append((text, document))
        else:
            lines.bad.append((number, text))
    try:
        rest.decode()
    except UnicodeDecodeError:  # no line of ours that was being written: it would be ASCII
        lines.bad.append((len(texts) + 1, rest))
        lines.rest = b""
    return lines


def lines_of(
    run: Run, check: str, path: Path, keys: Collection[str], blocks: bool = False
) -> Generator[Finding, None, list[dict[str, Any]]]:
    """Findings about a file's lines; returns the good ones. blocks: a start reads them and would fail."""
    lines = read_lines(path, keys)
    if lines.bad:
        yield bad_lines(run, check, path, lines, blocks)
    if lines.rest and not run.writers:
        mend = partial(_take_out_bad_lines, run, path, lines)
        yield Finding(check, WARNING, f"{path.name} ends in a line that was cut short", "--fix cuts it", mend=mend)
    return [document for _, document in lines.whole]


def bad_lines(run: Run, check: str, path: Path, lines: Lines, blocks: bool) -> Finding:
    """The finding about lines that cannot be read."""
    seen = f"{len(lines.bad)} lines of {path.name} cannot be read, first line {lines.bad[0][0]}"
    mend = partial(_take_out_bad_lines, run, path, lines)
    return Finding(check, BROKEN, seen, f"--fix moves them to {DAMAGED_LINES}", blocks, mend)


def _take_out_bad_lines(run: Run, path: Path, lines: Lines) -> None:
    """Write the good lines back, and the others to DAMAGED_LINES. Twice is as once."""
    taken = [*lines.bad, *([(len(lines.whole) + len(lines.bad) + 1, lines.rest)] if lines.rest else [])]
    name = name_in(run.folder, path)
    records = [{"file": name, "line": number, "text": text.decode(errors="replace")} for number, text in taken]
    damaged = run.folder / DAMAGED_LINES
    known = set(storage.read_lines(damaged))
    texts = [json.dumps(record) + "\n" for record in records]
    storage.append_text(damaged, "".join(text for text in texts if text not in known))
    storage.write_text(path, "".join(text.decode() + "\n" for text, _ in lines.whole))
