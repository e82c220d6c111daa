"""results/: runs and verdicts as published; publish, bundle, open and verify them. No torch."""
