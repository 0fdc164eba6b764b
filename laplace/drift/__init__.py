"""Whether data are still what they were: tests that may be repeated for ever, and estimates with intervals."""
