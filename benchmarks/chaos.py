"""A soak: one fit on S3 over several nodes, with a random fault every few seconds until the time is up.

    python benchmarks/chaos.py                      # 10 minutes, 600 segments, 3 nodes, with an undisturbed run before

The faults: a worker is killed; a node is lost without a word and another joins; a node falls silent, with all connections
open, and comes back when it was replaced; the driver is killed and the same command given again; the S3 server is killed and
comes back after some seconds. The run's result is compared with that of a run to
which nothing happened, and every object with its checksum. Needs the test extra, which brings the S3 server.
"""

from __future__ import annotations

import argparse
import os
import secrets
import sys
import tempfile
from pathlib import Path

from soak import Soak

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent


def ray_environment() -> dict[str, str]:
    """Return an environment in which Ray asks for a token of its own, and jobs find this module."""
    path = os.pathsep.join([str(ROOT), str(HERE)])
    added = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return {**kept, **added, "PYTHONPATH": path}


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--segments", type=int, default=600)
    parser.add_argument("--seconds", type=float, default=2.0, help="that a worker takes to read a segment")
    parser.add_argument("--nodes", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=float, nargs=2, default=(5.0, 15.0), help="seconds between two faults")
    chosen = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "dist")]
    from node_cluster import NodeCluster
    from s3server import S3Server

    environment = ray_environment()
    with tempfile.TemporaryDirectory() as name, NodeCluster(chosen.nodes, environment) as nodes:
        folder = Path(name)
        server = S3Server(folder).start()
        try:
            options = {"segments": chosen.segments, "seconds": chosen.seconds, "workers": chosen.nodes}
            soak = Soak(server, nodes, folder, environment, seed=chosen.seed, every=tuple(chosen.every), **options)
            wanted = soak.undisturbed()
            print(f"undisturbed: {soak.report.undisturbed_seconds:.0f} s", flush=True)
            soak.compare(wanted, soak.run(chosen.minutes))
        finally:
            server.stop()
    print("\n".join(soak.report.lines()))
    sys.exit(1 if soak.report.problems or soak.report.failures else 0)


if __name__ == "__main__":
    main()
