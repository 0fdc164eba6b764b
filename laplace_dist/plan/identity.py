"""What tells that a data set is the one of the plan: its length and digests of sampled examples, each read twice."""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from laplace.drift.duplicates import common
from laplace_dist.data.collate import Collate
from laplace_dist.data.loader import DEFAULT, read_example
from laplace_dist.data.rows import Rows
from laplace_dist.errors import ExampleError, SettingsError, listed
from laplace_dist.plan.digests import feed
from laplace_dist.plan.sketch import SURE

SAMPLE = 64
SLOW_SECONDS = 3.0  # of reading examples, after which that is said
_SHOWN = 16  # hexadecimal digits of the digest of one example, kept to say which one differs


def sampled(length: int) -> list[int]:
    """Return the indices of up to 64 evenly spaced examples, first and last included.

    Data in chunks choose up to 64 from few chunks instead, since each is read whole.
    """
    count = min(length, SAMPLE)
    return sorted({i * (length - 1) // max(count - 1, 1) for i in range(count)})


def _said_if_slow(chosen: Sequence[int], split: str) -> Iterator[int]:
    """Yield the examples of a fingerprint; where reading them takes long, say what is under way, and how long it will take."""
    begun, said = time.monotonic(), False
    for number, index in enumerate(chosen):
        seconds = time.monotonic() - begun
        if not said and seconds > SLOW_SECONDS:
            said = True
            left = seconds / number * (len(chosen) - number)
            logging.getLogger("laplace_dist").info(
                f"data: reading {len(chosen)} examples of split {split!r}, each twice, by which the data are known again; "
                f"about {left:.0f} s more"
            )
        yield index


def fingerprint(dataset: Any, split: str = "train", collate: Collate = DEFAULT) -> dict[str, Any]:
    """Return what a split is told by.

    Args:
        dataset: Map-style.
        split: Its name, for messages.
        collate: What makes a batch of an example that holds something else than plain values, which stands for it then.

    Returns:
        `length`; `sha256` over the length, the files and the sampled examples; under `examples` the beginning of each sampled
        example's own digest by its index, so that a difference can be placed; and, of data in files, under `files` a digest of
        their names, sizes and footers.

    Raises:
        SettingsError: An example differs from one reading to the next, or holds something other than tensors, arrays,
            numbers, strings and containers of these, also when it is collated.
        ExampleError: An example cannot be read.
    """
    length = len(dataset)
    files = _files(dataset)
    digest, examples = hashlib.sha256(f"{length}{files.get('files', '')}".encode()), {}
    chosen = list(dataset.sampled() if isinstance(dataset, Rows) else sampled(length))
    for index in _said_if_slow(chosen, split):
        own = _example_digest(dataset, index, collate)
        if _example_digest(dataset, index, collate) != own:
            raise SettingsError(
                f"--data: example {index} of split {split!r} differs between two readings; switch random augmentation off, "
                "since a run that is resumed must meet the same examples"
            )
        digest.update(own)
        examples[str(index)] = own.hex()[:_SHOWN]
    return {"length": length, "sha256": digest.hexdigest(), "examples": examples, **files}


def check_data(dataset: Any, wanted: Mapping[str, Any], split: str, where: str, collate: Collate = DEFAULT) -> None:
    """Refuse a split that is not the one that the driver saw.

    Args:
        dataset: The split as this process has it.
        wanted: Its fingerprint as the driver has it.
        split: Its name.
        where: This process, in a person's words, such as `node 10.0.0.3`.
        collate: As of `fingerprint`.

    Raises:
        SettingsError: Naming the split and what differs.
    """
    if len(dataset) != wanted["length"]:
        differs = f"{len(dataset)} examples, the driver's has {wanted['length']}"
    elif not wanted.get("examples"):  # of a plan of 0.1
        differs = (
            ""
            if fingerprint(dataset, split, collate)["sha256"] == wanted["sha256"]
            else "other contents than the driver's"
        )
    else:
        different = different_examples(
            wanted, {"examples": _readable(dataset, wanted["examples"], collate), **_files(dataset)}
        )
        differs = different and f"other contents than the driver's: {different}"
    if not differs:
        return
    raise SettingsError(
        f"--data: the split {split!r} on {where} has {differs}. Every node needs the same data in the same order: no random "
        "split without a seed, no stale or partial copy. Nothing of it was added."
    )


def different_examples(one: Mapping[str, Any], two: Mapping[str, Any]) -> str:
    """Name the sampled examples in which two fingerprints of one length differ, or else the files; empty where none do."""
    first, second = one.get("examples", {}), two.get("examples", {})
    which = sorted(int(index) for index in first.keys() & second.keys() if first[index] != second[index])
    if which:
        return f"{len(which)} of {len(first)} sampled examples differ ({listed([str(index) for index in which])})"
    files = one.get("files"), two.get("files")
    return "" if files[0] == files[1] else "the files have other names, sizes or footers"


def shared_examples(one: Mapping[str, Any], other: Mapping[str, Any], allowed: float) -> str:
    """Say which examples two data sets have in common, as far as their fingerprints tell; empty where they tell of none.

    Args:
        one: Fingerprint of the one.
        other: Of the other.
        allowed: The share of the sampled examples that may be in both beyond what repeats within the samples explains.
    """
    if one["sha256"] == other["sha256"]:
        return "all of them are the same" if allowed < 1 else ""
    first, second = (Counter(data.get("examples", {}).values()) for data in (one, other))
    values = first.keys() | second.keys()
    times = [np.array([sample[value] for value in values], np.int64) for sample in (first, second)]
    sizes = first.total(), second.total()
    if not min(sizes):
        return ""
    found = common(*times, sizes)
    over = found.p_value <= SURE and found.excess > allowed * min(sizes)
    return f"{found.values} of {min(sizes)} sampled ones" if over else ""


def _readable(dataset: Any, indices: Iterable[str], collate: Collate) -> dict[str, str]:
    """Return the digests of sampled examples; one that cannot be read is left to its segment, which fails naming it."""
    found = {}
    for index in sorted(indices, key=int):  # in order, since data in chunks keep the last one
        try:
            found[index] = _example_digest(dataset, int(index), collate).hex()[:_SHOWN]
        except ExampleError:
            continue
    return found


def _files(dataset: Any) -> dict[str, str]:
    return {"files": dataset.identity} if isinstance(dataset, Rows) else {}


def _example_digest(dataset: Any, index: int, collate: Collate) -> bytes:
    """Return the digest of an example, or of a batch of it alone where it holds what only the user's collate knows."""
    example = read_example(dataset, index)
    try:
        return _digest_of(example)
    except TypeError as error:
        if collate.path is None:
            raise SettingsError(
                f"--data: example {index} holds {error}; expected tensors, arrays or numbers, or a --collate that makes these"
            ) from error
    try:
        return _digest_of(collate.batch([example], index))
    except TypeError as error:
        raise SettingsError(
            f"--collate: the batch of example {index} holds {error}; expected tensors, arrays, numbers or strings"
        ) from error


def _digest_of(value: Any) -> bytes:
    digest = hashlib.sha256()
    feed(digest, value)
    return digest.digest()
