"""From import paths and URLs to batches."""
