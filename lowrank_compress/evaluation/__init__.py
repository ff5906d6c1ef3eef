"""Measures of a checkpoint: perplexity, accuracy, size, lm-eval tasks."""
