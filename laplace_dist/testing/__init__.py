"""Conformance suites to inherit."""
