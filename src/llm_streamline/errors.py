"""The few exceptions a user can meet. Each message is one sentence: what was given, what is allowed, what to do."""


def reason(error: BaseException) -> str:
    """The first sentence of what another library says, to be put in brackets into one of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__


class StreamlineError(Exception):
    """Anything this package reports to its user in one sentence; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(StreamlineError):
    """Something given cannot be used as it is; nothing was written."""

    exit_code = 2


class VerificationError(StreamlineError):
    """The assembled model does not compute what the source with the window replaced computes; it is not published."""


class Stopped(StreamlineError):
    """The process was asked to end, by Ctrl-C or SIGTERM; what was finished until then lies on the disk."""

    def __init__(self, signal: int, outlook: str) -> None:
        super().__init__(f"stopped; {outlook}.")
        self.exit_code = 128 + signal
