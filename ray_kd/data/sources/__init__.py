"""Where records come from: one file per kind, each with `Config` and `Source(config)`.

A `Source` has `config` (absolute paths: it rebuilds the source in another process), `identity()` (JSON-able, changes
when the data changes), `shards()` (JSON-able, deterministic chunks of about 2,000 records) and `read(shard)`, which
yields `Record` and `BadRecord` and never raises for a single bad record.
"""
