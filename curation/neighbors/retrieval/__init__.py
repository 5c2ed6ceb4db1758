"""Seeds and an index of the pool in, hits out: a data set of them, and the best of each image."""
