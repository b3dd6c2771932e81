"""The runtime on real ranks: role groups that count, generate_once, set-up that fails by name, the fake backend."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.patches import replaced
from support.spawn import Pool, RanksFailed, run
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import zcompile
from zcompile import _torch_compat as compat
from zcompile import gloo
from zcompile.groups import CountingGroup, GroupError
from zcompile.runtime import TRANSFERS, Runtime
from zcompile.topology import Topology

functional = torch.ops._c10d_functional
Ranks = Callable[[int], Pool]


def runtime(shape: str, order: tuple[int, ...] | None = None) -> Runtime:
    return Runtime.get(replace(Topology.parse(shape), order=order), timeout=30)


# --- counting ---------------------------------------------------------------------------------------------------------


def _gather_and_reduce(rank: int) -> Any:
    here = runtime("2x2")
    before = here.counters
    gathered = functional.wait_tensor(
        functional.all_gather_into_tensor(torch.tensor([rank, -rank], dtype=torch.bfloat16), 2, here.role(1, "gather"))
    )
    swapped = functional.wait_tensor(
        functional.all_to_all_single(torch.arange(4.0) + 10 * rank, [2, 2], [2, 2], here.role(2, "reduce"))
    )
    return gathered.tolist(), swapped.tolist(), (here.counters - before).rows, (here.counters - before).by_transfer()


def test_functional_collectives_are_counted_by_level_transfer_and_op(ranks: Ranks) -> None:
    answers = ranks(4).run(_gather_and_reduce)
    for rank, (gathered, swapped, rows, totals) in enumerate(answers):
        low, outer = rank - rank % 2, rank % 2
        half = 2 * (rank // 2)
        assert gathered == [low, -low, low + 1, -low - 1]
        assert swapped == [
            10.0 * outer + half,
            10.0 * outer + half + 1,
            10.0 * (outer + 2) + half,
            10.0 * (outer + 2) + half + 1,
        ]
        # received: two bf16 numbers of the other rank; two fp32 numbers of the other rank
        assert rows == {("node", "gather", "all_gather"): (1, 4), ("cluster", "reduce", "all_to_all"): (1, 8)}
        assert totals == {("node", "gather"): (1, 4), ("cluster", "reduce"): (1, 8)}


def _strays(rank: int, checksums: bool) -> dict[str, Any]:
    here = runtime("2x2")
    here.verify_messages(checksums)
    name = here.role(1, "sync")
    group = compat.resolve_group(name)
    x = torch.ones(4)
    uneven = [5, 1] if rank % 2 == 0 else [1, 3]  # one row of two numbers from the other rank
    calls: dict[str, Callable[[], Any]] = {
        "functional all_reduce": lambda: functional.wait_tensor(functional.all_reduce(x, "sum", name)),
        "functional reduce_scatter": lambda: functional.wait_tensor(
            functional.reduce_scatter_tensor(x, "sum", 2, name)
        ),
        "functional broadcast": lambda: functional.wait_tensor(functional.broadcast(x, 0, name)),
        "functional coalesced": lambda: [
            functional.wait_tensor(y) for y in functional.all_gather_into_tensor_coalesced([x, x[:2]], 2, name)
        ],
        "functional uneven": lambda: functional.wait_tensor(
            functional.all_to_all_single(torch.ones(sum(uneven), 2), uneven, uneven, name)
        ),
        "all_reduce": lambda: dist.all_reduce(x.clone(), group=group),
        "all_gather": lambda: dist.all_gather([torch.empty(4), torch.empty(4)], x, group=group),
        "all_to_all_single": lambda: dist.all_to_all_single(torch.empty(4), x, group=group),
        "broadcast": lambda: dist.broadcast(x.clone(), group=group, group_src=0),
        "barrier": lambda: group.barrier(),
    }
    counted = {}
    for title, call in calls.items():
        before = here.counters
        call()
        counted[title] = (here.counters - before).rows
    here.verify_messages(False)
    return counted


@pytest.mark.parametrize("checksums", [False, True])
def test_a_stray_collective_under_a_role_name_is_seen(ranks: Ranks, checksums: bool) -> None:
    for rank, counted in enumerate(ranks(4).run(_strays, checksums)):
        root = rank % 2 == 0
        expected = {
            "functional all_reduce": ("all_reduce", 16),
            "functional reduce_scatter": ("reduce_scatter", 8),
            "functional broadcast": ("broadcast", 0 if root else 16),
            "functional coalesced": ("all_gather", 24),
            "functional uneven": ("all_to_all", 8),
            "all_reduce": ("all_reduce", 16),
            "all_gather": ("all_gather", 16),
            "all_to_all_single": ("all_to_all", 8),
            "broadcast": ("broadcast", 0 if root else 16),
            "barrier": ("barrier", 0),
        }
        assert counted == {title: {("node", "sync", op): (1, received)} for title, (op, received) in expected.items()}


def _compiled(rank: int) -> Any:
    here = runtime("2x2")
    name = here.role(2, "refresh")

    def double(x: torch.Tensor) -> Any:
        return functional.wait_tensor(functional.all_gather_into_tensor(x * 2, 2, name)) + 1

    before = here.snapshot().get(("cluster", "refresh"), (0, 0))[0]
    out = torch.compile(double, backend="aot_eager", fullgraph=True)(torch.tensor([float(rank)]))
    return out.tolist(), here.snapshot()["cluster", "refresh"][0] - before, sorted(here._roles)


def test_a_compiled_graph_runs_through_the_role_and_names_agree_on_all_ranks(ranks: Ranks) -> None:
    answers = ranks(4).run(_compiled)
    assert [out for out, _, _ in answers] == [[1.0, 5.0], [3.0, 7.0]] * 2
    assert [calls for _, calls, _ in answers] == [1] * 4
    names = answers[0][2]
    assert names == sorted(f"zc.2x2.{level}.{transfer}" for level in ("node", "cluster") for transfer in TRANSFERS)
    assert all(answer[2] == names for answer in answers)


def _lanes(rank: int) -> Any:
    here = runtime("2x2")

    def inner(transfer: str) -> Any:
        role = here._roles[here.role(1, transfer)]
        assert isinstance(role, CountingGroup)
        return role.inner.group_name

    return {transfer: inner(transfer) for transfer in TRANSFERS}


def test_gathers_have_a_communicator_of_their_own(ranks: Ranks) -> None:
    lanes = ranks(2 * 2).run(_lanes)[0]
    assert lanes["gather"] not in {lanes[transfer] for transfer in TRANSFERS if transfer != "gather"}
    assert len(set(lanes.values())) == 2


# --- several runtimes in one process ----------------------------------------------------------------------------------


SHARING = [("2x2", None), ("2x2", (0, 1, 3, 2)), ("4", None), ("2x2", (0, 3, 1, 2)), ("1x4", None)]
ORDERED = [("2x2", (3, 2, 1, 0)), ("4", (2, 0, 3, 1)), ("2x2", (1, 3, 0, 2))]


def _many_topologies(rank: int, topologies: list[Any]) -> list[str]:
    done = []
    for shape, order in topologies:
        here = runtime(shape, order)
        k = len(here.topology.levels)
        x = functional.wait_tensor(
            functional.all_gather_into_tensor(torch.tensor([rank]), here.topology.sizes[k - 1], here.role(k, "reduce"))
        )
        assert x.tolist() == here.topology.group(rank, k)
        here.close()
        done.append(here.topology.key)
    return done


def test_topologies_that_share_groups_on_some_ranks_only(ranks: Ranks) -> None:
    """torch names a group after its ranks and the number of groups so far: reusing a group on some ranks would leave
    the others waiting.
    """
    answers = ranks(4).run(_many_topologies, SHARING)
    assert len(set(answers[0])) == 5 and all(answer == answers[0] for answer in answers)


def _sorted_by_torch(rank: int) -> list[str]:
    """With a `new_group` that sorts the ranks, as that of torch 2.11 does."""
    with replaced(compat.groups, "_order_is_an_option", lambda: False):
        return _many_topologies(rank, ORDERED)


def test_groups_keep_the_order_of_ranks_where_torch_would_sort_them(ranks: Ranks) -> None:
    answers = ranks(4).run(_sorted_by_torch)
    assert len(set(answers[0])) == 3 and all(answer == answers[0] for answer in answers)


def _close(rank: int) -> Any:
    here = runtime("2x2")
    name = here.role(1, "gather")
    groups = compat.number_of_groups()
    here.close()
    try:
        compat.resolve_group(name)
        gone = False
    except RuntimeError:
        gone = True
    again = runtime("2x2")
    return (
        gone,
        again is not here,
        again is runtime("2x2"),
        compat.number_of_groups() - groups,
        compat.resolve_group(name).size(),
    )


def test_close_unregisters_and_the_next_runtime_reuses_the_communicators(ranks: Ranks) -> None:
    assert ranks(4).run(_close) == [(True, True, True, 0, 2)] * 4


def _groups(rank: int, layers: int) -> int:
    """Process groups that there are when a model of so many layers has trained, been evaluated, and given its state."""
    torch.manual_seed(0)
    plain = torch.nn.Sequential(*(torch.nn.Linear(6, 6) for _ in range(layers)))
    before = compat.number_of_groups()
    model: Any = zcompile.hierarchical_zero(plain, topology="2x2", plan="zero_topo", compile=False)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 6)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        model(torch.ones(2, 6))
    zcompile.full_state_dict(model)
    return compat.number_of_groups() - before


def test_requirement_10_process_groups_are_two_a_level_and_one_however_deep_the_model_is() -> None:
    for layers in (2, 20):  # each in processes of its own: groups are kept
        assert run(_groups, 4, layers) == [2 * 2 + 1] * 4, layers


def _served(rank: int) -> tuple[int, int, list[str]]:
    def serving() -> int:
        return [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")].count("gloo_tcp_loop")

    before = serving()
    runtime("2x2")
    runtime("4")
    background = runtime("4").background()
    assert background is not None
    made = [role.inner for role in runtime("2x2")._roles.values()] + [background]
    named = {part.split(":")[-1] for group in made for part in str(dist.get_backend(group)).split(",")}
    return before, serving(), sorted(named)


def test_one_thread_serves_the_connections_of_all_groups() -> None:
    """Each group's own thread would look at them a hundred times a second."""
    for before, after, backends in run(_served, 4, timeout=120):
        assert backends == [gloo.NAME]
        if not before:
            pytest.skip("threads have names from torch 2.13 on")
        assert after == before + 1


