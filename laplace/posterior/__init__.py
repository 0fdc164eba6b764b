"""Posteriors: the algebra of one Hessian structure per file."""
