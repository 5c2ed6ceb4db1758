"""Pages in a browser: the report, the server and the calibration lab."""
