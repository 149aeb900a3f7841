"""The jobs as commands: parse, call the pipeline, print one line for an error, return the exit code.

python jobs/distill.py configs/quickstart.yaml train.max_steps=50
python -m ray_kd distill configs/quickstart.yaml train.max_steps=50      # an installed package
"""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from ray_kd import config as configuration
from ray_kd import plugins, redact, storage, submission
from ray_kd.errors import EXIT_BUG, EXIT_DONE, ConfigError, DataError, RayKDError, RetryableError, cause_of

logger = logging.getLogger("ray_kd")


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of a user's mistake."""

    def error(self, message: str) -> NoReturn:
        self.exit(ConfigError.exit_code, f"error: {redact.redact(message)} (--help lists what is allowed)\n")


def main(job: str, argv: Sequence[str] | None = None) -> int:
    """Run a job by name and return its exit code. Raises only argparse's SystemExit, for --help and wrong options."""
    os.umask(os.umask(0o022) | 0o002)  # no file is for everyone to write, whatever the shell or the container says
    try:
        with storage.store_errors():
            return JOBS[job](sys.argv[1:] if argv is None else list(argv))
    except RayKDError as error:
        logger.debug("", exc_info=True)
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted; the same command goes on", RetryableError.exit_code)
    except Exception as error:  # the last resort: the traceback goes to the log, the line to the user
        logger.debug("", exc_info=True)
        if (ours := cause_of(error)) is not None:
            return _fail(str(ours), ours.exit_code)
        if not any(isinstance(handler, _RunLog) for handler in logger.handlers):
            print(redact.redact(traceback.format_exc()), end="", file=sys.stderr)
        return _fail(f"a bug, please report it: {_one_line(error)}", EXIT_BUG)
    finally:
        _end_logging()


def dispatch(argv: Sequence[str] | None = None) -> int:
    """`python -m ray_kd JOB ...`."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    usage = f"python -m ray_kd {{{' | '.join(JOBS)}}} ... (each has --help)"
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}")
        return EXIT_DONE
    if not arguments:
        return _fail(f"a job is missing: {usage}", ConfigError.exit_code)
    job = arguments[0]
    if job not in JOBS:
        return _fail(f"unknown job '{job}'{plugins.nearest(job, JOBS)} usage: {usage}", ConfigError.exit_code)
    return main(job, arguments[1:])


def distill(argv: list[str]) -> int:
    """Distil a teacher into a student: one command from records to a model folder. The same command resumes."""
    config = _config_from(argv, "distill", distill.__doc__)
    if config is None:
        return EXIT_DONE
    _start_logging(config)
    from ray_kd import pipeline, results, run_folder, summary

    run_dir = run_folder.run_dir(config)
    result = pipeline.distill(config)
    logger.info("%s", summary.describe(result))
    if samples := results.describe_samples(run_dir):
        logger.info("%s\n", samples)
    logger.info("student: %s   figures: %s   report: %s",
                *(run_dir / name for name in (run_folder.FINAL, run_folder.SUMMARY, run_folder.REPORT)))  # fmt: skip
    return EXIT_DONE


def prepare_data(argv: list[str]) -> int:
    """Tokenise and pack the data of a config, as `distill` would; the next run finds it."""
    config = _config_from(argv, "prepare_data", prepare_data.__doc__)
    if config is None:
        return EXIT_DONE
    _start_logging(config)
    from ray_kd import cluster, launch, models, pipeline, validate

    validate.check_data(config)
    models.check_model(config.teacher.model, config.teacher.revision, "teacher")
    with cluster.connected(config, trains=False), launch.interruptible():
        prepared = pipeline.prepare(config)
    print(f"prepared: {prepared.folder}")
    return EXIT_DONE


def cache_teacher(argv: list[str]) -> int:
    """Keep the teacher's answers to all training rows of a config; `distill` with a teacher.cache.mode finds them.

    Killed, or run again, it computes what is not there yet.
    """
    config = _config_from(argv, "cache_teacher", cache_teacher.__doc__)
    if config is None:
        return EXIT_DONE
    _start_logging(config)
    from ray_kd import pipeline

    for result in pipeline.cache_teacher(config):
        print(
            f"cached: {result.rows} rows, {result.computed} computed now, {result.refused} refused by the teacher, "
            f"{result.rows_per_second:.1f} rows/s: {result.folder}"
        )
    return EXIT_DONE


def evaluate(argv: list[str]) -> int:
    """Measure a run's student against its teacher on the held-out rows: KL, perplexity, bits per byte, agreement, and
    where they come from; its answers beside the teacher's; tasks of lm-evaluation-harness."""
    options = _evaluate_options(argv)
    config = _config_of_run(storage.path(options.run_dir))
    from ray_kd import evaluation, evaluation_report

    if options.report is not None:
        evaluation_report.prepare(options.report)
    asked = evaluation.Asked(
        model=options.model,
        max_rows=options.max_rows,
        prompts=options.prompt,
        max_new_tokens=options.max_new_tokens,
        tasks=options.lm_eval,
        tasks_dir=options.lm_eval_dir,
        tasks_limit=options.lm_eval_limit,
    )
    document = evaluation.evaluate(config, asked)
    print(json.dumps(document) if options.json else evaluation_report.describe(document))
    if options.report is not None:
        evaluation_report.write(options.report, document)
        print(f"report: {options.report / 'report.md'}", file=sys.stderr if options.json else sys.stdout)
    return EXIT_DONE


