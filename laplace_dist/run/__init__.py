"""What lies under one checkpoint URL, and what it means."""
