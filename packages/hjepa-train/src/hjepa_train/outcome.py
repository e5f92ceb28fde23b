"""How a run ends, and the exit code that says it to a scheduler."""

from __future__ import annotations

from enum import StrEnum

EXIT_DONE = 0
EXIT_ERROR = 1
EXIT_WRONG_INPUT = 2
EXIT_UNSTABLE = 3
"""Diverged or collapsed: the same command would do it again, so look before starting it."""
EXIT_PREEMPTED = 75
"""sysexits.h calls 75 EX_TEMPFAIL: a temporary failure, try again. The same command resumes the run."""


class Outcome(StrEnum):
    """The end of `Trainer.fit`: all steps done, or stopped early with everything saved."""

    DONE = "done"
    PREEMPTED = "preempted"

    @property
    def exit_code(self) -> int:
        """0 when done, 75 when the same command should be started again.

        >>> Outcome.PREEMPTED.exit_code
        75
        """
        return EXIT_DONE if self is Outcome.DONE else EXIT_PREEMPTED
