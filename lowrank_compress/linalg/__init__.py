"""Weighted low-rank factorization of one matrix, in float64: torch and SciPy only, knows no model."""
