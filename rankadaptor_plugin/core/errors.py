"""Every error that is raised on purpose.

The command line shows their message as one line, without a traceback, and ends with `exit_code`:
2 where the run file or the command is wrong, 1 where the work itself failed. A message says what
is wrong, the value, what is allowed and what to do.
"""

from __future__ import annotations

import signal


class RankAdaptorError(Exception):
    """Base class of all errors meant for the user."""

    exit_code = 1


class ConfigError(RankAdaptorError, ValueError):
    """The run file or a command-line value is wrong."""

    exit_code = 2


class UnknownNameError(ConfigError, LookupError):
    """A name is not registered; the message suggests the nearest one and lists them all."""


class RankSpaceError(ConfigError):
    """A rank, a layer count or a parameter budget lies outside the rank space."""


class UnsupportedModelError(RankAdaptorError):
    """The model is not a causal language model of a supported family."""


class CorpusError(RankAdaptorError):
    """The recovery corpus is missing, empty or not in a form that we read."""


class ArtifactError(RankAdaptorError):
    """A run folder is unwritable, in use, torn, or was made from different inputs."""


class OracleError(RankAdaptorError):
    """A task or metric is absent, or a score is not a number."""


class RecoveryError(RankAdaptorError):
    """A fine-tune diverged."""


class PluginError(RankAdaptorError):
    """A plugin cannot be loaded or misbehaves; the message names it."""


class Interrupted(KeyboardInterrupt):
    """A signal ended the program.

    A class of its own, as CPython ends by SIGINT whatever its exit code if a plain
    ``KeyboardInterrupt`` has ever passed through C code that runs Python, such as an import of
    torch.

    Args:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.signal = signal.Signals(number)


def signal_of(interrupt: KeyboardInterrupt) -> signal.Signals:
    """Returns the signal behind an interrupt, that of Ctrl-C unless it says another."""
    return interrupt.signal if isinstance(interrupt, Interrupted) else signal.SIGINT
