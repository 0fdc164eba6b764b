"""Curvature in one structure per file: which sums it takes, and how a batch is added to them."""
