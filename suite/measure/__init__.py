"""Numbers from arrays: the mismatch metrics, statistics, what to watch in training. No torch."""
