"""Some of the weights: the last layer, a subnetwork and how one is chosen."""
