"""Where tasks run: worker processes of this machine, or actors of a Ray cluster."""
