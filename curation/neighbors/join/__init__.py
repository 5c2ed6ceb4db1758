"""An index in, all pairs above a threshold out."""
