"""Every parameter of the server's own OpenAPI, fuzzed: no 500, no file, no SQL from outside."""
