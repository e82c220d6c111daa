"""The run record: one folder per cell, written so that a kill loses at most the part in flight. No torch."""
