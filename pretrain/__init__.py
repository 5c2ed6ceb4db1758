"""DINOv2 pretraining and what measures it, on packed shards."""
