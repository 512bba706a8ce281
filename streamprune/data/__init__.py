"""The calibration text that ships with the package: see README.md beside it."""
