"""One model of every family of torchvision and timm, against gradients of each output of each example.

    python benchmarks/families.py                     # all families: error, seconds, parameters
    python benchmarks/families.py --family swiftformer levit
    python benchmarks/families.py --largest 10        # leaves out models of more than 10 million parameters

Of timm the smallest model of a family is taken, with three outputs and small images where it takes them; where that is too
large, one with fewer blocks and narrower ones, if its constructor takes such. Ends with status 1 if a model is wrong, or fails
in other words than the library's.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.core.families import OUTPUTS, TOLERANCE, TORCHVISION, compare, prepared, small  # noqa: E402

SIZES = (32, 64, 128, 224, 256)
_WIDTHS = (
    {"embed_dim": 48, "num_heads": 3}, {"embed_dim": (16, 32, 48, 64)}, {"embed_dims": (16, 32, 48, 64)},
    {"embed_dim": (32, 48, 64)}, {"embed_dims": (32, 48, 64)}, {"embed_dim": 32, "num_heads": (1, 2, 4, 8)}, {"embed_dim": 32},
    {"embed_dims": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4)}, {"embed_dims": (16, 32, 64), "num_heads": (1, 2, 4)},
    {"dims": (16, 32, 48, 64)}, {"dim": 48}, {"base_width": 16}, {},
)  # fmt: skip
_DEPTHS = (
    {"depth": 2}, {"depths": (1, 1, 1, 1)}, {"depths": (1, 1, 1)}, {"layers": (1, 1, 1, 1)}, {"num_blocks": 2},
    {"stages": (1, 1, 1, 1)},
)  # fmt: skip


def smallest(family: str, largest: int) -> str | None:
    """The model of a family of timm with the fewest parameters, without its weights; None if all are too large."""
    sizes = {}
    for name in timm.list_models(module=family):
        if "in21k" in name or name.startswith("test_"):
            continue
        try:
            with torch.device("meta"):
                sizes[name] = sum(p.numel() for p in timm.create_model(name, num_classes=OUTPUTS).parameters())
        except (RuntimeError, NotImplementedError, ValueError):  # some compute with their weights as they are made
            sizes.setdefault(name, 10**9)
    name = min(sizes, key=sizes.get, default=None)
    return name if name is not None and sizes[name] <= largest else None


def reduced(family: str, largest: int) -> tuple[str, dict] | None:
    """A model of a family of timm, and options with which it has fewer parameters; None if there are no such options."""
    names = [name for name in timm.list_models(module=family) if "in21k" not in name and not name.startswith("test_")]
    for name in sorted(names, key=len)[:2]:
        for options in ({**depth, **width} for width in _WIDTHS for depth in _DEPTHS):
            try:
                with torch.device("meta"):
                    model = timm.create_model(name, num_classes=OUTPUTS, **options).eval()
                    model(torch.empty(2, *model.pretrained_cfg["input_size"]))  # widths may not fit one another
            except Exception:  # noqa: BLE001 - each constructor has its own way to refuse an option
                continue
            if sum(p.numel() for p in model.parameters()) <= largest:
                return name, options
    return None


def of_timm(name: str, **changes: Any) -> tuple[nn.Module, torch.Tensor]:
    """A model of timm and two images of the smallest size that it takes."""
    failures = []
    for size in SIZES:
        for options in ({"img_size": size}, {}):
            try:
                model = prepared(timm.create_model(name, num_classes=OUTPUTS, **options, **changes))
                x = torch.randn(2, 3, size, size)
                with torch.no_grad():
                    model(x)
                return model, x
            except Exception as error:  # noqa: BLE001 - each family has its own way to refuse a size
                failures.append(f"{size}: {error}")
    raise RuntimeError(f"no size of {SIZES} is taken: {failures[-1]}")


def examine(family: str, make) -> str:
    """Compare one model; print a line and return ``right``, ``refused``, ``wrong`` or ``failed``."""
    torch.manual_seed(0)
    begin = time.process_time()
    try:
        model, x = make()
        count = sum(p.numel() for p in model.parameters())
        error = compare(model, x)
        single = any(
            "Fp32" in type(module).__name__ for module in model.modules()
        )  # rounds to float32 in any precision
        tolerance = 1e-6 if single else TOLERANCE
        kind, what = ("right" if error < tolerance else "wrong"), f"error {error:.1e}, {count:,} parameters"
    except (ValueError, TypeError) as refusal:
        kind, what = "refused", str(refusal)
    except Exception as error:  # noqa: BLE001 - whatever it is, the line says so
        kind, what = "failed", f"{type(error).__name__}: {error}"
    print(f"{family:<32} {kind:<8} {time.process_time() - begin:6.1f} CPU s  {what[:260]}", flush=True)
    return kind


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", nargs="*", default=[])
    parser.add_argument("--largest", type=float, default=12, help="millions of parameters")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    kinds = Counter()
    for family in TORCHVISION:
        if not arguments.family or family in arguments.family:
            kinds[examine(f"torchvision {family}", lambda f=family: small(f))] += 1
    for family in timm.list_modules():
        if not arguments.family or family in arguments.family:
            largest = int(arguments.largest * 1e6)
            name = smallest(family, largest)
            found = (name, {}) if name is not None else reduced(family, largest)
            if found is None:
                print(f"timm {family}: no model of at most {arguments.largest:g} million parameters", flush=True)
                kinds["left out"] += 1
            else:
                name, options = found
                what = f"timm {name}" + (f", {', '.join(options)} reduced" if options else "")
                kinds[examine(what, lambda n=name, o=options: of_timm(n, **o))] += 1
    print(dict(kinds))
    return 1 if kinds["wrong"] or kinds["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
