"""Where shards and their pieces lie, by closed form: equal to torch.chunk's own cuts, and no larger on a larger machine."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zcompile.kernels.geometry import Geometry
from zcompile.layout import Layout
from zcompile.transfers import pack_one, shard_piece, unpack

FRONTIER = (2, 4, 64, 147)


def chunks(x: Tensor, sizes: tuple[int, ...]) -> list[Tensor]:
    """The shards of x in index order as torch cuts them; `torch.chunk` leaves empty ones out, so they are put back."""
    found = [x]
    for size in sizes:
        found = [each for part in found for each in [*part.chunk(size), *[part[:0]] * size][:size]]
    return found


def layouts() -> Iterator[Layout]:
    rng = random.Random(0)
    yield from (
        Layout((0, 3), (2, 2), 2),
        Layout((), (2, 20), 0),
        Layout((41, 1), (20, 2), 2),
        Layout((40, 3), (20, 3), 1),
    )
    for _ in range(100):
        sizes = tuple(rng.choice([1, 2, 3, 20]) for _ in range(rng.randint(1, 3)))
        shape = (rng.randint(0, 200), *[rng.randint(1, 5)][: rng.randint(0, 1)])
        yield Layout(shape, sizes, rng.randint(0, len(sizes)), rng.choice([1, 4]))


def test_cuts_packs_and_unpacks_are_those_of_nested_chunks() -> None:
    seen = 0
    for layout in layouts():
        x = torch.arange(layout.numel) + 1
        shards = [part.reshape(-1) for part in chunks(x.view(layout.rows, layout.row), layout.cuts)]
        whole = torch.stack([torch.cat([part, part.new_zeros(layout.shard - len(part))]) for part in shards])
        assert torch.equal(pack_one(x, layout), whole.view(-1)), layout
        assert torch.equal(unpack(whole, layout), x.view(layout.shape)), layout
        for parts in (1, layout.replicas):
            piece = shard_piece(layout, parts)
            assert bool(piece.spans) != layout.dense
            geometry = Geometry(layout.shards * parts, (piece,), False)
            assert Geometry.parse(geometry.text) == geometry
            for row in range(geometry.rows) if piece.spans else ():
                start, valid = piece.span(row)
                want = whole.view(geometry.rows, piece.n)[row]
                assert torch.equal(x[start : start + valid], want[want > 0]), (layout, row)
        seen += any(shards > 1 for *_, shards in layout.segments)
    assert seen >= 5, "runs of equal shards"


def test_rows_of_a_cut_end() -> None:
    spans = shard_piece(Layout((41, 3), (20, 2), 1), 2).spans
    assert len(spans) == 40 and list(spans)[-1] == spans[39] and spans[38:] == (spans[38], spans[39])
    with pytest.raises(IndexError, match="stretch 40 of 40"):
        spans[40]


@pytest.mark.parametrize("rows", [6144, 24576, 50432])
def test_texts_and_graphs_do_not_grow_with_the_replicas(rows: int) -> None:
    def size(groups: int) -> tuple[int, int]:
        layout = Layout((rows, 6144), (*FRONTIER[:3], groups), 3, 256)
        return len(shard_piece(layout, layout.replicas).spans), len(layout.segments)

    text = [
        len(Geometry(512 * n, (shard_piece(Layout((rows, 6144), (*FRONTIER[:3], n), 3, 256), n),), False).text)
        for n in (101, 147)
    ]
    assert text[0] == text[1] < 80, "the numbers have as many digits"
    assert size(101)[1] == size(147)[1] <= 16
    assert size(147)[0] == 75264
