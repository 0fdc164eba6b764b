"""Train weights and hyperparameters together by empirical Bayes, on the bundled demo if no model is given; see `--help`."""

import sys

from laplace_dist.cli_training import marglik_main

if __name__ == "__main__":
    sys.exit(marglik_main(hessian_structure="kron", checkpoint="runs/marglik_train"))
