"""`curate serve`: the report live, for sets too large for one page."""
