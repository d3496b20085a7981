"""Why an engine does not take, or does not finish, a request."""


class RequestTooLarge(ValueError):
    """The request could never run. fits: the largest prompt + max_tokens that could, in tokens."""

    def __init__(self, message: str, fits: int):
        super().__init__(message)
        self.fits = fits


class QueueFull(RuntimeError):
    """As many requests wait as may: try again when some have ended."""


class EngineStopped(RuntimeError):
    """The engine is closed, or was ended by the error that is the cause of this one."""
