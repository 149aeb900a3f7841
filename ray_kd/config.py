"""The configuration of a run: YAML, then `key=value` overrides, closed.

An unknown key fails with the nearest one; a value of the wrong type fails by name. Plug-in options
(`source`, `format`, `engine`, `divergence`) are checked against the plug-in's own Config by `plugins.options`.
No torch and no ray here, so a recipe loads on a laptop.
"""

import ast
import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from ray_kd import plugins, redact, storage
from ray_kd.errors import ConfigError

STRICT, SHARED = "strict", "shared"
"""What `teacher.vocabulary` may be."""


@dataclass
class Run:
    dir: str = MISSING
    """Where everything of the run goes; the same dir resumes it. On storage that all nodes share."""
    seed: int = 0
    """Seeds the order of rows, the eval split, dropout and the draws of `teacher.selection: sample`."""
    trackers: list[Any] = field(default_factory=list)
    """Where metrics go beside metrics.jsonl: [tensorboard | mlflow | wandb, or {kind: ..., options}, ...]."""


@dataclass
class Data:
    source: Any = MISSING
    """Where records come from: {kind: jsonl | parquet | text | huggingface, ...}."""
    format: Any = field(default_factory=lambda: {"kind": "messages"})
    """How a record becomes tokens and labels: {kind: text | messages | prompt_completion | alpaca | sharegpt}."""
    eval_source: Any = None
    """Held-out records, same schema and format as source; at most one of eval_source and eval_fraction."""
    eval_fraction: float = 0.0
    """Fraction of documents held out for evaluation, chosen by document hash (duplicates stay on one side)."""
    route_by: str | None = None
    """Record column whose value decides which of `teachers` answers; documents of different values share no row."""
    sequence_length: int = 512
    """Tokens in a packed row; longer documents are split and counted."""
    prepared_dir: str | None = None
    """Folder of the prepared data, reused by later runs. Default: <run.dir>/../prepared."""
    license: str | None = None
    """Licence of the data, for the model card."""
    max_bad_fraction: float = 0.05
    """Above this fraction of quarantined records the run stops with exit code 65."""


@dataclass
class Pool:
    min_actors: int = 1
    """Teacher actors kept alive while the stream runs."""
    max_actors: int = 1
    """Teacher actors the pool may grow to."""
    num_cpus: float = 0.5
    """Logical CPUs per teacher actor."""
    num_gpus: float = 0
    """GPUs per teacher actor; fractions share one, and a whole number of them holds one copy of a large teacher."""
    label_selector: dict[str, str] = field(default_factory=dict)
    """Ray node labels that a teacher's node must carry, for example {ray-kd.io/pool: teacher}."""


@dataclass
class Cache:
    mode: str = "disabled"
    """disabled | write_through (keep every answer, compute none twice) | read (use what is there, keep nothing)."""
    path: str | None = None
    """Folder of the teacher's answers, for any number of runs. Default: <run.dir>/../teacher_cache."""
    file_rows: int = 64
    """Rows of a file that cache_teacher writes: what a kill loses of an actor's work, and what it holds in memory."""


@dataclass
class TeacherModel:
    model: str = MISSING
    """Local folder or Hugging Face hub id of the teacher."""
    revision: str | None = None
    """Hub revision of the teacher (branch, tag or commit); recorded in the model card."""
    engine: Any = field(default_factory=lambda: {"kind": "hf"})
    """What computes the teacher's answers: {kind: hf | vllm | http, ...}."""
    batch_size: int = 4
    """Rows per teacher forward; caps the engine's sub-batches, does not change any result."""
    batch_tokens: int | None = None
    """Tokens per teacher forward at most, padding included, rows being sorted by length; in place of batch_size. For
    the engine hf: vllm has max_num_batched_tokens of its own, and http leaves batches to the server."""
    dtype: str = "auto"
    """Weights' type: auto (as saved) | float32 | bfloat16 | float16."""
    threads: int | None = None
    """CPU threads per teacher actor. Default: physical cores shared out between teachers and workers."""
    timeout_s: float = 900.0
    """Longest time to load the teacher, or to answer one block of rows; then its actor is ended and replaced."""
    pool: Pool = field(default_factory=Pool)


