"""How much of the time a device is busy while processes read ahead for it, with a wait in place of the device.

    python benchmarks/reading.py [--readers 2]

Images take a reader some milliseconds each, as decoding does; a batch takes the device a share more or less than the readers
take for one. Were reading and computing one after the other, a device as fast as the readers would be busy half of the time;
where nothing is lost between the two, it is busy for all of it, or for as much as slower readers allow.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from laplace_dist.data.read_ahead import ReadAhead

sys.path.insert(0, str(Path(__file__).resolve().parent / "rows"))
from gpu import Photographs  # noqa: E402

BATCH, BATCHES, SIZE = 64, 40, 224
SHARES = (3.0, 2.0, 1.5, 1.0)


def passed(ahead: ReadAhead, start: int, seconds: float) -> float:
    """Seconds for a range of batches, each of which takes the device so long."""
    began = time.perf_counter()
    for _ in ahead.batches(start, start + BATCH * BATCHES):
        time.sleep(seconds)  # the device's time, not a way to wait for something
    return time.perf_counter() - began


def main() -> None:
    """Print one row for each speed of the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readers", type=int, default=2)
    readers = parser.parse_args().readers
    ahead = ReadAhead(Photographs(BATCH * BATCHES, SIZE), BATCH, workers=readers)
    try:
        passed(ahead, 0, 0)  # starts the readers
        read = passed(ahead, 0, 0) / BATCHES
        print(f"{readers} readers take {read:.3f} s for a batch of {BATCH}.")
        print("| device, s for a batch | readers / device | busy | possible |", "| --- | --- | --- | --- |", sep="\n")
        for share in SHARES:
            found = share * read * BATCHES / passed(ahead, 0, share * read)
            print(f"| {share * read:.3f} | {1 / share:.2f} | {found:.2f} | {min(1, share):.2f} |", flush=True)
    finally:
        ahead.close()


if __name__ == "__main__":
    main()
