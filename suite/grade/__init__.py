"""From records to verdicts: launches, contrasts, intervals, controls, and PASS, FAIL or INCONCLUSIVE. No torch."""