def test_gloo_groups_are_told_apart_from_others() -> None:
    """By a group's backend or, where none is named, the default group's."""
    assert gloo.shared("nccl") == "nccl"
    assert gloo.shared("gloo") == gloo.NAME
    assert gloo.shared("cpu:gloo,cuda:nccl") == f"cpu:{gloo.NAME},cuda:nccl"
    assert gloo.shared(gloo.NAME) == gloo.NAME


def _refused(rank: int) -> list[str]:
    here = runtime("1x4")
    texts = []
    for call in (
        lambda: here.role(2, "scatter"),
        lambda: here.role(3, "gather"),
        lambda: here.role(1, "gather"),
        lambda: runtime("2x4"),
    ):
        try:
            call()
            texts.append("no error")
        except ValueError as error:
            texts.append(str(error))
    return texts


def test_errors_name_the_valid_choices(ranks: Ranks) -> None:
    transfer, level, size_one, world = ranks(4).run(_refused)[0]
    assert "'scatter'" in transfer and "gather, reduce, sync, refresh, back" in transfer
    assert "level 3" in level and "1 to 2" in level
    assert "size 1" in size_one and "`node`" in size_one
    assert "8" in world and "4" in world


# --- set-up that fails ------------------------------------------------------------------------------------------------


def _rank_three_skips(rank: int) -> str:
    store = compat.default_store()
    if rank == 3:
        store.wait(
            ["given up 0", "given up 1", "given up 2"], timedelta(seconds=50)
        )  # on its way until nobody waits for it
        return ""
    try:
        Runtime.get(Topology.parse("2x2"), timeout=2)
        return "made"
    except GroupError as error:
        store.set(f"given up {rank}", "")
        return str(error)


