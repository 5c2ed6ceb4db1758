"""Fetching from a hostile web: checked addresses, caps, deadlines, opt-outs, politeness."""
