"""Self-tests on real records: what is trained is the answer, and what a teacher says of a position is of that position.

Position t predicts token t + 1. That is said once (`schema.target_positions`) and used by every stage; here the stages'
own code is run on the sample and held against the texts of the records.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ray_kd import plugins, schema
from ray_kd.data import tokenizer as tokenizing
from ray_kd.data.packing import Rows, cut, pack
from ray_kd.data.records import Document
from ray_kd.data.sample import Sampled
from ray_kd.errors import EXIT_BUG
from ray_kd.preflight.report import FAILED, OK, WARNING, Finding, Subject

if TYPE_CHECKING:
    from ray_kd.trainer.collate import MicroBatch

_SHOWN = 40  # characters on each side of the first trained token
_PACKED = 16  # records
_FAKE_IDS, _FAKE_TOP_K = 512, 4


def check_template(subject: Subject) -> Iterator[Finding]:
    """The trained tokens of each sampled record are its answers; shows where the first of them begins."""
    tokenizer, sample = _tokenizer(subject), subject.sample
    assert sample is not None
    first = next((one for one in sample.usable if not one.document.is_trained[0]), sample.usable[0])
    ids, is_trained = first.document.input_ids, first.document.is_trained
    start = int(is_trained.argmax())
    run = int((~is_trained[start:]).argmax()) or len(ids) - start
    before, after = tokenizer.decode(ids[:start])[-_SHOWN:], tokenizer.decode(ids[start : start + run])
    after = after if len(after) <= 2 * _SHOWN else f"{after[:_SHOWN]} ... {after[-_SHOWN:]}"
    where = f"{first.record.file.rsplit('/', 1)[-1]}:{first.record.line}"
    yield Finding("template", OK, f"{where}: after {before!r} it trains {after!r}")
    wrong = [(one, problem) for one in sample.usable if (problem := _problem(one, subject, tokenizer))]
    if wrong:
        one, problem = wrong[0]
        yield Finding(
            "template", WARNING, f"of {len(wrong)} of {len(sample.usable)} records something else is trained than "
            f"their answers, the first at {one.record.file}:{one.record.line}: {problem}; look at the chat template",
        )  # fmt: skip
    else:
        yield Finding("template", OK, f"in all {len(sample.usable)} records the labels, decoded, are the answers' text")


def _problem(one: Sampled, subject: Subject, tokenizer: Any) -> str | None:
    """What is wrong with the trained tokens of a record."""
    trained = [
        "".join(segment.text for segment in segments)
        for is_trained, segments in groupby(one.segments, lambda segment: segment.is_trained)
        if is_trained
    ]
    decoded = _runs(one.document, tokenizer)
    # A token that straddles the border belongs to both, and some tokenizers drop or add a space at it.
    if len(decoded) != len(trained) or any(
        text.strip() not in run for text, run in zip(trained, decoded, strict=False)
    ):
        return f"{decoded[:1]} where the format says {trained[:1]}"
    lost = [text for text in _answers(one, subject) if text not in "\n".join(decoded)]
    return f"{lost[0]!r} of the assistant is not trained" if lost else None


def _runs(document: Document, tokenizer: Any) -> list[str]:
    """The text of each stretch of trained tokens."""
    runs = groupby(zip(document.is_trained, document.input_ids, strict=True), lambda pair: pair[0])
    return [tokenizer.decode([int(token) for _, token in run]) for is_trained, run in runs if is_trained]


def _answers(one: Sampled, subject: Subject) -> list[str]:
    """What the assistant says in a record of messages, read without the template."""
    if plugins.kind_of(subject.config.data.format) != "messages":
        return []
    _, options = plugins.options("data.formats", subject.config.data.format, "data.format")
    messages = one.record.data[options.column]
    contents = [message.get("content") for message in messages if message["role"] == "assistant"]
    return [content.strip() for content in contents if isinstance(content, str)]


def check_alignment(subject: Subject) -> Iterator[Finding]:
    """Packs sampled records and sends them through a fake teacher, the wire and the trainer's collation."""
    length, tokenizer = subject.config.data.sequence_length, _tokenizer(subject)
    assert subject.sample is not None
    pieces = cut([one.document for one in subject.sample.usable[:_PACKED]], length).pieces
    rows = pack(pieces, length, tokenizing.pad_id(tokenizer))
    if (problem := _problem_of_rows(rows, pieces)) is not None:
        yield Finding("alignment", FAILED, f"{problem}: a bug, please report it", EXIT_BUG)
        return
    batch, expected = _through_the_stages(rows)
    is_right = np.array_equal(batch.teacher["teacher_ids"].numpy(), expected) and np.array_equal(
        batch.labels.numpy(), rows.input_ids.reshape(-1)[batch.targets.numpy() + 1]
    )
    if not is_right:
        yield Finding(
            "alignment", FAILED, "a teacher's answers reach other positions: a bug, please report it", EXIT_BUG
        )
        return
    yield Finding(
        "alignment", OK, f"{len(pieces)} documents in {len(rows.input_ids)} rows: positions restart with each, and a "
        f"fake teacher's answers to all {len(expected)} targets arrive at theirs",
    )  # fmt: skip