def test_a_group_that_never_becomes_ready_names_level_lane_and_members() -> None:
    answers = run(_rank_three_skips, 4)
    for rank, (level, members) in {0: ("cluster", "[0, 2]"), 1: ("cluster", "[1, 3]"), 2: ("node", "[2, 3]")}.items():
        text = answers[rank]
        assert f"level `{level}`" in text and "lane `weights`" in text and f"ranks {members}" in text and "2 s" in text


def _late_for_a_collective(rank: int, collective_timeout: float) -> Any:
    """Rank 1 comes after the limit of setting up, or, where that of collectives is shorter, when rank 0 has given up."""
    here = Runtime.get(Topology.parse("2"), timeout=1.5, collective_timeout=collective_timeout)
    store = compat.default_store()
    if rank == 1 and collective_timeout > 1.5:
        time.sleep(2)
    elif rank == 1:
        store.wait(["given up"], timedelta(seconds=50))
    try:
        name = here.role(1, "gather")
        return functional.wait_tensor(functional.all_gather_into_tensor(torch.tensor([rank]), 2, name)).tolist()
    except RuntimeError:
        store.set("given up", "")
        return "timed out"


def test_the_time_limit_of_setting_up_is_not_that_of_collectives() -> None:
    assert run(_late_for_a_collective, 2, 20.0) == [[0, 1]] * 2
    assert run(_late_for_a_collective, 2, 0.5)[0] == "timed out"


