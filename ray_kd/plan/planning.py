"""From a config to its plan: models' configs and the prepared data's manifest are all that is read.

`plan` reads top to bottom in the order of the table that `tables.py` makes of it.
"""

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ray_kd import cluster, models, objectives, plugins, run_folder
from ray_kd.config import RunConfig, each_teacher, worker_range
from ray_kd.data.manifest import Manifest, is_intact
from ray_kd.data.order import SlotOrder
from ray_kd.data.plan import plan_preparation
from ray_kd.errors import ConfigError
from ray_kd.losses.terms import CE, parse_terms
from ray_kd.payloads import FEATURES, HIDDEN_STATES
from ray_kd.payloads._frame import NBYTES as FRAME_NBYTES
from ray_kd.pipeline import stream_sizes
from ray_kd.plan import memory
from ray_kd.plan.activations import activations_of
from ray_kd.plan.devices import Device, device_of
from ray_kd.plan.measure import Measured, measure
from ray_kd.plan.memory import ITEMSIZE, TeacherMemory, WorkerMemory
from ray_kd.plan.placement import Gpu, are_apart, place
from ray_kd.plan.rates import MFU, Balance, Pool, seconds_of
from ray_kd.plan.scale import Simulated, Workers, simulate
from ray_kd.plan.sizes import Flops, Size, flops_of, size_of, student_config, with_projectors
from ray_kd.validate import check_init, check_settings, check_top_k

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

_CPU = Device("CPU", 0.0, None, 10e9)
_ASSUMED_GPU = "H100"


@dataclass(frozen=True)
class Asked:
    """What the command line says beside the config."""

    teacher_device: str | None = None
    student_device: str | None = None
    mfu: float | None = None
    flops: float | None = None
    """FLOP/s that a device of either pool sustains, in place of peak times mfu."""
    is_measured: bool = False
    rows: int | None = None
    """Training rows, where the data is not prepared yet."""
    server_gpus: int = 1
    """Behind a teacher that is asked over HTTP."""
    node_gbit: float = 400.0
    """Gbit/s of the network link of a node."""


@dataclass(frozen=True)
class Teacher:
    """One teacher of the config."""

    name: str
    size: Size
    dtype: str
    memory: TeacherMemory | None
    """None: it is on a server."""
    device: Device
    processes: int
    gpus_each: float
    flops: float
    """Of a position of a row that it answers."""


@dataclass(frozen=True)
class Work:
    """What the run goes through."""

    rows: int | None
    """Of the prepared data, an epoch."""
    steps: int | None
    targets: float
    """Share of positions whose next token is trained."""
    most_targets: int
    """In any row."""
    source: str


