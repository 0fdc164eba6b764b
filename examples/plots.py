"""What the examples that draw share."""

from __future__ import annotations


def pyplot():
    """Matplotlib that draws into files."""
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(f'The plot needs matplotlib: pip install -e ".[examples]" ({error})') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt
