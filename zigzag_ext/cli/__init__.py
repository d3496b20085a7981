"""The `zigzag` command."""
