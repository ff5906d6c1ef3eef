"""The errors a user can meet: each says what was expected, what was got and what to do."""

from __future__ import annotations


def first_line(problem: BaseException) -> str:
    """What an exception says, in one line; its type, where it says nothing."""
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]


class LrcError(Exception):
    """A problem the user can act on; the command line prints it in one paragraph and exits with code 2."""


class InputError(LrcError):
    """An option, a name or a number that cannot be used."""


class CheckpointError(LrcError):
    """A checkpoint that cannot be read or is not what it claims to be."""


class UnsupportedError(LrcError):
    """A model, module or combination that this toolkit refuses by name."""


class CalibrationError(LrcError):
    """Calibration or evaluation data that is missing, empty, too short or in the wrong place."""


class ArtifactError(LrcError):
    """A stage directory that is incomplete, altered, or made by another recipe."""


class LockedError(LrcError):
    """A run directory in which another process works."""


class NumericsError(LrcError):
    """Numbers that are not finite, or a decomposition that failed."""
