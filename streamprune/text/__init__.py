"""Texts: documents from files and data sets, tokenizers, and the windows of tokens that calibrate a job."""
