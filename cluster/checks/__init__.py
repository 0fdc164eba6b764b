"""The parts of `validate.py`: one file per kind of thing that is checked, each a function that yields problems."""
