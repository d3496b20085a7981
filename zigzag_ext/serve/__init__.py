"""Many requests at once: `Engine`."""

from .engine import Engine
from .errors import EngineStopped, QueueFull, RequestTooLarge
from .request import Completion, Request, Token
from .sampling import Sampling

__all__ = ["Completion", "Engine", "EngineStopped", "QueueFull", "Request", "RequestTooLarge", "Sampling", "Token"]
