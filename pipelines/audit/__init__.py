"""What a finished run says of its rows: tables, figures, verification and erasure."""
