from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from domlora.adapters.accelerator import tiles_of
from domlora.adapters.route import grouped


@st.composite
def counts_of_rows(draw: st.DrawFn) -> list[int]:
    """How many rows each domain of a batch has; no domain at all, one, many, equal ones."""
    most = draw(st.sampled_from([1, 4, 60, 900]))
    return draw(st.lists(st.integers(1, most), max_size=draw(st.sampled_from([1, 5, 200]))))


@settings(deadline=None, max_examples=120, derandomize=True)
@given(
    counts=counts_of_rows(), gap=st.sampled_from([1, 97]), none=st.integers(0, 20), seed=st.none() | st.integers(0, 99)
)
def test_every_row_is_in_one_tile_once(counts: list[int], gap: int, none: int, seed: int | None) -> None:
    domain = torch.cat(
        [
            torch.full((none,), -1),
            (torch.arange(len(counts)) * gap).repeat_interleave(torch.tensor(counts, dtype=torch.int64)),
        ]
    )
    if seed is not None:
        domain = domain[torch.randperm(len(domain), generator=torch.Generator().manual_seed(seed))]
    segments = grouped(domain, len(counts) * gap + 1)
    seen = torch.zeros(len(domain), dtype=torch.int64)
    places = [torch.empty(0, dtype=torch.int64)]
    for tile in tiles_of(segments):
        assert torch.equal(segments.domains[tile.places], tile.names)
        assert (domain[tile.rows.view(len(tile.names), -1)] == tile.names[:, None]).all()
        real = torch.ones(len(tile.rows), dtype=torch.bool)
        if tile.pads is not None:
            assert 0 < 8 * len(tile.pads) <= len(tile.rows)
            real[tile.pads] = False
        seen.index_add_(0, tile.rows, real.long())
        places.append(tile.places)
    assert torch.equal(seen, (domain >= 0).long())  # each row that has a domain once, a row of none never
    assert torch.equal(torch.cat(places).sort().values, torch.arange(len(segments.names)))


def test_domains_with_equally_many_rows_share_a_tile() -> None:
    (tile,) = tiles_of(grouped(torch.arange(4096) // 8, 512))
    assert tile.rows.shape == (4096,)
    assert tile.pads is None
    several = tiles_of(grouped(torch.tensor([0] * 100 + [1] * 4 + [2] * 4), 3))
    assert [tile.names.tolist() for tile in several] == [[0], [1, 2]]
