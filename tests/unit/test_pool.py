"""Memory that hops land in: used again once nobody holds it, never before, and no more than was in use at one time."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from torch import Tensor

from zcompile.pool import SMALLEST, Pool

N = SMALLEST // 4
"""Elements of fp32 in the smallest block."""


def landed(pool: Pool, elements: int = N, dtype: torch.dtype = torch.float32) -> Tensor:
    out = torch.empty(elements, dtype=dtype)
    pool.land(out)
    return out


def test_a_block_is_used_again_when_its_last_holder_is_gone() -> None:
    pool = Pool()
    x = landed(pool)
    address, part = x.data_ptr(), x.view(2, -1)[1]
    del x
    other = landed(pool)
    assert other.data_ptr() != address, "a view of the first one is still alive"
    del part
    assert landed(pool).data_ptr() == address
    assert pool.made == 2


def test_what_is_lent_is_never_lent_again() -> None:
    pool = Pool()
    kept = [landed(pool).fill_(number) for number in range(8)]
    del kept[2:5]
    kept += [landed(pool).fill_(10 + number) for number in range(6)]
    assert len({x.data_ptr() for x in kept}) == len(kept)
    assert [x.unique().tolist() for x in kept] == [[n] for n in (0, 1, 5, 6, 7, 10, 11, 12, 13, 14, 15)]


def test_shape_type_and_alignment_stay() -> None:
    pool = Pool()
    for dtype in (torch.bfloat16, torch.uint8, torch.float32):
        x = torch.empty(4, SMALLEST, dtype=dtype)
        before = x.data_ptr()
        pool.land(x)
        assert (x.shape, x.dtype, x.stride()) == ((4, SMALLEST), dtype, (SMALLEST, 1))
        assert x.data_ptr() != before and x.data_ptr() % 64 == 0


def test_it_holds_no_more_than_was_in_use_at_one_time() -> None:
    pool = Pool()
    first = [landed(pool) for _ in range(4)]
    del first
    assert pool.most == pool.held == 4 * SMALLEST
    large = landed(pool, 3 * N)
    assert pool.held == 4 * SMALLEST, "three idle blocks made room"
    assert (pool.lent, pool.most) == (3 * SMALLEST, 4 * SMALLEST)
    del large
    for _ in range(100):
        landed(pool, 3 * N)
        landed(pool)
    assert (pool.made, pool.held) == (5, 4 * SMALLEST)


def test_another_job_begins_with_nothing() -> None:
    pool = Pool()
    lent, idle = landed(pool), landed(pool)
    del idle
    pool.clear()
    assert pool.held == pool.lent == pool.most == SMALLEST, "what is lent stays where it is"
    lent.fill_(1.0)
    again = landed(pool)
    assert pool.made == 3 and bool((lent == 1.0).all())
    del lent, again
    pool.clear()
    assert pool.held == pool.most == 0


@pytest.mark.parametrize("case", ["small", "part", "shared"])
def test_what_others_see_stays_where_it_is(case: str) -> None:
    pool, whole = Pool(), torch.zeros(2 * N)
    x = {"small": torch.zeros(N - 1), "part": whole[:N], "shared": whole}[case]
    alias, address = x.view(-1), x.data_ptr()
    if case == "small":
        del alias
    pool.land(x)
    assert x.data_ptr() == address and pool.made == 0


def test_a_tensor_of_its_own_moves() -> None:
    """The counterpart of the refusals: the same tensor without the alias."""
    pool, whole = Pool(), torch.zeros(2 * N)
    address = whole.data_ptr()
    pool.land(whole)
    assert whole.data_ptr() != address and pool.made == 1


def test_threads_get_blocks_of_their_own() -> None:
    pool, wrong = Pool(), []

    def work(number: int) -> None:
        for _ in range(200):
            x = landed(pool).fill_(number)
            if not bool((x == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    landed(pool)
    assert not wrong
    assert pool.made <= 2 * 4 + 1 and pool.lent <= 2 * SMALLEST, "each holds one until it has the next"
