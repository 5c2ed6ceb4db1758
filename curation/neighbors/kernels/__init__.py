"""Arithmetic on arrays; no module here reads or writes a file."""
