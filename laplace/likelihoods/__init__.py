"""Likelihoods of outputs: loss, gradient, root of the output Hessian, samples; scores of predictions."""
