"""An inverted file as files: partition, join and search of embeddings."""
