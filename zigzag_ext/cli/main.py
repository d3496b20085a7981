"""The `zigzag` command with all its commands."""

from . import chat, commands, compare, plans, serve, study, vllm_args  # noqa: F401  their commands join the app
from .app import app

__all__ = ["app"]