@dataclass
class Teacher(TeacherModel):
    payload: str = "topk_logprobs"
    """What it sends: topk_logprobs | hidden_states (2 bytes x width a token; exact over the whole vocabulary) |
    features (topk_logprobs, and the layers that the terms hidden_state and attention of the loss compare)."""
    top_k: int = 64
    """Log-probabilities kept per target token, the most likely first; vocabulary size = everything."""
    selection: str = "topk"
    """topk: the most likely tokens | sample: top_k draws from the teacher, unbiased (forward_kl with tail drop)."""
    wire: str = "plain"
    """How answers travel to the student: plain (fp16, least work) | compact (about half the bytes, for slow links)."""
    vocabulary: str = "strict"
    """Heads of teacher and student: strict (of as many rows) | shared (rows that the tokenizer has no token for are
    padding: the teacher's distribution is over the tokens alone, and the numbers of rows may differ)."""
    max_bytes_per_token: int | None = None
    """Most bytes of a token that the link to the student may carry, above which the run is refused. Default: any."""
    run_ahead_rows: int = 64
    """How many rows the teacher may be ahead of the student; bounds the object store and the work lost in a crash."""
    cache: Cache = field(default_factory=Cache)


@dataclass
class OneOfTeachers(TeacherModel):
    name: str | None = None
    """Names the pool in journals and summary, and the folder of its cache. Default: the last part of `model`."""
    weight: float = 1.0
    """Of its probabilities where several answer a row; they are divided by their sum."""
    rows: list[Any] | None = None
    """Values of the column `data.route_by` (text, integers, booleans) whose rows it answers. Default: every row."""


@dataclass
class StudentInit:
    layers: Any = MISSING
    """How many teacher layers to keep (chosen by `select`), or an explicit list of layer indices."""
    select: str = "block_influence"
    """How to choose when `layers` is a number: block_influence (1 - cos of a layer's input and output)."""
    intermediate_size: int | None = None
    """MLP neurons to keep in each layer, those of highest activation (Minitron). Default: all."""
    num_attention_heads: int | None = None
    """Query heads to keep in each layer, as many of each KV head that is kept. Default: all."""
    num_key_value_heads: int | None = None
    """KV heads to keep in each layer. Default: all, or num_attention_heads where the teacher has as many of both."""
    hidden_size: int | None = None
    """Channels of the residual stream to keep, the same in all layers. Default: all."""
    calibration_rows: int = 16
    """Training rows on which layers, neurons, heads and channels are measured."""


@dataclass
class Lora:
    r: int = MISSING
    """Rank of the adapters: the update of a weight [out, in] is (alpha / r) B A with A [r, in] and B [out, r]."""
    alpha: int = 32
    """Scales the update, by alpha / r."""
    dropout: float = 0.0
    """Probability that an adapter does not see an element of its input, in training."""
    target_modules: Any = "all-linear"
    """Which linear layers get an adapter: all-linear (all but the head), or a list of names: [q_proj, v_proj]."""
    use_dora: bool = False
    """DoRA: the length of each row of a weight is trained apart from its direction, for more work a step."""


