"""Seed images and a pool in, hits by sample or by cluster out."""
