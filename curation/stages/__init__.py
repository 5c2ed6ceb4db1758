"""One stage a file; the file name is its name in YAML."""
