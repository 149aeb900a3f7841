"""The records: are they there, what becomes of the first of them, and is all of it prepared already."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ray_kd import pipeline, plugins, run_folder, validate
from ray_kd.data.sample import Sample, read_sample
from ray_kd.errors import DataError
from ray_kd.preflight.report import FAILED, OK, WARNING, Finding, Subject

NUM_RECORDS = 200
"""Looked at from the beginning of each source."""


def check_sources(subject: Subject) -> Iterator[Finding]:
    """The data section is right and its files exist."""
    data = subject.config.data
    validate.check_data(subject.config)
    subject.has_sources = True
    held_out = "data.eval_source" if data.eval_source is not None else f"{data.eval_fraction:g} of them"
    has_eval = data.eval_source is not None or data.eval_fraction > 0
    seen = f"{plugins.kind_of(data.source)} as {plugins.kind_of(data.format)}"
    if has_eval:
        yield Finding("sources", OK, f"{seen}, held out: {held_out}")
    else:
        yield Finding(
            "sources", WARNING, f"{seen}, none held out: there will be no held-out metrics and no best checkpoint; "
            "set data.eval_fraction or data.eval_source",
        )  # fmt: skip


def check_records(subject: Subject) -> Iterator[Finding]:
    """The first records of each source through the format and the tokenizer."""
    subject.plan = pipeline.plan_of(subject.config)
    for is_eval, key in ((False, "data.source"), (True, "data.eval_source")):
        if is_eval and subject.config.data.eval_source is None:
            continue
        sample = read_sample(subject.plan, is_eval, NUM_RECORDS)
        if sample.usable and not is_eval:
            subject.sample = sample
        yield from _judge(sample, key, subject)


def _judge(sample: Sample, key: str, subject: Subject) -> Iterator[Finding]:
    count, limit = sample.num_records, subject.config.data.max_bad_fraction
    if not count:
        yield Finding("records", FAILED, f"{key} has no records: its files are empty", DataError.exit_code)
        return
    which = f"all {count} records" if sample.is_all else f"the first {count} records"
    if sample.bad:
        fraction, first = len(sample.bad) / count, sample.bad[0]
        reasons = Counter(bad.reason for bad in sample.bad).most_common(3)
        seen = (
            f"{len(sample.bad)} of {which} of {key} ({fraction:.1%}) cannot be used, the first at "
            f"{first.file}:{first.line}: {', '.join(f'{reason} ({number})' for reason, number in reasons)}"
        )
        if not sample.usable or fraction > limit:
            yield Finding(
                "records", FAILED, f"{seen}; allowed is data.max_bad_fraction={limit:g}: mend them, choose another "
                "data.format, or allow more", DataError.exit_code,
            )  # fmt: skip
        else:
            yield Finding("records", WARNING, f"{seen}; they will be left out (quarantine.jsonl lists them)")
    if sample.usable:
        yield Finding("records", OK, f"{key}: {len(sample.usable)} of {which} usable, {_in_tokens(sample, subject)}")


def _in_tokens(sample: Sample, subject: Subject) -> str:
    length = subject.config.data.sequence_length
    sizes = np.array([len(one.document.input_ids) for one in sample.usable])
    labels = sum(int(one.document.is_trained[1:].sum()) for one in sample.usable)
    return (
        f"{np.median(sizes):.0f} tokens each (median; 90 % up to {np.quantile(sizes, 0.9):.0f}, longest "
        f"{sizes.max()}), "
        f"{(sizes > length).mean():.1%} longer than data.sequence_length={length} (they are split), "
        f"{labels / sizes.sum():.0%} of the tokens are targets"
    )


def check_prepared(subject: Subject) -> Iterator[Finding]:
    """Whether the run finds its data prepared."""
    from ray_kd.data.manifest import Manifest, is_intact

    assert subject.plan is not None
    folder = run_folder.prepared_dir(subject.config) / subject.plan.folder_name
    if not is_intact(folder, subject.plan.fingerprint):
        yield Finding("prepared data", OK, f"not there yet: the run makes it in '{folder}'")
        return
    subject.manifest = manifest = Manifest.read(folder)
    yield Finding("prepared data", OK, f"there: {manifest.num_rows:,} rows to train on in '{folder}'")
