"""What is done to data: stages, their accounting, and the neighbor joins they stand on."""
