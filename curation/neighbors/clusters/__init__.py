"""Vectors in, levels of centroids and the cluster of each row out."""
