"""Errors of training; the root of the tree is in `embedder.errors`."""

from embedder.errors import CurateError


class TrainingError(CurateError):
    """A run that cannot go on: no readable images, or losses that are no numbers."""
