"""Likelihoods of outputs, one file each: loss, gradient, root of the output Hessian, samples, predictives and scores."""

from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.bernoulli import Bernoulli
from laplace.likelihoods.categorical import Categorical
from laplace.likelihoods.gaussian import Gaussian
from laplace.likelihoods.heteroscedastic import HeteroscedasticGaussian
from laplace.likelihoods.named import likelihood_of
from laplace.likelihoods.per_output import GaussianPerOutput
from laplace.likelihoods.poisson import Poisson
from laplace.likelihoods.preference import Preference
from laplace.likelihoods.weighted import WeightedCategorical

__all__ = [
    "BaseLikelihood",
    "Bernoulli",
    "Categorical",
    "Gaussian",
    "GaussianPerOutput",
    "HeteroscedasticGaussian",
    "Poisson",
    "Preference",
    "WeightedCategorical",
    "likelihood_of",
]
