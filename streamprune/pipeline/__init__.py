"""The job: plan, calibration text, journal, and the two-pass loop over the blocks."""
