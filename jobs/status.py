"""Say how far a run is, from anywhere that reaches its checkpoint; see `--help`."""

import sys

from laplace_dist.cli_readers import status_main

if __name__ == "__main__":
    sys.exit(status_main(checkpoint="runs/fit_kron"))
