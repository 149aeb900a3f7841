"""Errors with a documented exit code: what a job prints is one line, what it returns is the code.

0 done, 64 the user's input or configuration, 65 no usable records, too many bad ones, or a damaged run folder (doctor),
70 a bug of ours, 75 infrastructure or an interruption: the same command continues the run.
Too many bad steps in a row (`train.max_bad_steps`) are 64: the same command would meet the same numbers, and what
changes them is a setting or the data.
"""

EXIT_DONE = 0
EXIT_BUG = 70


def cause_of(error: BaseException) -> "RayKDError | None":
    """What our own code raised, where a library made an error of its own of it: a signal in the middle of an import."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, RayKDError):
        cause = cause.__cause__
    return cause


class RayKDError(Exception):
    """Base of the errors whose message is written for the user: one line, the value seen, the values allowed."""

    exit_code = EXIT_BUG


class ConfigError(RayKDError, ValueError):
    """The user can fix it: a path, a key, a value, an unwritable or foreign run.dir."""

    exit_code = 64


class DataError(RayKDError, ValueError):
    """Nothing usable in the data, or more bad records than `data.max_bad_fraction`."""

    exit_code = 65


class RetryableError(RayKDError, RuntimeError):
    """Infrastructure failed or the run was interrupted; the same command goes on from the last checkpoint."""

    exit_code = 75


class StorageFull(RetryableError):
    """There is no space left for what has to be written: trying again at once would meet the same."""