def _evaluate_options(argv: list[str]) -> argparse.Namespace:
    """Refuses what would have no effect."""
    from ray_kd.benchmarks.options import whole

    parser = Parser("evaluate", description=evaluate.__doc__)
    parser.add_argument("run_dir", help="the run folder")
    parser.add_argument("--model", help="a model folder to measure instead of the run's final/")
    parser.add_argument("--max-rows", type=whole(0), metavar="N",
                        help="held-out rows used; 0 uses all (default: the run's eval.max_rows)")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="DIR", help="write report.md, report.json and plots there")
    parser.add_argument("--prompt", action="append", default=[], metavar="TEXT",
                        help="show what teacher, student before and student after answer (repeatable)")  # fmt: skip
    parser.add_argument("--max-new-tokens", type=whole(1), metavar="N",
                        help="length of those answers (default: the run's eval.max_new_tokens)")  # fmt: skip
    parser.add_argument("--lm-eval", type=lambda text: text.split(","), default=[], metavar="TASKS",
                        help="tasks of lm-evaluation-harness, with commas (pip install '.[lm-eval]')")  # fmt: skip
    parser.add_argument("--lm-eval-dir", type=Path, metavar="DIR", help="definitions of tasks of your own (YAML)")
    parser.add_argument("--lm-eval-limit", type=whole(1), metavar="N", help="documents of each task at most")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(argv)
    for name, is_set, needed, is_there in (
        ("--max-new-tokens", options.max_new_tokens is not None, "--prompt", options.prompt),
        ("--lm-eval-dir", options.lm_eval_dir is not None, "--lm-eval", options.lm_eval),
        ("--lm-eval-limit", options.lm_eval_limit is not None, "--lm-eval", options.lm_eval),
    ):
        if is_set and not is_there:
            parser.error(f"argument {name}: has no effect without {needed}")
    if not all(map(str.strip, options.prompt)):
        parser.error("argument --prompt: '' is no text")
    if not all(map(str.strip, options.lm_eval)):
        parser.error(f"argument --lm-eval: '{','.join(options.lm_eval)}' is no list of names with commas between them")
    if options.lm_eval_dir is not None and not options.lm_eval_dir.is_dir():
        parser.error(f"argument --lm-eval-dir: '{options.lm_eval_dir}' is no folder")
    return options


def export(argv: list[str]) -> int:
    """Write the student of a run's checkpoint as a Hugging Face folder."""
    parser = Parser("export", description=export.__doc__)
    parser.add_argument("run_dir", help="the run folder")
    parser.add_argument("out_dir", help="the folder to write; must not exist")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--step", type=int, help="the checkpoint's step (default: the newest verified one)")
    which.add_argument("--best", action="store_true", help="the checkpoint with the lowest held-out KL")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="type of the weights (default: the run's student.dtype)")  # fmt: skip
    options = parser.parse_args(argv)
    from ray_kd import results

    run_dir = storage.path(options.run_dir)
    config = _config_of_run(run_dir)
    step = results.best_step(run_dir) if options.best else options.step
    step = results.export(config, storage.path(options.out_dir), step=step, dtype=options.dtype)
    print(f"step {step} of {options.run_dir} -> {options.out_dir}")
    return EXIT_DONE


