"""Fit a Laplace approximation with block-diagonal structure, on the bundled demo if no model is given; see `--help`."""

import sys

from laplace_dist.cli import main

if __name__ == "__main__":
    sys.exit(main("fit", hessian_structure="blockdiag", checkpoint="runs/fit_blockdiag"))
