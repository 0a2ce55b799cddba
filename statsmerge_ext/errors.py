"""The errors this package raises on purpose.

All of them are a ``ValueError``, so that callers who do not know the package can still catch them; the command line
turns each into one line and exit status 2.
"""

from __future__ import annotations


class StatsMergeError(ValueError):
    """Base of every error raised on purpose."""


class CheckpointError(StatsMergeError):
    """A checkpoint cannot be read or written, or does not fit its base."""


class RecipeError(StatsMergeError):
    """A recipe is malformed: unknown key, wrong type, value out of range."""


class CalibrationError(StatsMergeError):
    """Calibration data is missing, empty, exhausted or carries labels."""


class MethodError(StatsMergeError):
    """A merging method is unknown or was given hyperparameters it does not take."""


class ProcessError(StatsMergeError):
    """One of several processes that do a merge together has ended, or cannot be reached."""


class DataError(StatsMergeError):
    """Data of a task suite is missing or damaged."""
