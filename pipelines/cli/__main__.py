"""`python -m pipelines.cli`: the command `curate`."""

from pipelines.cli.app import main

if __name__ == "__main__":
    main()
