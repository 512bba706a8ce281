"""Using the result: perplexity, verification, export, tables."""
