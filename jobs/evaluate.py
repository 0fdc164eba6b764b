"""Evaluate a fitted run, MAP and Laplace side by side, with the run's own settings where no others are given."""

import sys

from laplace_dist.cli import main

if __name__ == "__main__":
    sys.exit(main("evaluate", checkpoint="runs/fit_kron"))
