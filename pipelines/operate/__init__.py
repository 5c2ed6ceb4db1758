"""What one needs beside a run: the terminal, events, plans, forecasts and disk."""
