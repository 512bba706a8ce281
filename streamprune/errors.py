"""What can go wrong, as one tree.

    StreampruneError              exit code 1
    ├── SettingsError             a setting that makes no sense, alone or for this model        (2)
    ├── CheckpointError           the source or an output folder cannot be read as a checkpoint (3)
    │   └── UnsupportedModelError a model that cannot go through; the message says why
    ├── CalibrationError          the text is missing, too short, or not text                   (4)
    ├── OutputError               the output folder cannot be used: foreign files, in use, full (5)
    │   └── JobMismatchError      it holds another job; the message names what differs
    ├── NumericsError             NaN or infinite weights, activations or scores                (6)
    ├── KernelFault               a written layer computes something else than its source       (7)
    ├── BlockErrorExceeded        a block is above --max-block-error and the policy is to stop  (8)
    └── Interrupted               stopped by a signal at a safe point; the same command resumes (85)

Every message is one line that says what is wrong, where, and what to do about it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODES = {  # of the command line, as --help shows them
    "0": "done, or done before",
    "1": "fault found by verify, no memory, a lost result, an unexpected error",
    "2": "settings or usage",
    "3": "checkpoint that cannot be read, or architecture not supported",
    "4": "text that is missing, too short or not text",
    "5": "output folder: in use, foreign files, another job's, no space",
    "6": "NaN or infinity in weights, activations, scores or losses",
    "7": "kernel fault: a written layer does not compute what it must",
    "8": "block error above the budget, with --on-excess stop",
    "85": "interrupted at a safe point; the same compress command continues",
    "130": "ended by Ctrl-C (128 + N: by signal N); no temporary files stay",
}


class StreampruneError(Exception):
    """Base of all errors that streamprune raises on purpose; the command line exits with `exit_code`."""

    exit_code = 1


class SettingsError(StreampruneError):
    """A setting that makes no sense, alone or for this model."""

    exit_code = 2


class CheckpointError(StreampruneError):
    """A folder that cannot be read as a checkpoint."""

    exit_code = 3


class UnsupportedModelError(CheckpointError):
    """A model that cannot go through; the message says why."""


class CalibrationError(StreampruneError):
    """A text that is missing, too short, or not text."""

    exit_code = 4


class OutputError(StreampruneError):
    """An output folder that cannot be used."""

    exit_code = 5


class JobMismatchError(OutputError):
    """The output folder holds a job with other settings, source or calibration."""


class NumericsError(StreampruneError):
    """NaN or infinite numbers where the method needs finite ones."""

    exit_code = 6


class KernelFault(StreampruneError):
    """A written layer does not compute what its masked source weight does."""

    exit_code = 7


class BlockErrorExceeded(StreampruneError):
    """A block's error is above the budget and the policy is to stop."""

    exit_code = 8


class Interrupted(StreampruneError):
    """Stopped by a signal at a safe point; the same command goes on from there."""

    exit_code = 85


@contextmanager
def numerics_named(layer: str) -> Iterator[None]:
    """Add the layer's name to a NumericsError raised inside."""
    try:
        yield
    except NumericsError as error:
        raise NumericsError(f"{layer}: {error}") from error
