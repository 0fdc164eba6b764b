"""The subnetwork posteriors, under their customary import path."""

from laplace.subsets.subnetwork import DiagSubnetLaplace, FullSubnetLaplace, SubnetLaplace

__all__ = ["DiagSubnetLaplace", "FullSubnetLaplace", "SubnetLaplace"]
