"""What ingest can read: lists of URLs, folders of images, tars, and Parquet with image bytes.

A source is cut into pieces that one task reads; a piece of images lists references (file, offset,
size), so that bytes are read once, where they are needed, and do not travel with the ids.
"""
