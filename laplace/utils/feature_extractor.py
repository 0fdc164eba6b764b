"""The model as features and a last layer, under its customary import path."""

from laplace.capture.feature_extractor import FeatureExtractor, FeatureReduction

__all__ = ["FeatureExtractor", "FeatureReduction"]
