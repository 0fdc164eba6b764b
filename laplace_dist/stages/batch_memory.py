"""What a batch's forward pass keeps in a worker's memory for the backward pass, of one example and two: a lower bound."""

from __future__ import annotations

from laplace.capture.saved import saved_bytes
from laplace_dist.config.settings import Config
from laplace_dist.data import loader
from laplace_dist.data.collate import Collate
from laplace_dist.data.device import to_device
from laplace_dist.stages.resolving import Resolved


def batch_bytes(config: Config, resolved: Resolved, device_type: str) -> int:
    """Return what a worker's memory holds at least of a batch while its curvature is computed.

    It is 0 where that is not known before a trial: on a GPU, which has its own memory; of a last layer, whose features are
    kept alone; in bf16; of other packages; and where some parameter has no layer, since large batches are then cut.
    """
    spec, length = resolved.la.sums_spec(), len(resolved.train)
    unknown = device_type != "cpu" or config.subset_of_weights == "last_layer" or config.precision == "bf16"
    if unknown or config.backend != "native" or any(block.layer is None for block in spec.blocks) or length < 2:
        return 0
    collate, device = Collate.of(config), next(resolved.model.parameters()).device
    one, two = (
        saved_bytes(resolved.model, to_device(loader.read_batch(resolved.train, 0, count, collate)[0], device))
        for count in (1, 2)
    )
    return max(0, two - one) * min(config.batch_size, length)  # what does not grow with the batch is in neither
