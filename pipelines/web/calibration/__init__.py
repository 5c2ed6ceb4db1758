"""The threshold lab: judge samples, see what each threshold would do, before committing to one."""
