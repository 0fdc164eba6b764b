"""Settings: typed fields, command line, and what goes together."""
