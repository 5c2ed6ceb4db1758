"""Training methods: what is computed from a batch in one step."""
