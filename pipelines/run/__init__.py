"""A recipe, and the run of its stages from the first row to the manifest."""