def _problem_of_rows(rows: Rows, pieces: list[Document]) -> str | None:
    """Whether every document stands in the rows once, with positions of its own and labels where it is trained."""
    wanted = sorted((tuple(piece.input_ids), tuple(piece.is_trained[1:])) for piece in pieces)
    found = []
    for ids, labels, positions in zip(rows.input_ids, rows.labels, rows.position_ids, strict=True):
        starts = np.flatnonzero(positions == 0)
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            if not np.array_equal(positions[start:end], np.arange(end - start)):
                return "positions do not count up in a packed document"
            is_label = labels[start:end] != schema.IGNORED_LABEL
            if not np.array_equal(labels[start:end][is_label], ids[start:end][is_label]):
                return "labels are not the tokens they stand for"
            if is_label[1:].any():
                found.append((tuple(ids[start:end]), tuple(is_label[1:])))
    num_targets = int(schema.target_positions(rows.labels, rows.position_ids).sum())
    if sorted(found) != wanted:
        return "packed rows do not hold each document once"
    if num_targets != sum(int(piece.is_trained[1:].sum()) for piece in pieces):
        return f"packed rows have {num_targets} targets, not those of their documents"
    return None


def _through_the_stages(rows: Rows) -> "tuple[MicroBatch, NDArray[np.int64]]":
    """(the micro-batch that the student would get, the ids [M, K] that the teacher must have named there)."""
    from ray_kd.payloads import TOPK_LOGPROBS
    from ray_kd.teacher.engine import Request
    from ray_kd.teacher.engines.fake import Config, Engine
    from ray_kd.trainer.collate import collate
    from ray_kd.trainer.feed import Expected

    engine = Engine(Config(vocab_size=_FAKE_IDS))
    columns = as_columns(rows)
    answers: list[Any] = list(engine.annotate(columns, Request(top_k=_FAKE_TOP_K)))
    batch = collate(
        as_table(columns, [answer.encode() for answer in answers]), Expected(TOPK_LOGPROBS, _FAKE_TOP_K, 1.0)
    )
    # Of the token before the one that is predicted: found from the labels, not by `target_positions`.
    flat, positions = rows.labels.reshape(-1), rows.position_ids.reshape(-1)
    before = [place - 1 for place in np.flatnonzero(flat != schema.IGNORED_LABEL) if positions[place] > 0]
    logprobs = engine.logprobs(rows.input_ids.reshape(-1)[before])
    return batch, np.argsort(-logprobs, axis=-1, kind="stable")[:, :_FAKE_TOP_K]


def as_columns(rows: Rows) -> dict[str, NDArray[Any]]:
    """Packed rows as the stream has them."""
    return {
        schema.ROW_ID: np.arange(len(rows.input_ids)), schema.INPUT_IDS: rows.input_ids, schema.LABELS: rows.labels,
        schema.POSITION_IDS: rows.position_ids,
    }  # fmt: skip


def as_table(columns: dict[str, NDArray[Any]], blobs: list[bytes]) -> Any:
    """The rows with a teacher's payloads, as the trainer gets them."""
    import pyarrow as pa

    count = len(blobs)
    table = {
        name: column if column.ndim == 1 else pa.FixedSizeListArray.from_arrays(column.reshape(-1), column.shape[1])
        for name, column in columns.items()
    }
    return pa.table(
        table | {
            schema.SLOT: np.arange(count), schema.WEIGHT: np.ones(count, np.float32),
            schema.TEACHER_PAYLOAD: pa.array(blobs, pa.binary()), schema.TEACHER_BUSY_S: np.zeros(count, np.float32),
            schema.TEACHER_ERROR: [""] * count,
        }
    )  # fmt: skip


def one_row(subject: Subject) -> Rows:
    """The first record, or its first piece, as a packed row."""
    assert subject.sample is not None
    length = subject.config.data.sequence_length
    pieces = cut([subject.sample.usable[0].document], length).pieces
    return pack(pieces[:1], length, tokenizing.pad_id(_tokenizer(subject)))


def _tokenizer(subject: Subject) -> Any:
    assert subject.plan is not None
    return tokenizing.load_tokenizer(subject.plan.task.tokenizer_path, subject.plan.task.revision)
