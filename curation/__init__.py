"""What is done to data: stages, their accounting, and the neighbour joins they stand on."""
