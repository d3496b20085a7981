"""The `zigzag` command with all its commands."""

from . import chat, commands, plans, study  # noqa: F401  their commands join the app
from .app import app

__all__ = ["app"]
