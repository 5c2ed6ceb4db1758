"""`curate stats`, `explain`, `report` and `verify`."""

from curation import storage
from pipelines import console


def write_report(work: str, out: str | None) -> None:
    """`curate report`."""
    from pipelines.report.page import write_page

    console.print_line(write_page(work, out or storage.join(work, "report.html")))
