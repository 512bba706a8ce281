"""Bytes on disk: reading checkpoints, writing shards, the packed format, hidden states in scratch files."""
