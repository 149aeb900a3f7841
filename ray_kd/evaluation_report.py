"""The evaluate job's document for people: report.md with its pictures, report.json, the terminal's text."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray_kd import plot
from ray_kd.errors import ConfigError
from ray_kd.summary import METRIC_LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POSITION, ENTROPY, CALIBRATION, MASS = "kl_by_position", "kl_by_teacher_entropy", "calibration", "teacher_mass_by_rank"
"""Names of the pictures; the ending is .png."""

Document = dict[str, Any]
"""Of `evaluation.evaluate`."""


def prepare(folder: Path) -> None:
    """Make the folder before anything is measured. Raises ConfigError where no report could be written into it."""
    if not plot.is_possible():
        raise ConfigError("--report draws its plots with matplotlib: pip install '.[bench]'")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".probe"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--report '{folder}' cannot be written: {error.strerror or error}") from error


def write(folder: Path, document: Document) -> None:
    """report.md, report.json and one .png a plot; those of an earlier report are replaced."""
    (folder / "report.json").write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    for name, draw in _PLOTS.items():
        figure, axes = plot.new_axes()
        draw(document, axes)
        plot.save(figure, folder / f"{name}.png")
    text = f"# Evaluation of {document['model']}\n\n{describe(document, with_plots=True)}\n"
    (folder / "report.md").write_text(text, encoding="utf-8")


def describe(document: Document, with_plots: bool = False) -> str:
    """All sections as Markdown, which a terminal shows as well without the links to the plots."""
    parts = []
    for title, picture, body in _sections(document):
        parts.append(f"## {title}")
        parts += [f"![{title}]({picture}.png)"] if with_plots and picture else []
        parts.append(body)
    return "\n\n".join(parts)


def _sections(document: Document) -> Iterator[tuple[str, str | None, str]]:
    """Title, name of a picture or None, body."""
    metric = "kl" if "kl" in document else "topk_bucket_kl"
    counted = f"{document['num_tokens']:,.0f} target tokens of {document['num_rows']:,.0f} held-out rows."
    yield "Held-out metrics", None, f"{_headline(document)}\n\n{counted}"
    for title, name, picture in (
        ("By tokens of context in the document", "by_position", POSITION),
        ("By entropy of the teacher, in nats", "by_teacher_entropy", ENTROPY),
    ):
        rows = [
            (_range(e), f"{e['num_tokens']:,}", _number(e[metric]), _number(e["top1_agreement"]))
            for e in document[name]
        ]  # fmt: skip
        yield title, picture, _table(("from - below", "tokens", METRIC_LABELS[metric], "top-1 agreement"), rows)
    yield "Calibration", CALIBRATION, _calibration(document["calibration"])
    shares = [(str(entry["rank"]), f"{entry['mass']:.4f}") for entry in document["teacher_mass_by_rank"]]
    yield "Probability of the teacher's most likely tokens", MASS, _table(("top", "mean probability"), shares)
    if "generations" in document:
        yield "Answers side by side", None, "\n\n".join(map(_answers, document["generations"]))
    if "lm_eval" in document:
        yield "Tasks of lm-evaluation-harness", None, _tasks(document["lm_eval"])


def _headline(document: Document) -> str:
    columns = {"measured": document}
    if document["before"] is not None:
        columns = {"before training": document["before"], **columns}
    rows = [
        (label, *(_number(column[name]) for column in columns.values()))
        for name, label in METRIC_LABELS.items()
        if name in document
    ]
    return _table(("", *columns), rows)


def _calibration(calibration: dict[str, Any]) -> str:
    """Both models' bins beside each other: a bin that one of them has no token in stays empty for it."""
    bins = {(name, e["from"]): e for name, found in calibration.items() for e in found["bins"]}
    rows = []
    for start in sorted({start for _, start in bins}):
        entries = [bins.get((name, start)) for name in calibration]
        interval = next(_range(entry) for entry in entries if entry is not None)
        cells = [
            (f"{e['num_tokens']:,}", _number(e["confidence"]), _number(e["accuracy"])) if e else ("", "", "")
            for e in entries
        ]
        rows.append((interval, *(cell for group in cells for cell in group)))
    headings = [f"{name}: {figure}" for name in calibration for figure in ("tokens", "confidence", "accuracy")]
    errors = ", ".join(f"{name} {found['ece']:.4f}" for name, found in calibration.items())
    return f"Expected calibration error against the labels: {errors}.\n\n" + _table(("confidence", *headings), rows)


