"""The subnetwork posteriors, under their customary import path."""

from laplace.posterior.subnet import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace

__all__ = ["DiagSubnetLaplace", "FullSubnetLaplace", "SubnetLaplace"]
