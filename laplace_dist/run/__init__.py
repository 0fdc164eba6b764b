"""What lies under one checkpoint URL, and what it means."""

from laplace import _clash as _clash  # says so where laplace-torch has replaced laplace/__init__.py
