"""Batches of a data loader, wherever they come from."""
