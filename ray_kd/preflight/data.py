"""The records: are they there, what becomes of the first of them, and is all of it prepared already."""

from collections import Counter
from collections.abc import Iterator

import numpy as np

from ray_kd import pipeline, plugins, run_folder, storage, validate
from ray_kd.data.sample import Sample, read_sample
from ray_kd.errors import DataError
from ray_kd.preflight.report import FAILED, OK, SKIPPED, WARNING, Finding, Subject

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
    samples = {"data.source": read_sample(subject.plan, False, NUM_RECORDS)}
    if subject.config.data.eval_source is not None:
        samples["data.eval_source"] = read_sample(subject.plan, True, NUM_RECORDS)
    if samples["data.source"].usable:
        subject.sample = samples["data.source"]
    found = list(_judge(samples, subject))
    yield from found
    if not any(finding.state == FAILED for finding in found) and all(sample.is_all for sample in samples.values()):
        _check_both_sides(list(samples.values()), subject)
    for key, sample in samples.items():
        if sample.usable:
            seen = f"{key}: {len(sample.usable)} of {_which([sample])} usable, {_in_tokens(sample, subject)}"
            yield Finding("records", OK, seen)


def _judge(samples: dict[str, Sample], subject: Subject) -> Iterator[Finding]:
    """What cannot be used, as the run counts it: of all sources together."""
    for key, sample in samples.items():
        if sample.is_all and not sample.usable:
            why = f"usable record: all {len(sample.bad)} are refused" if sample.bad else "records: its files are empty"
            yield Finding("records", FAILED, f"{key} has no {why}", DataError.exit_code)
    bad = [one for sample in samples.values() for one in sample.bad]
    if not bad:
        return
    limit, fraction = subject.config.data.max_bad_fraction, len(bad) / sum(s.num_records for s in samples.values())
    reasons = Counter(one.reason for one in bad).most_common(3)
    seen = (
        f"{len(bad)} of {_which(list(samples.values()))} of {' and '.join(samples)} ({fraction:.1%}) cannot be used, "
        f"the first at {bad[0].file}:{bad[0].line}: {', '.join(f'{reason} ({number})' for reason, number in reasons)}"
    )
    if fraction <= limit:
        yield Finding("records", WARNING, f"{seen}; they will be left out (quarantine.jsonl lists them)")
        return
    advice = "mend them, choose another data.format, or allow more"
    if all(sample.is_all for sample in samples.values()):
        seen = f"{seen}; allowed is data.max_bad_fraction={limit:g}: {advice}"
        yield Finding("records", FAILED, seen, DataError.exit_code)
    else:
        seen = f"{seen}; more than data.max_bad_fraction={limit:g} allows, if the rest is alike: {advice}"
        yield Finding("records", WARNING, seen)


def _which(samples: list[Sample]) -> str:
    count = sum(sample.num_records for sample in samples)
    return f"all {count} records" if all(sample.is_all for sample in samples) else f"the first {count} records"


def _check_both_sides(samples: list[Sample], subject: Subject) -> None:
    """Raise what the preparation of exactly these records raises, where none is left to train on or to evaluate."""
    from ray_kd.data.prepare import _check_sides

    counts: Counter[str] = Counter()
    for one in (one for sample in samples for one in sample.usable):
        side = "eval" if one.is_held_out else "train"
        counts.update({f"{side}_documents": 1, f"{side}_rows": 1})  # each has a target, and so a row at least
    _check_sides(counts, subject.config.data)


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
    config, train = subject.config, subject.config.train
    folder = run_folder.prepared_dir(config) / subject.plan.folder_name
    if subject.is_offline and storage.is_remote(folder):
        yield Finding("prepared data", SKIPPED, f"'{folder}' is not looked at with --offline")
        return
    if not is_intact(folder, subject.plan.fingerprint):
        yield Finding("prepared data", OK, f"not there yet: the run makes it in '{folder}'")
        if train.max_steps is not None:  # as many rows as that takes, at most
            pipeline.warn_of_steps(config, pipeline.order_of(config, train.max_steps * train.global_batch_size))
        return
    subject.manifest = manifest = Manifest.read(folder)
    pipeline.warn_of_steps(config, pipeline.order_of(config, manifest.num_rows))
    yield Finding("prepared data", OK, f"there: {manifest.num_rows:,} rows to train on in '{folder}'")
