"""Make the report of a run again, from its checkpoint alone; see `--help`."""

import sys

from laplace_dist.cli_readers import report_main

if __name__ == "__main__":
    sys.exit(report_main(checkpoint="runs/fit_kron"))