@dataclass(frozen=True)
class Plan:
    """What a run takes; bytes, FLOPs, seconds, tokens (positions of rows) and hours."""

    teachers: list[Teacher]
    student: Size
    student_dtype: str
    student_device: Device
    workers: int
    configured_stage: int
    stages: list[WorkerMemory]
    gpus: list[Gpu]
    """What is on each, of workers, of actors and of servers."""
    fewest_workers: int
    """Of an elastic run, where ZeRO's shards are largest: what `stages` are for."""
    flops: Flops
    """Of the first teacher and the student."""
    work: Work
    nbytes_per_target: int
    row_nbytes: float
    """On the wire: the payload, 32 bytes of its header and 12 a token of prepared columns."""
    wire_nbytes_per_token: float
    """The same, of a token."""
    node_gbit: float
    run_ahead_nbytes: int
    checkpoint_nbytes: int
    checkpoint_copy_nbytes: int
    """Host memory over all workers."""
    cache_nbytes: int | None
    """Of an epoch's answers."""
    balance: Balance | None
    hours: float | None
    gpu_hours: float | None
    simulated: list[Simulated]
    assumptions: list[str]

    def fits(self, worker: WorkerMemory) -> bool | None:
        """Whether a worker at this stage fits its GPU, beside a teacher where they share it. None: no GPU is known."""
        if self.student_device.nbytes is None:
            return None
        beside = max((self.nbytes_on(gpu) for gpu in self.gpus if gpu.has_worker), default=0.0)
        return worker.most + beside + memory.FREE_NBYTES <= self.student_device.nbytes

    def teacher_fits(self, number: int) -> bool | None:
        """Whether actors of the numbered teacher fit a GPU beside each other. None: no GPU is known."""
        teacher = self.teachers[number]
        if teacher.device.nbytes is None or teacher.memory is None:
            return None
        most = max((self.nbytes_on(gpu) for gpu in self.gpus if number in gpu.teachers), default=teacher.memory.most)
        return most + memory.FREE_NBYTES <= teacher.device.nbytes

    def nbytes_on(self, gpu: Gpu) -> float:
        """Of the actors on a GPU."""
        found = [self.teachers[number].memory for number in gpu.teachers]
        return sum(one.most for one in found if one is not None)

    @property
    def is_shared(self) -> bool:
        """Whether a teacher is on a worker's GPU."""
        return any(gpu.has_worker and gpu.teachers for gpu in self.gpus)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, what the properties say among them."""
        plain = asdict(self)
        for worker, stage in zip(self.stages, plain["stages"], strict=True):
            stage |= {"training": worker.training, "most": worker.most, "fits": self.fits(worker)}
        for number, (teacher, one) in enumerate(zip(self.teachers, plain["teachers"], strict=True)):
            one["fits"] = self.teacher_fits(number)
            if teacher.memory is not None:
                one["memory"]["most"] = teacher.memory.most
        plain["num_gpus"], plain["is_shared"] = len(plain.pop("gpus")), self.is_shared
        plain["flops"] |= {"teacher": self.flops.teacher, "student": self.flops.student}
        if self.balance is not None:
            waits, share = self.balance.waiting
            plain["balance"] |= {
                "tokens_per_second": self.balance.tokens_per_second, "waits": waits, "waiting": share,
                "actors_per_worker": self.balance.actors_per_worker, "is_shared": self.balance.is_shared,
            }  # fmt: skip
            for name in ("teacher", "student"):
                plain["balance"][name]["tokens_per_second"] = getattr(self.balance, name).tokens_per_second
        return plain


def plan(config: RunConfig, asked: Asked) -> Plan:
    """What the run takes. Raises ConfigError, one line, for what is wrong in config, models or what is asked."""
    check_settings(config)
    gpus, asked = _placed(config, asked)
    configs = [_config_of(alone, "teacher") for _, alone in each_teacher(config)]
    own = _config_of(config, "student") if config.student.model is not None else None
    for (_, alone), model in zip(each_teacher(config), configs, strict=True):
        check_top_k(alone, model.vocab_size)
    if own is None and config.student.init is not None:
        check_init(config.student.init, configs[0])
    objectives.check_models(config, configs[0], own)
    models.require_plain_head(own or configs[0])
    student_of = student_config(config.student, configs[0], own)
    student = with_projectors(
        size_of(student_of, "student", config.student.lora, config.student.freeze),
        _num_projectors(config, configs[0], own),
    )
    assumptions = ["a token is a position of a row, padding included"]
    work = _work(config, asked, assumptions)
    is_dense = config.teacher.payload == HIDDEN_STATES
    is_sparse = not is_dense and config.loss.tail == "renormalize" and not _has_ce(config)
    attention = _looks_at_attention(config, configs[0], own)
    teachers, flops = [], None
    for (one, alone), model in zip(each_teacher(config), configs, strict=True):
        size = size_of(model, "teacher")
        found = flops_of(alone, size, student, targets=work.targets, is_dense=is_dense, is_sparse=is_sparse)
        flops = flops or found
        teachers.append(
            _teacher(alone, one.name or "" if one else "teacher", size, model, found.teacher, asked, attention)
        )
    assert flops is not None
    if len(teachers) > 1:
        assumptions.append("each of the teachers is taken to answer every row")
    device = _device(asked.student_device, "--student-device", config.train.gpus_per_worker > 0)
    fewest, workers = worker_range(config.train)
    activations = activations_of(
        student_of, config.student, config.train.micro_batch_size, config.data.sequence_length, attention
    )
    loss = memory.loss_nbytes(config, teachers[0].size, student, ITEMSIZE[teachers[0].dtype], is_dense=is_dense)
    before = ITEMSIZE[teachers[0].dtype] * teachers[0].size.parameters if _has_exact_kl(config) else 0
    stages = [
        memory.worker_memory(config, stage, fewest, student, activations, loss_nbytes=loss, evaluation_nbytes=before)
        for stage in memory.STAGES
    ]
    nbytes = objectives.nbytes_per_token(config, configs[0], own)
    length = config.data.sequence_length
    entries = length if config.teacher.payload == FEATURES else work.targets * length
    block_rows, run_ahead = stream_sizes(config, work.most_targets, nbytes)
    row_nbytes = 12 * length + entries * nbytes + FRAME_NBYTES
    balance, measured = _balance(
        config, asked, teachers, device, gpus, flops, work, configs[0], student_of, student, assumptions
    )
    tokens = None if work.steps is None else work.steps * config.train.global_batch_size * length
    hours = None if balance is None or tokens is None else tokens / balance.tokens_per_second / 3600
    checkpoint = memory.checkpoint_nbytes(student)
    return Plan(
        teachers=teachers, student=student, student_dtype=config.student.dtype, student_device=device,
        workers=workers, configured_stage=config.train.zero_stage, stages=stages, gpus=gpus, fewest_workers=fewest,
        flops=flops, work=work, nbytes_per_target=nbytes, row_nbytes=row_nbytes,
        wire_nbytes_per_token=row_nbytes / length, node_gbit=asked.node_gbit, run_ahead_nbytes=run_ahead,
        checkpoint_nbytes=checkpoint, checkpoint_copy_nbytes=checkpoint if config.train.async_checkpoints else 0,
        cache_nbytes=None if work.rows is None else round(work.rows * (entries * nbytes + FRAME_NBYTES + 8)),
        balance=balance, hours=hours, gpu_hours=None if hours is None or device is _CPU else hours * len(gpus),
        simulated=_simulated(
            config, asked, balance, teachers, device, student, row_nbytes, block_rows, tokens, measured
        ),
        assumptions=assumptions,
    )  # fmt: skip


def _config_of(config: RunConfig, what: str) -> "PreTrainedConfig":
    """config.json of a model; its weights need not be there."""
    section = config.teacher if what == "teacher" else config.student
    assert section.model is not None
    try:
        return models.check_model(section.model, section.revision, what, needs_weights=False)
    except ConfigError as error:
        if models.is_local(section.model):
            raise
        raise ConfigError(
            f"{error}: for a plan a folder with the model's config.json does ({what}.model=FOLDER)"
        ) from error


def _num_projectors(config: RunConfig, teacher: "PreTrainedConfig", own: "PreTrainedConfig | None") -> int:
    if config.teacher.payload != FEATURES:
        return 0
    terms = objectives.make_features(config, teacher, own)().values()
    made = [term.projectors.make(0) for term in terms if term.projectors is not None]
    return sum(p.numel() for module in made for p in module.parameters())


def _looks_at_attention(config: RunConfig, teacher: "PreTrainedConfig", own: "PreTrainedConfig | None") -> bool:
    if config.teacher.payload != FEATURES:
        return False
    return any(term.attention_layers for term in objectives.make_features(config, teacher, own)().values())


def _has_ce(config: RunConfig) -> bool:
    return any(entry.kind == CE for entry in parse_terms(config.loss.terms))


def _has_exact_kl(config: RunConfig) -> bool:
    """Whether train workers load the teacher, for held-out rows."""
    is_held_out = config.data.eval_fraction > 0 or config.data.eval_source is not None
    return config.eval.kl == "exact" and is_held_out and _is_local(config) and not config.teachers


def _is_local(config: RunConfig) -> bool:
    """Whether the teacher's actors load its weights themselves."""
    engine, _ = plugins.options("teacher.engines", config.teacher.engine, "teacher.engine")
    return bool(engine.Engine.is_local_model)


