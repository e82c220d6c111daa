"""Rollouts that somebody else's framework wrote, checked and graded. README.md has the columns. No torch."""
