"""What pooling a sequence costs: forward and backward of its vectors, beside what torch has for it.

4,096 sequences of up to 50 ids, 16 numbers, a table of 100,000 rows. Everything runs interleaved in one process, on one
thread.

    python benchmarks/sequences.py

Arms: ``ours``, the ``PooledTable`` of ``layers/embedding.py``; ``embedding_bag``, that is ``F.embedding_bag`` with
``padding_idx``; ``masked``, the mean or maximum over all slots with a mask, as most write it. ``filled`` is the part of the
slots that are no padding. Where torch has no sparse gradient (``embedding_bag`` with ``max``) there is no arm. The last line
is one JSON object: how many times as long as ours each takes.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rounds import interleave
from torch import Tensor

from domlora.features.schema import Pooling
from domlora.layers.embedding import Field, PooledTable

BATCH, LENGTH, DIM, ROWS = 4096, 50, 16, 100_000


def sequences(filled: float) -> Tensor:
    """Left-aligned ids; lengths are uniform from none to twice the mean, or all are full."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(1, ROWS, (BATCH, LENGTH), generator=random)
    lengths = torch.randint(0, round(2 * filled * LENGTH) + 1, (BATCH, 1), generator=random)
    return ids if filled == 1 else ids.masked_fill(torch.arange(LENGTH) >= lengths, 0)


def masked(ids: Tensor, weight: Tensor, how: Pooling, sparse: bool) -> Tensor:
    kept = (ids != 0).unsqueeze(2)
    vectors = F.embedding(ids, weight, sparse=sparse)
    if how == "max":
        largest = vectors.masked_fill(~kept, -torch.inf).amax(1)
        return largest.masked_fill(~kept.any(1), 0.0)
    return (vectors * kept).sum(1) / kept.sum(1).clamp(min=1)


def arms_of(how: Pooling, sparse: bool, filled: float) -> dict[str, Callable[[], None]]:
    table = PooledTable([Field(ROWS, pooling=how, max_length=LENGTH)], DIM, 1.0, sparse=sparse)
    ids, weight, upstream = sequences(filled), table.weight, torch.randn(BATCH, DIM)
    forwards: dict[str, Callable[[], Tensor]] = {
        "ours": lambda: table(ids).squeeze(1),
        "masked": lambda: masked(ids, weight, how, sparse),
    }
    if not (sparse and how == "max"):
        forwards["embedding_bag"] = lambda: F.embedding_bag(ids, weight, mode=how, padding_idx=0, sparse=sparse)
    expected = forwards["ours"]()
    for name, forward in forwards.items():
        torch.testing.assert_close(forward(), expected, msg=name)

    def both(forward: Callable[[], Tensor]) -> Callable[[], None]:
        def call() -> None:
            weight.grad = None
            forward().backward(upstream)  # type: ignore[no-untyped-call]

        return call

    return {name: both(forward) for name, forward in forwards.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each case")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    found = {}
    poolings: tuple[Pooling, ...] = ("mean", "max")
    for how, sparse, filled in [(h, s, f) for h in poolings for s in (False, True) for f in (1.0, 0.3)]:
        arms = arms_of(how, sparse, filled)
        timings = interleave(arms, arguments.seconds)
        case = f"{how}, {'sparse' if sparse else 'dense'} gradient, {filled:.0%} filled"
        print(f"\n{case}")
        for name in arms:
            print(f"{name:<16}{1e3 * timings.median(name):8.1f} ms   {timings.ratio(name, 'ours')} of ours")
        found[case] = {name: round(timings.ratio(name, "ours").median, 2) for name in arms}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
