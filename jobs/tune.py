"""Tune the prior precision of a fitted run, with the run's own settings where no others are given."""

import sys

from laplace_dist.cli import main

if __name__ == "__main__":
    sys.exit(main("tune", checkpoint="runs/fit_kron"))
