"""The method: channel statistics, scores, shuffles, selection. Pure functions on tensors; no files, no transformers."""
