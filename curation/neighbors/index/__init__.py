"""A sample of rows in, an inverted file out: quantizer, lists, and the probes that recall asks."""
