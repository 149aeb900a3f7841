"""A plan as tables for the terminal; every figure of it is in `Plan.to_dict`."""

from collections.abc import Iterable, Sequence

from ray_kd.plan.memory import FREE_NBYTES, PROCESS_NBYTES, TeacherMemory
from ray_kd.plan.planning import Plan
from ray_kd.plan.scale import BLOCKS_PER_SECOND, GPUS_A_NODE

_GB = 1e9


def describe(plan: Plan) -> str:
    """All tables, and under them what was assumed."""
    parts = [_parameters(plan), _worker(plan), _teachers(plan), _flops(plan), _link(plan), _time(plan)]
    if plan.simulated:
        parts.append(_scale(plan))
    parts.append("assumed\n" + "\n".join(f"- {line}" for line in plan.assumptions))
    return "\n\n".join(part for part in parts if part)


def _parameters(plan: Plan) -> str:
    models = [(teacher.name, teacher.dtype, teacher.size) for teacher in plan.teachers]
    rows = [["parameters", "type", "all", "embeddings and head", "trained"]]
    for name, dtype, size in [*models, ("student", plan.student_dtype, plan.student)]:
        trained = f"{size.trained:,}" if name == "student" else "-"
        rows.append([name, dtype, f"{size.parameters + size.beside:,}", f"{size.embeddings:,}", trained])
    return _table(rows)


def _worker(plan: Plan) -> str:
    device = plan.student_device
    of_all = f"{device.nbytes / _GB:g} GB" if device.nbytes is not None else "the host's memory"
    of_them = f"{plan.workers} of them"
    if plan.fewest_workers < plan.workers:
        of_them = f"{plan.fewest_workers} of them, the fewest of {plan.fewest_workers} to {plan.workers}"
    header = f"GB of a train worker ({device.name}: {of_all}; {of_them})"
    rows = [[header, *(f"ZeRO {w.stage}{'*' * (w.stage == plan.configured_stage)}" for w in plan.stages)]]
    parts = {
        "weights": lambda w: w.weights, "fp32 master and moments": lambda w: w.master + w.moments,
        "gradients": lambda w: w.gradients, "buckets, gathered layer": lambda w: w.buffers,
        "activations of a micro-batch": lambda w: w.activations, "loss: a chunk of logits, d head": lambda w: w.loss,
        "or, in the step: gradients again": lambda w: w.in_step, "most while it trains": lambda w: w.training,
        "most, with the exact held-out KL": lambda w: w.most,
    }  # fmt: skip
    for name, of in parts.items():
        if name.startswith("most, with") and not any(w.evaluation for w in plan.stages):
            continue
        rows.append([name, *(_gb(of(w)) for w in plan.stages)])
    fits = [plan.fits(w) for w in plan.stages]
    if device.nbytes is not None:
        rows.append(["fits", *("yes" if one else "NO" for one in fits)])
    beside = "; a teacher is on the same GPU" if plan.is_shared else ""
    notes = ["* train.zero_stage"]
    if device.nbytes is None:
        notes.append(f"tensors alone: Python, torch and DeepSpeed take about {PROCESS_NBYTES / _GB:g} GB a process")
    if device.nbytes is not None:
        notes.append(f"{FREE_NBYTES / _GB:g} GB are left for the CUDA context and the allocator{beside}")
    return _table(rows) + "\n" + "; ".join(notes)


def _teachers(plan: Plan) -> str:
    rows = [["GB of a teacher on each of its GPUs", "weights", "activations", "top-k", "reserved", "most", "fits"]]
    for number, teacher in enumerate(plan.teachers):
        found: TeacherMemory | None = teacher.memory
        if found is None:
            rows.append([f"{teacher.name} (on a server)", "-", "-", "-", "-", "-", "-"])
            continue
        is_fitting = plan.teacher_fits(number)
        fits = "-" if is_fitting is None else "yes" if is_fitting else "NO"
        where = f"{teacher.name} ({teacher.device.name}, {teacher.processes} x {teacher.gpus_each:g})"
        parts = found.weights, found.activations, found.selection, found.reserved, found.most
        rows.append([where, *map(_gb, parts), fits])
    return _table(rows)


def _flops(plan: Plan) -> str:
    f = plan.flops
    rows = [["GFLOP a token", "decoder", "head", "backward", "recomputed", "all"]]
    for teacher in plan.teachers:
        head = f.teacher_head
        rows.append([teacher.name, _g(teacher.flops - head), _g(head), "-", "-", _g(teacher.flops)])
    rows.append(
        [
            "student",
            _g(f.student_forward),
            f"{_g(f.loss)} (loss)",
            _g(f.student_backward),
            _g(f.recomputed),
            _g(f.student),
        ]
    )
    return _table(rows)


