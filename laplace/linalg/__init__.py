"""Algebra of matrices in one form each, and sums that lose no small row; knows nothing of models."""
