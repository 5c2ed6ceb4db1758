"""Commands: one module a group of them, each command's options beside its body."""

from pipelines.cli.app import main

__all__ = ["main"]
