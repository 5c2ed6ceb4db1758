"""Puts the rooms together: recipes, engines, the runner, the report and the command line."""
