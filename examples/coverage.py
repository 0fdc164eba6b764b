"""What a posterior would cover of a model: networks of the shapes of ResNet-18 and of a vision transformer, part by part.

    python examples/coverage.py

asks ``laplace_dist.check_model`` before anything is fitted. Convolutions and linear layers have Kronecker factors, an
attention's packed projections too; what has none, such as the class token, position embeddings and the affine part of
normalisations, gets a diagonal block. Every parameter has one line that says so, and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor, nn

import laplace_dist
from laplace_dist.stages.model_check import ModelReport


def shapes() -> dict[str, tuple[nn.Module, Tensor]]:
    """Models with random weights, and a few inputs of each."""
    try:
        from torchvision.models import resnet18
        from torchvision.models.vision_transformer import VisionTransformer
    except ImportError as error:
        raise SystemExit(f'This example needs torchvision: pip install -e ".[examples]" ({error})') from error
    torch.manual_seed(0)
    vit = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    nn.init.normal_(vit.heads.head.weight)  # it begins at zero, and an untrained model of zeros has no curvature
    return {
        "ResNet-18": (resnet18(num_classes=10).eval(), torch.randn(2, 3, 32, 32)),
        "vision transformer": (vit.eval(), torch.randn(2, 3, 32, 32)),
    }


def main(models: Mapping[str, tuple[nn.Module, Tensor]] | None = None) -> dict[str, ModelReport]:
    """Print the report of each, after a summary by kind; return the reports."""
    reports = {}
    for name, (model, x) in (models or shapes()).items():
        report = reports[name] = laplace_dist.check_model(model, x)
        sizes = {parameter: p.numel() for parameter, p in model.named_parameters()}
        print(f"{name}: {sum(sizes.values()):,} weights")
        weights: Counter = Counter()
        for parameter, kind, _ in report.coverage:
            weights[kind] += sizes[parameter]
        for kind, count in weights.most_common():
            print(f"  {kind:5} {count / sum(sizes.values()):6.1%}")
        print(report)
    return reports


if __name__ == "__main__":
    main()