@dataclass
class Student:
    model: str | None = None
    """Local folder or hub id of the student; exactly one of model and init."""
    revision: str | None = None
    """Hub revision of the student."""
    init: StudentInit | None = None
    """Make the student from the teacher's layers, whole or narrower: {layers: 15, intermediate_size: 1024}."""
    lora: Lora | None = None
    """Train low-rank adapters beside the student's weights, which stay as they are: {r: 16, alpha: 32}."""
    freeze: list[str] = field(default_factory=list)
    """What is not trained: embeddings, head, layers.3, layers.0-3, or patterns of parameters' names ('*.mlp.*')."""
    dtype: str = "float32"
    """Training type: float32 | bfloat16 | float16 (fp32 master weights in all of them)."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    liger: str = "auto"
    """Liger kernels for the student: auto (on CUDA, where the architecture is supported) | never."""


@dataclass
class Loss:
    divergence: Any = field(default_factory=lambda: {"kind": "forward_kl"})
    """forward_kl | reverse_kl | jsd | ..., as a name or {kind: jsd, beta: 0.3}."""
    tail: str = "bucket"
    """The mass outside the top k: bucket (one more outcome) | renormalize | drop (not for every divergence)."""
    temperature: Any = 1.0
    """Softmax temperature of teacher and student, a number or a schedule; the loss carries its square."""
    terms: list[Any] = field(default_factory=lambda: [{"kind": "kd", "weight": 1.0}])
    """What is summed: [{kind: kd | ce | hidden_state | attention, weight: 1.0, options of the kind}, ...]. A weight is
    a number or a schedule: {schedule: constant | linear | cosine, start: 1.0, end: 0.1, steps: 500, from_step: 1}."""
    chunk_size: int = 256
    """Tokens per chunk of logits: the loss holds [chunk_size, vocabulary] at a time."""


@dataclass
class Train:
    num_workers: Any = 1
    """Training processes (DeepSpeed ranks), or [min, max]: as many of them as the cluster has nodes for at the time."""
    resize_every_s: float = 60.0
    """With [min, max] workers: seconds between looks at whether there is room for more; then they start again."""
    cpus_per_worker: float = 0.5
    """Logical CPUs per worker."""
    gpus_per_worker: float = 0
    """GPUs per worker: 0 (trains on CPU), 1, or a fraction of one that teachers use too."""
    label_selector: dict[str, str] = field(default_factory=dict)
    """Ray node labels that a worker's node must carry, for example {ray-kd.io/pool: student}."""
    zero_stage: int = 2
    """DeepSpeed ZeRO stage: 0 | 1 | 2 | 3."""
    micro_batch_size: int = 1
    """Rows per forward and backward on one worker."""
    global_batch_size: int = 8
    """Rows per optimiser step over all workers; a multiple of (any) num_workers x micro_batch_size."""
    epochs: int = 1
    """Passes over the data; whichever of epochs and max_steps ends first ends the run."""
    max_steps: int | None = None
    """Optimiser steps at most."""
    learning_rate: float = 2.0e-4
    """Peak learning rate of AdamW."""
    schedule: str = "cosine"
    """After the warm-up: cosine | linear (both to 0) | constant."""
    warmup_steps: int = 10
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices; biases and norms have none."""
    max_grad_norm: float = 1.0
    """Gradient clipping by global norm; 0 turns it off."""
    checkpoint_every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    async_checkpoints: bool = True
    """Write checkpoints while training goes on, for a copy in host memory (12 bytes a parameter over all workers)."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept."""
    keep_best: bool = True
    """Keep the checkpoint with the lowest held-out KL too, of those whose step was evaluated (export --best)."""
    eval_every: int = 100
    """Steps between evaluations on the held-out rows; 0 evaluates only before and after."""
    log_every: int = 1
    """Steps between lines of metrics.jsonl; the last step is always logged."""
    max_bad_steps: int = 3
    """Steps in a row whose loss or gradient is not finite that are skipped; one more ends the run (exit code 64)."""
    max_failures: int = 3
    """Worker-group restarts before the run gives up; each goes on from the newest checkpoint."""
    threads_per_worker: int | None = None
    """CPU threads per worker. Default: physical cores shared out between teachers and workers."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """Entries put over DeepSpeed's generated configuration, for example {wall_clock_breakdown: true}. Refused are those
    that another key says and those that break steps or checkpoints; the rest is not checked."""
    timeout_s: float = 1800.0
    """Longest wait for a collective operation, the next rows or the student's init before the attempt fails."""


