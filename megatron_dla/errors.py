"""Errors that a user can cause; the command line prints them as one line and exits with code 2."""

import errno

# exit codes: bad input; stopped by a signal after a checkpoint (requeue the job)
BAD_INPUT, STOPPED = 2, 75
WRONG_PATH = {
    errno.ENOENT, errno.EACCES, errno.EPERM, errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP,
}  # fmt: skip


def is_wrong_path(error: BaseException) -> bool:
    """Whether the error is a wrong path or permission, which a retry cannot fix (unlike I/O errors)."""
    return isinstance(error, OSError) and error.filename is not None and error.errno in WRONG_PATH


class UserError(ValueError):
    """Bad input; the message names the key or file, the value and the fix."""


class ConfigError(UserError):
    """A config key is unknown, has a bad value or conflicts with another one."""


class DataError(UserError):
    """A shard, index or tokenizer is missing, damaged or does not fit."""


class CheckpointError(UserError):
    """A checkpoint is missing, incomplete or belongs to another model, tokenizer or layout."""


class FenceError(UserError):
    """A run directory has another writer."""
