"""The few exceptions a user can meet. Each message is one sentence: what was given, what is allowed, what to do."""

from __future__ import annotations


def reason(error: BaseException) -> str:
    """The first sentence of what another library says, to be put in brackets into one of ours."""
    lines = [line.strip() for line in str(error).strip().splitlines()]
    lines = lines[1:] if len(lines) > 1 and lines[0].endswith(":") else lines  # which only says that something follows
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


class StreamlineError(Exception):
    """Anything this package reports to its user in one sentence; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(StreamlineError):
    """Something given cannot be used as it is; nothing was written."""

    exit_code = 2


class VerificationError(StreamlineError):
    """The assembled model does not compute what the source with the window replaced computes; it is not published."""


class WorkerLost(StreamlineError):
    """Another process of the same run is gone, or the way to it; what the first had written lies on the disk."""

    exit_code = 4

    def __init__(self, timeout: float, cause: str, where: str = "") -> None:
        super().__init__(
            f"a worker was lost or did not answer within {timeout:g} s ({cause}); the same command continues{where}."
        )
        self.timeout, self.cause = timeout, cause

    def at(self, where: str) -> WorkerLost:
        """The same, with the place from which the run will go on."""
        return WorkerLost(self.timeout, self.cause, f" {where}")


class Dismissed(StreamlineError):
    """The end of a process that is not the first, which says what there is to say; code 0 if all is well."""

    def __init__(self, code: int = 0) -> None:
        super().__init__("the first process of this run goes on alone, or has said why it cannot.")
        self.exit_code = code


class Stopped(StreamlineError):
    """The process was asked to end, by Ctrl-C or SIGTERM; what was finished until then lies on the disk."""

    def __init__(self, signal: int, outlook: str) -> None:
        super().__init__(f"stopped; {outlook}.")
        self.exit_code = 128 + signal


class Interruption(BaseException):
    """Carries `stopped` out of whatever was going on: no `except Exception` may take it for a failure of its own."""

    def __init__(self, stopped: Stopped) -> None:
        super().__init__(str(stopped))
        self.stopped = stopped
