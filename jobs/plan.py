"""Say what a fit will take, before anything runs: coverage, bytes, requests, memory, time; see `--help`."""

import sys

from laplace_dist.cli import plan_main

if __name__ == "__main__":
    sys.exit(plan_main(checkpoint="runs/fit_kron"))
