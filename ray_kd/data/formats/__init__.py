"""How a record becomes text and targets: one file per kind, each with `Config` and `Format(config)`.

A `Format` has `segments(record, tokenizer) -> list[Segment]`: the document cut where training starts and stops.
It raises ValueError (one short line, the reason in quarantine.jsonl) for a record it cannot use, and ConfigError
for a tokenizer that it cannot use. `EXAMPLE` is a record with the default field names, `EXAMPLE_TRAINED` its texts
that are trained, each with an end-of-text or end-of-turn token; the contract test holds a format to them.
"""