@dataclass
class Eval:
    max_rows: int = 256
    """Held-out rows used, the same each time; 0 uses all."""
    batch_size: int = 4
    """Rows per forward in evaluation."""
    kl: str = "exact"
    """exact: whole vocabulary, with the teacher's weights beside the student | topk: its top k and a bucket."""
    prompts: list[str] = field(default_factory=list)
    """Prompts the student answers before and after training, shown at the end of the run."""
    max_new_tokens: int = 48
    """Length of those answers."""


@dataclass
class Cluster:
    address: str | None = None
    """Ray cluster to join (auto or host:port). Default: RAY_ADDRESS, else a new local Ray."""
    dashboard: bool | None = None
    """Start the dashboard with a new local Ray, on 127.0.0.1 and with Ray's token. Default: false."""
    insecure: bool = False
    """Allow that dashboard, and a cluster on another machine, without a token (RAY_AUTH_MODE)."""
    wait_s: float = 60.0
    """How long to wait for an existing cluster to have the nodes that the layout needs. After it: exit code 75 where
    an autoscaler or a lost node may bring them, else 64."""


@dataclass
class RunConfig:
    run: Run = field(default_factory=Run)
    data: Data = field(default_factory=Data)
    teacher: Teacher = field(default_factory=Teacher)
    teachers: list[OneOfTeachers] = field(default_factory=list)
    """Several teachers, a pool each: what `teacher` says of one model and its pool, and the keys here. `teacher` then
    says what is common to all; the first prepares the data and lends `student.init` its layers."""
    student: Student = field(default_factory=Student)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    eval: Eval = field(default_factory=Eval)
    cluster: Cluster = field(default_factory=Cluster)


_OF_MODEL = [item.name for item in fields(TeacherModel)]