def _work(config: RunConfig, asked: Asked, assumptions: list[str]) -> Work:
    """Rows from --rows, else from the prepared data, else steps alone."""
    length, train = config.data.sequence_length, config.train
    rows, targets, most, source = asked.rows, 1.0, length - 1, "--rows"
    manifest = None if rows is not None else _prepared(config, assumptions)
    if manifest is not None:
        rows, most, source = manifest.num_rows, manifest.max_targets_per_row, "the prepared data"
        targets = manifest.target_tokens / (rows * length)
        assumptions.append(f"{manifest.packing_efficiency:.1%} of positions are tokens and {targets:.1%} have a target")
    else:
        assumptions.append("every position has a target, as in full rows of plain text: with conversations fewer do")
    steps = train.max_steps
    if rows is not None:
        steps = SlotOrder(rows, train.global_batch_size, train.epochs, train.max_steps, config.run.seed).num_steps
    elif steps is not None:
        source = "train.max_steps"
    return Work(rows, steps, targets, most, source if steps is not None else "not known")


def _prepared(config: RunConfig, assumptions: list[str]) -> Manifest | None:
    """The manifest of the data that a run would take, if it is there."""
    try:
        found = plan_preparation(config.data, config.teacher.model, config.teacher.revision, config.run.seed)
    except ConfigError as error:
        assumptions.append(f"the number of rows is not known ({error}): --rows, or prepare_data, tells it")
        return None
    folder = run_folder.prepared_dir(config) / found.folder_name
    if is_intact(folder, found.fingerprint):
        return Manifest.read(folder)
    assumptions.append("the data is not prepared: prepare_data, or --rows, tells the number of rows")
    return None


