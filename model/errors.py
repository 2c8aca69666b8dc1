"""What layerprune says when it refuses: one sentence, with the value given, what is allowed, what to try."""

from __future__ import annotations


class LayerpruneError(Exception):
    """Something that the user can mend. The command line prints it and exits with `exit_code`."""

    exit_code = 1


class UsageError(LayerpruneError):
    """The arguments contradict each other or the model: exit code 2."""

    exit_code = 2


class Refused(LayerpruneError):
    """The input cannot be used, or the result would be wrong: exit code 1."""