def _link(plan: Plan) -> str:
    rate = plan.balance.tokens_per_second if plan.balance else None
    rows = [
        ["wire, disk and host", ""],
        ["bytes of a target", f"{plan.nbytes_per_target:,}"],
        ["bytes of a row on the wire", f"{plan.row_nbytes:,.0f}"],
    ]
    if rate is not None:
        rows.append(["between the pools", f"{rate * plan.wire_nbytes_per_token / _GB:.3g} GB/s"])
    rows += [
        ["object store: the run-ahead", f"{plan.run_ahead_nbytes / _GB:.3g} GB"],
        ["a checkpoint on disk", f"{plan.checkpoint_nbytes / _GB:.4g} GB"],
        ["its copy in host memory, all workers", f"{plan.checkpoint_copy_nbytes / _GB:.4g} GB"],
    ]
    if plan.cache_nbytes is not None:
        rows.append(["the teacher's cache of an epoch", f"{plan.cache_nbytes / _GB:.3g} GB"])
    return _table(rows)


def _time(plan: Plan) -> str:
    work, balance = plan.work, plan.balance
    rows = [["time", ""]]
    if work.rows is not None:
        rows.append(["rows of an epoch", f"{work.rows:,} ({work.source})"])
    rows.append(["steps", "not known" if work.steps is None else f"{work.steps:,}"])
    if balance is not None:
        waits, share = balance.waiting
        for name, pool in (("teachers", balance.teacher), ("students", balance.student)):
            rows.append([f"tokens/s of the {name}", f"{pool.tokens_per_second:,.0f} ({pool.processes} x "
                         f"{pool.devices_each:g})"])  # fmt: skip
        rows += [
            ["tokens/s of the run", f"{balance.tokens_per_second:,.0f}"],
            ["who waits", f"the {waits}, {share:.0%} of its time"],
            ["teacher actors for each worker, balanced", f"{balance.actors_per_worker:.2f}"],
        ]
    if plan.hours is not None:
        gpus = "" if plan.gpu_hours is None else f"; {plan.gpu_hours:,.3g} GPU hours"
        rows.append(["hours of training", f"{plan.hours:,.3g}{gpus}"])
    return _table(rows)


def _scale(plan: Plan) -> str:
    rows = [["simulated: GPUs", "teachers", "students", "tokens/s", "waits", "ZeRO", "rows/step", "wire GB/s",
             "of a link", "store GB", "executor", "hours"]]  # fmt: skip
    for s in plan.simulated:
        rows.append([
            f"{s.gpus:,}", str(s.teacher_gpus), str(s.student_gpus), f"{s.tokens_per_second:,.0f}",
            f"{s.waits} {s.waiting:.0%}", f"{s.communication:.0%}", f"{s.rows_a_step:,}", f"{s.wire / _GB:.3g}",
            f"{s.link:.1%}", f"{s.object_store / _GB:.3g}", f"{s.blocks:.0%}{' !' * (s.blocks > 1)}",
            "-" if s.hours is None else f"{s.hours:.3g}",
        ])  # fmt: skip
    notes = [
        "simulated, not measured; each with the split that trains most. The global batch grows with the workers, each "
        "of which keeps its micro-batches",
        f"ZeRO: share of a step that is communication, none of it overlapped, over the links between GPUs up to "
        f"{GPUS_A_NODE} workers, then over a {GPUS_A_NODE}th of a node's {plan.node_gbit:g} Gbit/s (--node-gbit)",
        "of a link: what the wire takes of a student node's; store: blocks that keep every process busy",
        f"executor: of {BLOCKS_PER_SECOND:g} blocks/s, which one Ray Data executor managed on two cores; above 100% "
        "(!) the stream is the limit: more rows a block (train.global_batch_size, teacher.run_ahead_rows)",
    ]
    return _table(rows) + "\n" + "\n".join(f"- {note}" for note in notes)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they must be, the first to the left, numbers to the right, a rule under the header."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = [_line(row, widths) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0].rstrip()), *lines[1:]])


def _line(row: Iterable[str], widths: Sequence[int]) -> str:
    first, *others = [cell.rjust(width) if place else cell.ljust(width)
                      for place, (cell, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
    return "  ".join([first, *others]).rstrip()


def _gb(nbytes: float) -> str:
    return f"{nbytes / _GB:.2f}"


def _g(flops: float) -> str:
    return f"{flops / 1e9:.3g}"