def _device(name: str | None, option: str, on_gpu: bool) -> Device:
    if name is not None:
        return device_of(name, option)
    return device_of(_ASSUMED_GPU, option) if on_gpu else _CPU


def _teacher(
    alone: RunConfig, name: str, size: Size, model: "PreTrainedConfig", flops: float, asked: Asked, looks: bool
) -> Teacher:  # fmt: skip
    options, is_local = alone.teacher, _is_local(alone)
    saved = str(getattr(model, "dtype", None) or "float32").removeprefix("torch.")
    dtype = saved if options.dtype == "auto" else options.dtype
    dtype = dtype if dtype in ITEMSIZE else "float32"
    pool = options.pool
    processes, gpus_each = (pool.max_actors, pool.num_gpus or 1.0) if is_local else (1, float(asked.server_gpus))
    device = _device(asked.teacher_device, "--teacher-device", pool.num_gpus > 0 or not is_local)
    found = None
    if is_local:
        selects = options.payload != HIDDEN_STATES
        found = memory.teacher_memory(
            alone, size, ITEMSIZE[dtype], max(1, int(pool.num_gpus)), selects=selects, looks=looks, nbytes=device.nbytes
        )
    return Teacher(name, size, dtype, found, device, processes, gpus_each, flops)


def _placed(config: RunConfig, asked: Asked) -> tuple[list[Gpu], Asked]:
    """What is on each GPU; where teachers and workers share some, a name of either stands for both.

    What is configured for CPUs has a whole GPU where one is named.
    """
    actors = []
    for _, alone in each_teacher(config):
        pool, named = alone.teacher.pool, float(asked.teacher_device is not None)
        actors.append((pool.max_actors, pool.num_gpus or named) if _is_local(alone) else (1, float(asked.server_gpus)))
    part = config.train.gpus_per_worker or float(asked.student_device is not None)
    gpus = place(worker_range(config.train)[1], part, actors, apart=are_apart(config))
    if not any(gpu.has_worker and gpu.teachers for gpu in gpus):
        return gpus, asked
    first, second = asked.teacher_device, asked.student_device
    if first and second and device_of(first, "--teacher-device") != device_of(second, "--student-device"):
        raise ConfigError(
            f"--teacher-device is '{first}' and --student-device is '{second}': allowed is one GPU for both, which "
            f"share it (teacher.pool.num_gpus={config.teacher.pool.num_gpus:g}, train.gpus_per_worker={part:g})"
        )
    return gpus, replace(asked, teacher_device=first or second, student_device=second or first)


