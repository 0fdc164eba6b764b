"""Who carries out the tasks, and what happens when that goes wrong."""
