"""The first records of a source as a preparation would take them, without preparing anything; knows no Ray.

Costs: the records in memory, tokenised one by one; nothing is written.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from ray_kd.data.plan import Plan
from ray_kd.data.records import BadRecord, Document, Record, Segment
from ray_kd.data.shard import hash_text, is_held_out, source_and_format, usable
from ray_kd.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class Sampled:
    """One record that can be used."""

    record: Record
    segments: list[Segment]
    document: Document
    route: str
    """"" where nothing is routed."""
    is_held_out: bool
    """It is of the eval source, or of the fraction that is kept for evaluation."""


@dataclass(frozen=True)
class Sample:
    """The first records of a source."""

    usable: list[Sampled]
    bad: list[BadRecord]
    is_all: bool
    """The source has no more."""

    @property
    def num_records(self) -> int:
        return len(self.usable) + len(self.bad)


def read_sample(plan: Plan, is_eval: bool, limit: int) -> Sample:
    """Up to `limit` records from the beginning of the source, or of the eval source."""
    task = plan.task
    tokenizer = load_tokenizer(task.tokenizer_path, task.revision)
    source, form = source_and_format(task, is_eval)
    shards = [shard for of_eval, shard in plan.shards if of_eval is is_eval]
    records: Iterator[Record | BadRecord] = (record for shard in shards for record in source.read(shard))
    good: list[Sampled] = []
    bad: list[BadRecord] = []
    for record in islice(records, limit):
        (found,) = usable([record], task.route_by, form, tokenizer)
        if isinstance(found, BadRecord):
            bad.append(found)
            continue
        assert isinstance(record, Record)
        route, document, text = found
        held_out = is_eval or is_held_out(hash_text(text), task.seed, task.eval_fraction)
        good.append(Sampled(record, list(form.segments(record.data, tokenizer)), document, route, held_out))
    return Sample(good, bad, is_all=next(records, None) is None)