def load(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a YAML file, apply `key=value` overrides and return the typed config, its paths absolute.

    Relative paths are against the current directory: the processes of a run each have a directory of their own.
    Raises ConfigError (one line) for a missing or malformed file, an unknown key (with the nearest one),
    a value of the wrong type, a required key that is missing, and a credential.
    """
    merged = OmegaConf.structured(RunConfig)
    if path is not None:
        content = _read_yaml(Path(path) if isinstance(path, str) else path)
        _refuse_credentials(content)
        merged = _merge(merged, content, where=str(path))
    for override in overrides:
        if "=" not in override:
            shown = redact.redact(override)
            raise ConfigError(f"override '{shown}' is not key=value (for example train.max_steps=50)")
        try:
            parsed = OmegaConf.from_dotlist([override])
        except Exception as error:  # a YAML scanner error of whatever the user typed
            raise ConfigError(
                f"override '{redact.redact(override)}' cannot be read: {str(error).splitlines()[0]}"
            ) from error
        assert isinstance(parsed, DictConfig)
        _refuse_credentials(parsed)
        for key in (*plugins.GROUPS, "loss.temperature"):
            _make_way(merged, parsed, key, override)
        where = f"override '{override}'"
        if isinstance(parsed.get("teachers"), DictConfig):
            _merge_into_list(merged, parsed.teachers, override)
        elif not override.startswith("loss.terms=") and isinstance(
            terms := OmegaConf.select(parsed, "loss.terms"), DictConfig
        ):
            _merge_into_terms(merged, terms, override)
        else:
            merged = _merge(merged, parsed, where)
    _settle_teachers(merged)
    try:
        config = OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is missing: set it in the YAML or with {error.full_key}=...") from error
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).splitlines()[0]) from error
    assert isinstance(config, RunConfig)
    _refuse_credentials(OmegaConf.structured(config), resolve=True)  # what ${oc.env:...} stands for
    _settle_loss(config.loss)
    _make_absolute(config)
    for place, one in enumerate(config.teachers):
        one.name = one.name or Path(one.model).name
        if one.rows is not None:
            try:
                one.rows = [route_of(value) for value in one.rows]
            except ValueError as error:
                raise ConfigError(f"teachers[{place}].rows has {one.rows}: one {error}") from error
    return config


def route_of(value: object) -> str:
    """A value of `data.route_by` as text, so that true of JSON, of YAML and of a table is the same, and "7" and 7.

    Raises ValueError for what is neither text, an integer nor a boolean.
    """
    if not isinstance(value, str | int):
        raise ValueError(f"is {type(value).__name__}: allowed is str, int, bool")
    return str(value).lower() if isinstance(value, bool) else str(value)


def worker_range(train: Train) -> tuple[int, int]:
    """The least and the most `train.num_workers`, which are the same for a number."""
    number = train.num_workers
    least, most = number if isinstance(number, list) else (number, number)
    return least, most


def has_frozen(student: Student) -> bool:
    """Whether only a part of the student trains."""
    return student.lora is not None or bool(student.freeze)


def each_teacher(config: RunConfig) -> "list[tuple[OneOfTeachers | None, RunConfig]]":
    """Each of the config's teachers and the config in which it is the only one; (None, config) of a single one."""
    if not config.teachers:
        return [(None, config)]
    return [
        (one, replace(config, teachers=[], teacher=replace(config.teacher, **{n: getattr(one, n) for n in _OF_MODEL})))
        for one in config.teachers
    ]


def _refuse_credentials(content: DictConfig, resolve: bool = False) -> None:
    """Raise ConfigError for the first credential, naming its key and never the value."""
    for key, why in redact.credentials(OmegaConf.to_container(content, resolve=resolve)):
        raise ConfigError(
            f"{key} {why}; such values come from the environment (HF_TOKEN, AWS_SECRET_ACCESS_KEY, api_key_env, ...), "
            "since a config is written to the run folder"
        )


def _settle_teachers(merged: DictConfig) -> None:
    """What `teacher` says of a model is said by the first of `teachers`, where there are several."""
    if not merged.teachers:
        return
    first, common, default = merged.teachers[0], merged.teacher, OmegaConf.structured(Teacher)
    for name in _OF_MODEL:
        if OmegaConf.is_missing(first, name):
            raise ConfigError(f"teachers[0].{name} is missing")
        is_set = not OmegaConf.is_missing(common, name) and (name == "model" or common[name] != default[name])
        if is_set and common[name] != first[name]:
            raise ConfigError(
                f"teacher.{name} and teachers are both set: set {name} in each of teachers, and leave it out of teacher"
            )
        common[name] = first[name]


def _settle_loss(loss: Loss) -> None:
    """Write every way to say the same thing in one: a run's identity compares what is written."""
    loss.temperature = _as_float(loss.temperature)
    for place, term in enumerate(loss.terms):
        if isinstance(term, str):
            loss.terms[place] = term = {"kind": term}
        if isinstance(term, dict):
            term["weight"] = _as_float(term.get("weight", 1.0))


def _as_float(value: Any) -> Any:
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _make_absolute(config: RunConfig) -> None:
    config.run.dir = _absolute(config.run.dir)
    if config.data.prepared_dir is not None:
        config.data.prepared_dir = _absolute(config.data.prepared_dir)
    if config.teacher.cache.path is not None:
        config.teacher.cache.path = _absolute(config.teacher.cache.path)
    for tracker in config.run.trackers:
        if isinstance(tracker, dict) and isinstance(tracker.get("dir"), str):
            tracker["dir"] = _absolute(tracker["dir"])
    for source in (config.data.source, config.data.eval_source):
        if isinstance(source, dict) and isinstance(source.get("paths"), str | list):
            paths = source["paths"]
            paths = [paths] if isinstance(paths, str) else paths  # one path is a list of one
            source["paths"] = [_absolute(path) if isinstance(path, str) else path for path in paths]
    models: list[TeacherModel | Student] = [config.teacher, *config.teachers, config.student]
    for model in models:
        # A hub id has the form of a relative path: what exists here, or begins like a path, is one.
        if model.model is not None and (Path(model.model).exists() or model.model.startswith((".", "~"))):
            model.model = _absolute(model.model)


def _absolute(path: str) -> str:
    return path if re.match(r"\w{2,}:/", path) else str(Path(path).expanduser().absolute())


def to_yaml(config: RunConfig) -> str:
    """The resolved config as YAML, with anything that looks like a secret masked."""
    plain = to_dict(config)
    if config.teachers:  # each says these itself
        plain["teacher"] = {name: value for name, value in plain["teacher"].items() if name not in _OF_MODEL}
    return OmegaConf.to_yaml(OmegaConf.create(plain))


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The resolved config as plain containers, secrets masked."""
    plain = OmegaConf.to_container(OmegaConf.structured(config), resolve=True)
    masked = redact.mask(plain)
    assert isinstance(masked, dict)
    return masked


def describe() -> Iterator[tuple[str, plugins.Field]]:
    """(dotted key, field) for every key of the config, in order, read from this file's own source.

    Of `teachers[]` those that `teacher` does not have.
    """
    tree = ast.parse(Path(__file__).read_text())
    yield from _describe(tree, "RunConfig", "")


def _describe(tree: ast.Module, class_name: str, prefix: str) -> Iterator[tuple[str, plugins.Field]]:
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    bases = [] if prefix.endswith("[].") else [ast.unparse(base) for base in classes[class_name].bases]
    for item in [item for name in [*bases, class_name] for item in plugins.fields_of(tree, name)]:
        nested = item.annotation.removesuffix(" | None").removeprefix("list[").removesuffix("]")
        if item.sentence or nested not in classes:
            yield prefix + item.name, item
        if nested in classes:
            is_list = item.annotation.startswith("list[")
            yield from _describe(tree, nested, f"{prefix}{item.name}{'[]' * is_list}.")


def _read_yaml(path: Path) -> DictConfig:
    if not (path.exists() if storage.is_remote(path) else path.is_file()):
        raise ConfigError(f"config file '{path}' {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        content = OmegaConf.load(io.StringIO(storage.read_text(path)))
    except Exception as error:  # yaml raises several unrelated classes for a malformed file
        reason = redact.redact(" ".join(str(error).split()))  # it quotes the line
        raise ConfigError(f"config file '{path}' is not valid YAML: {reason}") from error
    if not isinstance(content, DictConfig):
        raise ConfigError(f"config file '{path}' must hold a mapping of sections, not a list")
    return content


_RENAMED = {
    "loss.kd_weight": "it is the weight of a term now: loss.terms=[{kind: kd, weight: 1.0}, ...]",
    "loss.ce_weight": "it is the weight of a term now: loss.terms=[{kind: kd}, {kind: ce, weight: 0.5}]",
}


def _merge(base: DictConfig, update: DictConfig, where: str) -> DictConfig:
    if (misplaced := _not_a_list(base, update)) is not None:
        raise ConfigError(f"{misplaced} in {where}: allowed is a list")
    try:
        merged = OmegaConf.merge(base, update)
    except (ConfigKeyError, ConfigAttributeError) as error:
        key = str(error.full_key)
        entry = key.partition(".")[0]
        known = [name.replace("teachers[]", entry) if "[" in entry else name for name in _known_keys()]
        section = key.rpartition(".")[0]
        of_section = [name for name in known if section and name.startswith(f"{section}.")]
        if not section and "teachers" in update:  # OmegaConf names a key in a list without the list
            of_section = known + [item.name for item in fields(OneOfTeachers)]
        if key in _RENAMED:
            raise ConfigError(f"unknown key '{key}' in {where}: {_RENAMED[key]}") from error
        raise ConfigError(f"unknown key '{key}' in {where}{plugins.nearest(key, of_section or known)}") from error
    except OmegaConfBaseException as error:
        key = error.full_key or _misfit(base, update) or "value"
        raise ConfigError(f"{key} in {where}: {plugins.explain(error)}") from error
    except TypeError as error:  # what OmegaConf raises when a list is to replace a mapping
        raise ConfigError(f"{_misfit(base, update) or 'value'} in {where}: {plugins.explain(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def _not_a_list(base: DictConfig, update: DictConfig) -> str | None:
    """The dotted key and the value of the first mapping that is given for a list; OmegaConf names neither."""
    for name in map(str, update):
        known, given = OmegaConf.select(base, name), OmegaConf.select(update, name)
        if isinstance(known, ListConfig) and isinstance(given, DictConfig):
            return f"{name} is {OmegaConf.to_container(given)}"
        if isinstance(known, DictConfig) and isinstance(given, DictConfig) and (found := _not_a_list(known, given)):
            return f"{name}.{found}"
    return None


def _misfit(base: DictConfig, update: DictConfig) -> str | None:
    """The dotted key of the first section for which something else is given; OmegaConf does not name it."""
    for name in map(str, update):
        known, given = OmegaConf.select(base, name), update[name]  # which leaves out what is missing
        if isinstance(known, DictConfig):
            if not isinstance(given, DictConfig):
                return f"{name} ({given!r})"
            if found := _misfit(known, given):
                return f"{name}.{found}"
    return None


def _merge_into_list(merged: DictConfig, update: DictConfig, override: str) -> None:
    """teachers.INDEX.KEY=VALUE."""
    for index, given in _entries(merged.teachers, update, "teachers", override):
        one = merged.teachers[index]
        _make_way(one, given, "engine", override.split(f"teachers.{index}.", 1)[-1])
        merged.teachers[index] = _merge(one, given, f"override '{override}'")


def _merge_into_terms(merged: DictConfig, update: DictConfig, override: str) -> None:
    """loss.terms.INDEX.KEY=VALUE, and loss.terms.INDEX={kind: ...} for another term in its place."""
    terms = merged.loss.terms
    for index, given in _entries(terms, update, "loss.terms", override):
        one = OmegaConf.create({"kind": terms[index]}) if isinstance(terms[index], str) else terms[index]
        if override.startswith(f"loss.terms.{index}=") or not isinstance(one, DictConfig):
            one = OmegaConf.create({})
        if override.startswith(f"loss.terms.{index}.weight="):
            one.pop("weight", None)  # a schedule replaces another whole
        terms[index] = _merge(one, given, f"override '{override}'")


def _entries(known: Any, update: DictConfig, key: str, override: str) -> Iterator[tuple[int, DictConfig]]:
    """(index, keys to set) for each entry of a list that an override KEY.INDEX.NAME=VALUE names."""
    places = {str(place): place for place in range(len(known))}
    for index in map(str, update):
        if index not in places:
            allowed = ", ".join(places) or "it is empty"
            raise ConfigError(f"override '{override}': {key} has no entry {index}; allowed: {allowed}")
        given = update[index] if index in update else update[int(index)]
        if not isinstance(given, DictConfig):
            raise ConfigError(
                f"override '{override}': {key}.{index} is {given!r}: allowed are its keys ({key}.{index}.KEY=VALUE)"
            )
        yield places[index], given


def _make_way(merged: DictConfig, parsed: DictConfig, key: str, override: str) -> None:
    """For a plug-in or schedule in an override of one key=value: a mapping for its options, or nothing for another."""
    # An option set on a plug-in that was given as a bare kind.
    if override.startswith(f"{key}.") and isinstance(kind := OmegaConf.select(merged, key), str):
        OmegaConf.update(merged, key, {"kind": kind})
    # One given whole replaces another with its options.
    given = OmegaConf.select(parsed, key) if override.startswith(f"{key}=") else None
    is_list = isinstance(OmegaConf.select(merged, key), ListConfig)
    if isinstance(given, DictConfig) and ("kind" in given or "schedule" in given) and not is_list:
        OmegaConf.update(merged, key, None)


def _known_keys() -> list[str]:
    leaves = [key for key, _ in describe()] + [f"teachers[].{name}" for name in _OF_MODEL]
    sections = {".".join(key.split(".")[:depth]) for key in leaves for depth in range(1, key.count(".") + 1)}
    return leaves + sorted(sections)
