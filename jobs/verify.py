"""Check every object of a run and say what is wrong, object by object; see `--help`."""

import sys

from laplace_dist.cli import verify_main

if __name__ == "__main__":
    sys.exit(verify_main(checkpoint="runs/fit_kron"))
