"""Posteriors over all weights: the algebra of one structure per file."""
