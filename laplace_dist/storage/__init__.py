"""Bytes and arrays under one URL, committed whole or not at all."""
