"""Add a window of new data to a fitted run, or drop one, and promote the posterior if it is no worse; see `--help`."""

import sys

from laplace_dist.cli import recalibrate_main

if __name__ == "__main__":
    sys.exit(recalibrate_main(checkpoint="runs/fit_kron"))