def doctor(argv: list[str]) -> int:
    """Examine a run folder: what is there, what is damaged, whether the run can go on, and from which step."""
    parser = Parser(
        "doctor", description=doctor.__doc__, epilog=f"exit code {DataError.exit_code}: something is broken"
    )
    parser.add_argument("run_dir", help="the run folder")
    parser.add_argument(
        "--fix", action="store_true", help="remove leftovers and move what is damaged aside; not while the run is on"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args(argv)
    from ray_kd.doctor import examine

    report = examine(storage.path(options.run_dir), fix=options.fix)
    print(json.dumps(report.to_dict()) if options.json else report)
    return DataError.exit_code if report.is_broken else EXIT_DONE


def report(argv: list[str]) -> int:
    """Write the page of a run again, as it is now, or one page of several runs beside each other."""
    parser = Parser("report", description=report.__doc__)
    parser.add_argument("run_dir", nargs="+", help="a run folder: finished, failed, or of a run that is on")
    parser.add_argument("--out", metavar="FILE.html",
                        help="the page (default: report.html in the run folder, of several in this one)")  # fmt: skip
    options = parser.parse_args(argv)
    from ray_kd import locks, run_folder
    from ray_kd import report as pages

    runs = [storage.path(run_dir) for run_dir in dict.fromkeys(options.run_dir)]
    default = runs[0] / run_folder.REPORT if len(runs) == 1 else run_folder.REPORT
    out = storage.path(options.out or default, "--out")
    if out.is_dir():
        parser.error(f"argument --out: '{out}' is a folder; allowed is a file")
    html = pages.render([(run_dir, locks.holders(run_dir)) for run_dir in runs])
    with storage.refused_if_unwritable(out, "--out"):
        storage.make_folder(out.parent)
        storage.write_text(out, html)
    print(f"report: {out}")
    return EXIT_DONE


def preflight(argv: list[str]) -> int:
    """Check whether a run can start: config, packages, data, models, template and alignment, layout, disk, permissions.

    Changes nothing and starts no Ray; a configured cluster is joined for a moment.
    """
    parser = _config_parser(argv, "preflight", preflight.__doc__)
    parser.add_argument(
        "--offline", action="store_true", help="ask nothing but this machine: no hub, server or cluster"
    )
    parser.add_argument("--load", action="store_true", help="load both models here and try one row")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_intermixed_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.offline:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read when the hub's client is imported
    from ray_kd.preflight import examine

    load = partial(configuration.load, options.config, options.overrides)
    report = examine(load, offline=options.offline, loads=options.load)
    print(json.dumps(report.to_dict()) if options.json else report)
    return report.exit_code


def plan(argv: list[str]) -> int:
    """What a run takes, before GPUs are paid for: parameters, memory, FLOPs, tokens/s, wire, disk, hours. No Ray.

    From the models' config.json alone; their weights and the data need not be there.
    """
    from ray_kd.benchmarks.options import positive, whole

    parser = _config_parser(argv, "plan", plan.__doc__)
    parser.add_argument("--teacher-device", metavar="GPU", help="H100 (assumed), H200, A100, L40S, L4 or RTX4090")
    parser.add_argument(
        "--student-device", metavar="GPU", help="the same, of the train workers; where both share a GPU, one name does"
    )
    parser.add_argument("--mfu", type=positive, help="share of its peak that a GPU sustains, up to 1 (default: 0.4)")
    parser.add_argument("--flops", type=positive, help="FLOP/s that a device sustains, in place of both")
    parser.add_argument("--measure", action="store_true", help="time a few layers of both models here, random weights")
    parser.add_argument("--rows", type=whole(1), metavar="N", help="training rows, where the data is not prepared")
    parser.add_argument("--server-gpus", type=whole(1), default=1, metavar="N",
                        help="GPUs behind a teacher that is asked over HTTP (default: 1)")  # fmt: skip
    parser.add_argument("--node-gbit", type=positive, default=400.0, metavar="GBIT",
                        help="Gbit/s of a node's network link, for the simulation (default: 400)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_intermixed_args(argv)
    if options.mfu is not None and options.mfu > 1:
        parser.error(f"argument --mfu: '{options.mfu:g}' is not a share, above 0 and up to 1")
    if options.mfu is not None and options.flops is not None:
        parser.error("argument --mfu: has no effect with --flops")
    config = configuration.load(options.config, options.overrides)
    from ray_kd import plan as planning

    made = planning.plan(
        config,
        planning.Asked(
            options.teacher_device, options.student_device, options.mfu, options.flops, options.measure, options.rows,
            options.server_gpus, options.node_gbit,
        ),
    )  # fmt: skip
    print(json.dumps(made.to_dict()) if options.json else planning.describe(made))
    return EXIT_DONE


JOBS: dict[str, Callable[[list[str]], int]] = {
    "distill": distill,
    "prepare_data": prepare_data,
    "cache_teacher": cache_teacher,
    "evaluate": evaluate,
    "export": export,
    "doctor": doctor,
    "report": report,
    "preflight": preflight,
    "plan": plan,
}


def _config_from(argv: list[str], job: str, description: str | None) -> configuration.RunConfig | None:
    """The config named on the command line; None when it was only to be printed."""
    parser = _config_parser(argv, job, description)
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and exit")
    options = parser.parse_intermixed_args(argv)
    config = configuration.load(options.config, options.overrides)
    submission.check_outputs(config)
    if options.print_config:
        print(configuration.to_yaml(config), end="")
        return None
    return config


def _config_parser(argv: list[str], job: str, description: str | None) -> Parser:
    """For a config and its overrides; more options may be added."""
    parser = Parser(job, description=description, epilog=_key_help() if {"-h", "--help"} & set(argv) else None,
                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("config", help="YAML file (configs/ has complete ones)")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="e.g. train.max_steps=50 student.init.layers=15"
    )
    return parser


def _config_of_run(run_dir: Path) -> configuration.RunConfig:
    from ray_kd import run_folder

    path = run_dir / run_folder.CONFIG
    if not path.exists():
        raise ConfigError(f"'{run_dir}' is not a run folder: it has no {run_folder.CONFIG}")
    return configuration.load(path, [f"run.dir={run_dir}"])


def _key_help() -> str:
    """Every key with its type, default and sentence, and every kind of plug-in with its options."""
    lines = ["config keys (YAML, or key=value on the command line):"]
    lines += [_field_help(key, field) for key, field in configuration.describe()]
    for key, group in plugins.GROUPS.items():
        lines.append(f"\nkinds of {key}:")
        for kind, sentence, fields in plugins.describe_kinds(group):
            lines.append(f"  {kind}: {sentence}")
            lines += ["  " + _field_help(field.name, field) for field in fields]
    return "\n".join(lines)


def _field_help(key: str, field: plugins.Field) -> str:
    default = field.default if field.default not in (None, "MISSING") else "required"
    default = default.removeprefix("field(default_factory=lambda: ").removeprefix("field(default_factory=")
    default = default.removesuffix(")") if field.default != default else default
    default = {"dict": "{}", "list": "[]", "None": "null"}.get(default, default)
    return f"  {key}: {field.annotation} = {default}\n      {field.sentence}"


def _start_logging(config: configuration.RunConfig) -> None:
    """Messages to the terminal, everything with tracebacks to run.dir/driver.log."""
    from ray_kd import run_folder

    # Said before transformers or ray are imported, in this process and those it starts.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    folder = run_folder.run_dir(config)
    run_folder.create(folder)
    to_terminal = logging.StreamHandler(sys.stdout)
    to_terminal.setLevel(logging.INFO)
    to_terminal.setFormatter(_Terse())
    to_file = _RunLog(folder / run_folder.LOG)
    to_file.setFormatter(_Full("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    _end_logging()
    logger.addHandler(to_terminal)
    logger.addHandler(to_file)


def _end_logging() -> None:
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        try:
            handler.close()
        except Exception as error:  # the run's own outcome counts
            print(f"warning: the log could not be written: {_one_line(error)}", file=sys.stderr)


class _RunLog(logging.StreamHandler[storage.GrowingFile]):
    """run.dir/driver.log: appended on a disk, put there at the end in an object store."""

    def __init__(self, path: Path) -> None:
        super().__init__(storage.GrowingFile(path))
        self._is_broken = False

    def handleError(self, record: logging.LogRecord) -> None:
        """One line and not a traceback a message: on a full disk the run has something better to say."""
        if not self._is_broken:
            self._is_broken = True
            print(f"warning: the log cannot be written: {_one_line(sys.exc_info()[1] or OSError())}", file=sys.stderr)

    def close(self) -> None:
        super().close()
        self.stream.close()


class _Terse(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        prefix = "warning: " if record.levelno == logging.WARNING else ""
        return redact.redact(prefix + record.getMessage())


class _Full(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact.redact(super().format(record))


def _fail(message: str, exit_code: int) -> int:
    line = redact.redact(" ".join(message.split()))
    logger.debug("exit code %d: %s", exit_code, line)
    print(f"error: {line}", file=sys.stderr)
    return exit_code


def _one_line(error: BaseException) -> str:
    text = redact.redact(" ".join(str(error).split()))  # before it is cut: half a secret is not found
    return f"{type(error).__name__}: {text[:300]}"