def _answers(entry: dict[str, Any]) -> str:
    """Indented, so that Markdown in an answer stays as it is."""
    said = {"prompt": entry["prompt"], **entry["answers"]}
    parts = []
    for name, text in said.items():
        shown = "(its weights are on a server)" if text is None else text.strip() or "(ends at once)"
        parts.append(f"{name}:\n\n" + "\n".join(f"    {line}" for line in shown.splitlines()))
    return "\n\n".join(parts)


def _tasks(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            entry["task"],
            entry["metric"] if entry["filter"] == "none" else f"{entry['metric']} ({entry['filter']})",
            f"{entry['value']:.4f}",
            "" if entry["stderr"] is None else f"{entry['stderr']:.4f}",
            "" if entry["num_documents"] is None else f"{entry['num_documents']:,}",
        )
        for entry in results
    ]
    return _table(("task", "metric", "value", "standard error", "documents"), rows)


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned in plain text too, the first to the left."""
    # A bar would end the cell; the one of a divergence has a sign of its own.
    headings, *rows = ([cell.replace("||", "∥").replace("|", "\\|") for cell in row] for row in (headings, *rows))
    widths = [max(3, *(len(row[place]) for row in [headings, *rows])) for place in range(len(headings))]

    def line(cells: Sequence[str]) -> str:
        padded = [
            f"{cell:<{w}}" if i == 0 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width) if place == 0 else "-" * (width - 1) + ":" for place, width in enumerate(widths)]
    return "\n".join(line(cells) for cells in (headings, rule, *rows))


def _range(entry: dict[str, Any]) -> str:
    start, end = ("" if entry[side] is None else f"{round(entry[side], 3):g}" for side in ("from", "to"))
    return f"{start} - {end}".rstrip()


def _number(value: float) -> str:
    return f"{value:,.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _draw_buckets(document: Document, axes: "Axes", name: str, xlabel: str) -> None:
    metric = "kl" if "kl" in document else "topk_bucket_kl"
    entries = document[name]
    places = range(len(entries))
    axes.bar(places, [entry[metric] for entry in entries], 0.8, color=plot.STUDENT)
    axes.axhline(document[metric], color=plot.REFERENCE, linewidth=0.8, linestyle="--", label="all tokens")
    axes.set_xticks(places, [_range(entry) for entry in entries])
    axes.set_xlabel(xlabel)
    axes.set_ylabel(METRIC_LABELS[metric])
    axes.legend(fontsize=8)


def _draw_position(document: Document, axes: "Axes") -> None:
    _draw_buckets(document, axes, "by_position", "tokens of context in the document")


def _draw_entropy(document: Document, axes: "Axes") -> None:
    _draw_buckets(document, axes, "by_teacher_entropy", "entropy of the teacher's distribution, nats")


def _draw_calibration(document: Document, axes: "Axes") -> None:
    """Markers grow with the tokens of their bin."""
    axes.plot([0, 1], [0, 1], color=plot.REFERENCE, linewidth=0.8, linestyle="--", label="calibrated")
    for name, colour in (("teacher", plot.TEACHER), ("student", plot.STUDENT)):
        found = document["calibration"][name]
        bins = found["bins"]
        confidences, accuracies = [e["confidence"] for e in bins], [e["accuracy"] for e in bins]
        sizes = [10 + 150 * e["num_tokens"] / document["num_tokens"] for e in bins]
        axes.plot(confidences, accuracies, color=colour, linewidth=1, label=f"{name}, ECE {found['ece']:.3f}")
        axes.scatter(confidences, accuracies, s=sizes, color=colour)
    axes.set_xlabel("probability of the most likely token")
    axes.set_ylabel("how often it is the label")
    axes.legend(fontsize=8)


def _draw_mass(document: Document, axes: "Axes") -> None:
    entries = document["teacher_mass_by_rank"]
    axes.plot([e["rank"] for e in entries], [e["mass"] for e in entries], color=plot.TEACHER, marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("most likely tokens of the teacher")
    axes.set_ylabel("their probability together, mean")


_PLOTS = {POSITION: _draw_position, ENTROPY: _draw_entropy, CALIBRATION: _draw_calibration, MASS: _draw_mass}
