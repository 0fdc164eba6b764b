"""Likelihoods of outputs, one file each: loss, gradient, root of the output Hessian, samples, predictives and scores."""

from laplace.likelihoods.base import BaseLikelihood
from laplace.likelihoods.categorical import Categorical
from laplace.likelihoods.gaussian import Gaussian
from laplace.likelihoods.named import likelihood_of
from laplace.likelihoods.preference import Preference

__all__ = ["BaseLikelihood", "Categorical", "Gaussian", "Preference", "likelihood_of"]
