"""Pairs in, verdicts out: components, the rule that keeps rows of them, and their health."""