def _different_topologies(rank: int) -> str:
    try:
        Runtime.get(Topology.parse("4" if rank == 1 else "2x2"), timeout=2)
        return "made"
    except GroupError as error:
        return str(error)


def test_ranks_with_different_topologies_fail_by_name() -> None:
    answers = run(_different_topologies, 2 * 2)
    assert all(answer != "made" for answer in answers[:2])
    assert any("topology 4 " in answer and "topology 2x2 " in answer for answer in answers)


# --- generate_once ----------------------------------------------------------------------------------------------------


def _once(rank: int, key: str, fails: bool, hosts: int) -> Any:
    here = runtime("2x2")
    here.host = f"host{rank % hosts}"
    generations, loads, seconds = here.once.generations, here.once.loads, here.once.seconds

    def make() -> str:
        time.sleep(0.3)
        if fails and here.host in failing:
            raise OSError("disk full")
        return "made"

    failing = {here.host} if _first(here, key) else set()
    try:
        value = here.generate_once(key, make, lambda: "loaded", timeout=20)
    except OSError as error:
        value = str(error)
    return value, here.once.generations - generations, here.once.loads - loads, here.once.seconds - seconds


def _first(here: Runtime, key: str) -> bool:
    """True on one rank, which then is the first to arrive: the others hold back until it has announced itself."""
    if here.rank == 1:
        return True
    while not compat.default_store().check([f"zc/once/{here.host}/{key}/arrivals"]):
        time.sleep(0.01)
    return False


def test_generate_once_makes_once_and_the_others_load(ranks: Ranks) -> None:
    answers = ranks(4).run(_once, "one", False, 1)
    assert [answer[:3] for answer in answers] == [("loaded", 0, 1), ("made", 1, 0), ("loaded", 0, 1), ("loaded", 0, 1)]
    assert all(0.1 < answer[3] < 10 for answer in answers)


def test_after_a_failing_generator_the_others_make_themselves(ranks: Ranks) -> None:
    answers = ranks(4).run(_once, "fails", True, 1)
    assert [answer[:3] for answer in answers] == [("made", 1, 0), ("disk full", 1, 0), ("made", 1, 0), ("made", 1, 0)]


def _once_keys(rank: int, hosts: int, keys: int) -> Any:
    here = runtime("2x2")
    here.host = f"host{rank % hosts}"
    return here.generate_once(f"keys {hosts} {keys} {rank % keys}", lambda: "made", lambda: "loaded", timeout=20)


@pytest.mark.parametrize(("hosts", "keys", "generations"), [(1, 4, 4), (1, 2, 2), (2, 1, 2), (4, 1, 4)])
def test_each_host_and_each_key_has_its_own_generation(ranks: Ranks, hosts: int, keys: int, generations: int) -> None:
    answers = ranks(4).run(_once_keys, hosts, keys)
    assert sorted(answers) == ["loaded"] * (4 - generations) + ["made"] * generations


def _slow_generator(rank: int) -> Any:
    here = runtime("2x2")
    here.host = "host0"
    _first(here, "slow")

    def make() -> str:
        time.sleep(2 if rank == 1 else 0)
        return "slow" if rank == 1 else "own"

    return here.generate_once("slow", make, lambda: "loaded", timeout=0.5)


def test_a_generator_that_takes_too_long_is_not_waited_for(ranks: Ranks) -> None:
    assert ranks(4).run(_slow_generator) == ["own", "slow", "own", "own"]


# --- the fake backend, and one process --------------------------------------------------------------------------------


