"""The losses, one a file, and the ways to make the teacher's targets.

Logits are products of features and prototypes (`pretrain.heads.Projected`). At 131,072 prototypes
they are too large to hold, so targets and cross-entropies work on blocks of rows.
"""
