"""`python -m pipelines.cli`: the command `curate`."""

from pipelines.cli.app import main

main()
