"""An index and query vectors in, the k nearest rows of each query out."""
