"""The stages of a job: each lists its tasks, does one task, and commits it."""
