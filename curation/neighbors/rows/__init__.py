"""Vectors in, row files out: rows read, sorted by list, and written by restartable tasks."""