def _fake(_: int) -> Any:
    dist.init_process_group("fake", rank=77, world_size=384, store=FakeStore())
    here = Runtime.get(Topology.parse("frontier:48"))
    for device in ("cpu", "meta"):
        x = torch.ones(4, 3, device=device)
        out = functional.wait_tensor(functional.all_gather_into_tensor(x, 48, here.role(3, "refresh")))
        assert out.shape == (192, 3) and out.device.type == device
        back = functional.wait_tensor(functional.all_to_all_single(x, [2, 2], [2, 2], here.role(1, "reduce")))
        assert back.shape == (4, 3)
    here.agreement.compare("anything", {"rank": 77})
    answers = here.agreement.exchange([1, 2])
    mesh = here.mesh("cpu")
    shard = distribute_tensor(torch.zeros(384 * 2, 4), mesh, [Shard(0)] * 3, src_data_rank=None)
    made = here.generate_once("key", lambda: "made", lambda: "loaded")
    return (
        here.coordinates,
        here.snapshot(),
        (len(answers), answers[5]),
        tuple(mesh.shape),
        mesh.mesh_dim_names,
        shard.to_local().shape[0],
        made,
    )


def test_fake_backend_stands_in_for_384_ranks() -> None:
    coordinates, counted, answers, shape, names, rows, made = run(_fake, 1, backend=None)[0]
    assert coordinates == (1, 2, 9)
    assert counted["cluster", "refresh"] == (
        1,
        47 * 4 * 3 * 4,
    )  # nothing moves on the meta device, so nothing is counted there
    assert counted["pair", "reduce"] == (1, 2 * 3 * 4)
    assert answers == (384, [1, 2])
    assert (shape, names, rows, made) == ((2, 4, 48), ("pair", "node", "cluster"), 2, "made")


def _alone(_: int) -> Any:
    for name in [name for name in os.environ if name.startswith(("MASTER_", "RANK", "WORLD_SIZE", "SLURM_"))]:
        del os.environ[name]
    here = Runtime.get(Topology.parse("1"))
    here.agreement.compare("anything", [1])
    whole = torch.arange(6.0).view(3, 2)
    shard = distribute_tensor(whole, here.mesh("cpu"), [Shard(0)] * len(here.topology.levels))
    made = here.generate_once("key", lambda: "made", lambda: "loaded")
    return (
        dist.get_world_size(),
        here._roles,
        here.agreement.exchange([7]),
        shard.full_tensor().equal(whole),
        made,
        here.snapshot(),
    )


def test_world_of_one_without_a_launcher() -> None:
    assert run(_alone, 1, backend=None) == [(1, {}, [[7]], True, "made", {})]


def _restarted(rank: int) -> Any:
    """destroy_process_group and a new one: the old runtime must not be handed out again."""
    first = runtime("2")
    store = compat.default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", rank=rank, world_size=2, store=compat.PrefixStore("again", store))
    second = runtime("2")
    out = functional.wait_tensor(functional.all_gather_into_tensor(torch.tensor([rank]), 2, second.role(1, "gather")))
    return second is not first, out.tolist()


def test_a_new_default_group_means_a_new_runtime() -> None:
    assert run(_restarted, 2) == [(True, [0, 1])] * 2


def test_a_process_may_end_with_an_unwaited_refresh() -> None:
    program = (
        "import torch, torch.distributed as dist\n"
        "from torch.testing._internal.distributed.fake_pg import FakeStore\n"
        "from zcompile.runtime import Runtime\nfrom zcompile.topology import Topology\n"
        "from zcompile import _torch_compat as compat\n"
        "dist.init_process_group('fake', rank=0, world_size=2, store=FakeStore())\n"
        "name = Runtime.get(Topology.parse('2')).role(1, 'refresh')\n"
        "out = torch.ops._c10d_functional.all_gather_into_tensor(torch.ones(2), 2, name)\n"
        "print('unwaited', compat.unwaited_work())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "unwaited 1\n"), done.stderr


# --- the ranks of the tests themselves --------------------------------------------------------------------------------


def _one_raises(rank: int) -> int:
    if rank == 1:
        raise KeyError("lost")
    if rank == 2:
        time.sleep(30)
    return rank


def test_the_pool_reports_who_failed_and_who_was_late() -> None:
    with pytest.raises(RanksFailed) as caught:
        run(_one_raises, 3, grace=2)
    assert caught.value.results == {0: 0}
    assert caught.value.failures[1].type == "KeyError" and "lost" in caught.value.failures[1].message
    assert caught.value.failures[2].type == "Late" and "_one_raises" in caught.value.failures[2].trace