def _balance(
    config: RunConfig, asked: Asked, teachers: list[Teacher], device: Device, gpus: list[Gpu], flops: Flops,
    work: Work, teacher_of: "PreTrainedConfig", student_of: "PreTrainedConfig", student: Size, assumptions: list[str],
) -> tuple[Balance | None, Measured | None]:  # fmt: skip
    """The rates of the two pools; None where nothing says how fast the devices are."""
    workers = worker_range(config.train)[1]
    on_cpu = not config.train.gpus_per_worker and not config.teacher.pool.num_gpus and cluster.address(config) is None
    taught = [gpu for gpu in gpus if gpu.teachers]
    is_shared = any(gpu.has_worker for gpu in taught)
    shared = sum(gpu.has_worker for gpu in taught) / len(taught) if taught else float(on_cpu and device is _CPU)
    # Where they take turns each has whole devices while it is on.
    turns = (len(taught) or 1, workers if is_shared else 1)
    if asked.is_measured:
        measured = _measured(config, asked, teachers, teacher_of, student_of, student, work)
        a_step = config.train.global_batch_size * config.data.sequence_length / workers
        share = 1 if config.train.zero_stage == 0 else workers
        if config.teacher.payload == FEATURES:
            assumptions.append("what feature terms take of a student's token is not in what was measured")
        assumptions.append("rates are of random models of these widths on this machine, large ones by a few layers")
        seconds = measured.teacher, measured.student + measured.step / share / a_step
        counts = turns if shared else (teachers[0].processes, workers)
        pools = [Pool(n, 1.0, s) for n, s in zip(counts, seconds, strict=True)]
        if shared:
            where = "the GPUs that they share" if is_shared else "this machine's cores"
            assumptions.append(f"teacher and student take turns on {where}")
        return Balance(pools[0], pools[1], shared), measured
    rates = [_sustained(one, asked) for one in (*(t.device for t in teachers), device)]
    if not all(rates):
        assumptions.append("no rates: --measure times this machine, --teacher-device and --student-device name GPUs")
        return None, None
    if asked.flops is not None:
        assumptions.append(f"a device of either pool sustains {asked.flops:.3g} FLOP/s (--flops)")
    else:
        assumptions.append(
            f"devices sustain {asked.mfu or MFU:.0%} of their dense bf16 peak (--mfu): "
            + ", ".join(f"{d.name} {d.peak_flops / 1e12:g} TFLOP/s" for d in {t.device for t in teachers} | {device})
        )
    if shared:
        where = "the GPUs that they share" if is_shared else "one device"
        assumptions.append(f"teacher and student take turns on {where}")
    pools = []
    for teacher, rate in zip(teachers, rates[:-1], strict=True):
        pools.append(Pool(teacher.processes, teacher.gpus_each, seconds_of(teacher.flops, rate, teacher.gpus_each)))
    slowest = min(pools, key=lambda pool: pool.tokens_per_second)
    processes, each = workers, config.train.gpus_per_worker or 1.0
    if shared:
        # Several teachers take turns with each other too.
        once = sum(seconds_of(t.flops, rate, 1.0) for t, rate in zip(teachers, rates[:-1], strict=True))
        slowest, processes, each = Pool(turns[0], 1.0, once), turns[1], 1.0
    return Balance(slowest, Pool(processes, each, seconds_of(flops.student, rates[-1], each)), shared), None


def _measured(
    config: RunConfig, asked: Asked, teachers: list[Teacher], teacher_of: "PreTrainedConfig",
    student_of: "PreTrainedConfig", student: Size, work: Work,
) -> Measured:  # fmt: skip
    import torch

    for option, value in (("--flops", asked.flops), ("--mfu", asked.mfu), ("--teacher-device", asked.teacher_device),
                          ("--student-device", asked.student_device)):  # fmt: skip
        if value is not None:
            raise ConfigError(f"--measure and {option} are both given: allowed is one, they say the same")
    if (config.train.gpus_per_worker > 0 or config.teacher.pool.num_gpus > 0) and not torch.cuda.is_available():
        raise ConfigError("--measure times this machine, which has no GPU, and the config asks for GPUs: allowed is "
                          "--teacher-device and --student-device, or --flops")  # fmt: skip
    if len(teachers) > 1 or not _is_local(config):
        raise ConfigError("--measure times one teacher whose weights are loaded here: allowed is --teacher-device and "
                          "--student-device, or --flops")  # fmt: skip
    return measure(config, teacher_of, student_of, (teachers[0].size, student), teachers[0].dtype, work.targets)


def _sustained(device: Device, asked: Asked) -> float:
    return asked.flops if asked.flops is not None else device.peak_flops * (asked.mfu or MFU)


def _simulated(
    config: RunConfig, asked: Asked, balance: Balance | None, teachers: list[Teacher], device: Device, student: Size,
    row_nbytes: float, block_rows: int, tokens: int | None, measured: Measured | None,
) -> list[Simulated]:  # fmt: skip
    if balance is None or device is _CPU or measured is not None:
        return []
    train, length = config.train, config.data.sequence_length
    micro_batches = train.global_batch_size // (worker_range(train)[1] * train.micro_batch_size)
    rows = micro_batches * train.micro_batch_size
    seconds = balance.student.seconds_per_token * balance.student.devices_each
    workers = Workers(
        seconds, rows * length, micro_batches, rows, train.zero_stage,
        ITEMSIZE[config.student.dtype] * student.trained, device.peer_bandwidth,
    )  # fmt: skip
    teacher_seconds = sum(t.flops / _sustained(t.device, asked) for t in teachers)
    return simulate(
        workers, teacher_seconds, max(1, int(max(t.gpus_each for t in teachers))), link=asked.node_gbit * 1e9 / 8,
        row_nbytes=row_nbytes, length=length, block_rows=block_rows, num_tokens=tokens,
    )  # fmt: skip
