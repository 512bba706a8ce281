"""An output in the programs where models are used: transformers, vLLM, lm-evaluation-harness."""
