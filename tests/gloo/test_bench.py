"""`zcompile bench` as a user runs it, on small models; the shaped network where it can be had."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zcompile.bench import network, report, systems
from zcompile.bench.command import _flops, machine_rates, refusal
from zcompile.bench.rank import exposed
from zcompile.overlap import WAIT, from_events
from zcompile.shapes import SHAPES, Decoder
from zcompile.topology import Topology

OWN = '''
import torch
from zcompile.bench import systems
def make(model, setting):
    """A system of the user's own."""
    return systems.parse("ddp")(model, setting)
def broken(model, setting):
    raise ValueError("this one does not start")
'''


def bench(*arguments: str, timeout: float = 500) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zcompile.cli", "bench", *arguments], capture_output=True, text=True, timeout=timeout, check=False
    )  # fmt: skip


@pytest.mark.slow
def test_systems_side_by_side_train_the_same(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    names = f"fsdp2 own={own}:make zc:zero_topo,compute=fp32,codegen=False"
    target, picture = tmp_path / "found.json", tmp_path / "found.png"
    done = bench("--model", "tiny", "--topology", "2", "--steps", "2", "--repetitions", "1", "--systems", names,
                 "--json", str(target), "--chart", str(picture))  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(target.read_text())
    rows = found["systems"]
    assert list(rows) == ["fsdp2", "own", "zc:zero_topo,compute=fp32,codegen=False"]
    for row in rows.values():
        assert row["loss"] == pytest.approx(rows["own"]["loss"], abs=1e-4)
        assert row["seconds"] > 0 and row["peak_bytes"] >= row["rest_bytes"] > 0 and row["ratio"] >= 1
        assert row["bytes"]["cluster"] > 0 and row["messages"]["cluster"]["messages"] > 0
    assert found["tokens_per_step"] == 2 * 32 and found["fastest"] in rows and found["fastest"] in done.stdout
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_a_system_that_does_not_start_is_said_and_the_others_run_again(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(OWN)
    done = bench("--model", "tiny", "--topology", "1", "--steps", "1", "--repetitions", "2", "--json", "-",
                 "--systems", f"ddp bad={own}:broken")  # fmt: skip
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert [run["system"] for run in found["runs"]] == 2 * found["order"], "A B, then A B again"
    rows = found["systems"]
    assert rows["bad"] == {"runs": 0, "error": "ValueError: this one does not start"}
    assert rows["ddp"]["runs"] == 2


def spaces() -> set[str]:
    """The network namespaces there are."""
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=False).stdout
    return {line.split()[0] for line in listed.splitlines() if line.strip()}


SENDER = """
import os, socket, sys, time

rank, sizes = int(os.environ["RANK"]), {1: 1_000_000, 2: 2_000_000, 4: 3_000_000}  # to the other of a pair, of a node, to another node
address = lambda rank: ("127.0.0.1" if rank < 2 else f"10.77.{rank // 4}.{rank % 4 // 2 + 1}", 23456)
if rank in sizes:
    with socket.create_server(("", 23456)) as server:
        line, _ = server.accept()
        with line:
            while line.recv(1 << 16):
                pass
            line.sendall(b"all")
for to in sizes if rank == 0 else ():
    for attempt in range(600):  # the other one may not be there yet
        try:
            line = socket.create_connection(address(to))
            break
        except OSError:
            time.sleep(0.05)
    begin = time.monotonic()
    with line:
        line.sendall(bytes(sizes[to]))
        line.shutdown(socket.SHUT_WR)
        assert line.recv(3) == b"all"
    print(to, time.monotonic() - begin, flush=True)
"""


@pytest.mark.skipif(bool(network.missing()), reason=network.missing())
def test_a_shaped_network_limits_and_counts(tmp_path: Path) -> None:
    """What crosses each level, counted and held up there: a lower bound of time, which a busy machine only passes by more."""
    before = spaces()
    try:
        with network.Shaped((2, 2, 2), 200, 50) as shaped:
            began = shaped.counters()
            assert shaped.run([sys.executable, "-c", SENDER], {}, tmp_path / "log", 60), (tmp_path / "log").read_text()
            carried = {level: amount - began[level] for level, amount in shaped.counters().items()}
    except network.NetworkError as error:
        pytest.skip(f"this kernel has no such network: {error}")
    assert spaces() == before, "it takes its network down"
    for level, amount in {"pair": 1e6, "node": 2e6, "cluster": 3e6}.items():
        assert amount < carried[level] < 1.2 * amount, carried
    seconds = dict(map(float, line.split()) for line in (tmp_path / "log").read_text().splitlines())
    bursts = 2 * 2**18  # pass at once: one for each link on the way
    assert seconds[2] > (2e6 - bursts) / 25e6 and seconds[4] > (3e6 - 2 * bursts) / 6.25e6, seconds


@pytest.mark.slow
@pytest.mark.skipif(bool(network.missing()), reason=network.missing())
def test_systems_over_a_shaped_network() -> None:
    before = spaces()
    done = bench("--model", "tiny", "--topology", "1x2x2", "--steps", "2", "--repetitions", "1", "--mbit", "200,50", "--json", "-",
                 "--systems", "ddp zc:zero_topo,codegen=False")  # fmt: skip
    if done.returncode == 2 and "` failed: " in done.stderr:
        pytest.skip(f"this kernel has no such network: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)["systems"]
    ours, waits = (rows["zc:zero_topo,codegen=False"][what] for what in ("bytes", "exposed"))
    assert (
        list(waits) == ["pair", "node", "cluster", "refresh"]
        and waits["cluster"] + waits["refresh"] > 0
        and not rows["ddp"]["exposed"]
    )
    assert all(rows["ddp"]["bytes"][level] > 0 for level in ("node", "cluster"))
    assert ours["cluster"] < rows["ddp"]["bytes"]["cluster"], "half of the gradient crosses nodes, not all of it"
    assert spaces() == before, "it takes its network down"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--systems", "fsdp3"), "system 'fsdp3': valid: ddp,"),
        (("--systems", "zc:zero4"), "preset 'zero4'; valid: ddp"),
        (("--systems", "zc:zero_topo,refresh"), "'refresh' must be option=value"),
        (("--systems", "zc:zero_topo,compute=fp8"), "compute='fp8'; valid: bf16, fp32"),
        (("--systems", "zc:zero_topo,overlap=-1"), "option overlap=-1"),
        (("--systems", "zc:zero_topo,refersh=int4"), "did you mean 'refresh'"),
        (("--systems", "me=/nowhere/x.py:f"), "there is no file /nowhere/x.py"),
        (("--systems", "ddp ddp"), "two of them have one name"),
        (("--systems", ""), "--systems is empty"),
        (("--model", "gpt-5"), "model 'gpt-5': valid:"),
        (("--topology", "2xtwo"), "2xtwo"),
        (("--steps", "0"), "--steps 0: must be a number from 1"),
        (("--loss-tolerance", "-1"), "--loss-tolerance -1.0: must be a number from 0"),
        (("--warmup", "1"), "--warmup 1: must be a number from 2"),
        (("--mbit", "fast"), "must be two numbers, such as 400,100"),
        (("--mbit", "-1,5"), "must not be negative"),
        (("--mbit", "400,100", "--topology", "2x2"), "three levels"),
    ],
)  # fmt: skip
def test_bad_input_is_refused_before_anything_starts(
    arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import argparse

    from zcompile.bench import command

    monkeypatch.delenv("RANK", raising=False)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    given = [f"{arguments[i]}={arguments[i + 1]}" for i in range(0, len(arguments), 2)]
    assert words in refusal(parser.parse_args(given))


def test_the_short_names_are_plans() -> None:
    for name in systems.OURS:
        found: Any = systems.parse(name)
        assert found.func is systems.ours and found.keywords["plan"].peer_gather, name
    assert all(callable(systems.parse(name)) for name in systems.DEFAULT)


def test_rates_are_a_ranks_share_of_a_link() -> None:
    found = machine_rates(Topology.parse("2x2x2"), (400.0, 0.0), "gpt-4m", 1)
    assert found["node"] == pytest.approx(400e6 / 8 / 2) and "cluster" not in found and found["flops"] > 0


def test_the_rate_of_products_is_that_of_the_model_where_it_runs_outside_of_a_job(tmp_path: Any) -> None:
    file = tmp_path / "own.py"
    file.write_text("def model():\n    raise RuntimeError('no process group')\n")
    (small, right), (products, wrong) = _flops("gpt-4m", 1), _flops(f"{file}:model", 1)
    assert 0 < small < products, "a small model's step reaches a fraction of what one large product does"
    assert (right, wrong) == ("", "RuntimeError: no process group")
    said: list[str] = []
    machine_rates(Topology.parse("2x2x2"), None, f"{file}:model", 1, said.append)
    assert len(said) == 1 and "not of this model" in said[0] and "no process group" in said[0]


def test_waits_that_left_no_trace_are_unknown_and_not_zero() -> None:
    nccl = from_events([("zc launch pair gather 0", 1, 0.0, 0.1), (WAIT, 1, 1.0, 2.0)])
    found = exposed(nccl, ["pair", "node"])
    assert found == {"pair": None, "node": None, "refresh": None}
    run = {
        "system": "zc-delta", "seconds": 1.0, "cpu_seconds": 1.0, "peak_bytes": 1, "rest_bytes": 1, "bytes": {}, "exposed": found,
        "losses": [1.0],
        "setup_seconds": 1.0, "page_faults": 0, "bytes_at": "", "messages": {},
    }  # fmt: skip
    rows = report.summarise({"order": ["zc-delta"], "runs": [run, run], "tokens_per_step": 8, "ranks": 4})["systems"]
    assert (rows["zc-delta"]["tokens_per_second"], rows["zc-delta"]["tokens_per_second_per_rank"]) == (8.0, 2.0)
    assert rows["zc-delta"]["exposed"] == found and report.waiting(found).startswith("waits: unknown")
    assert report.waiting({"pair": 0.25, "refresh": 0.0}).startswith("waits for pair 0.250 s, refresh 0.000 s")


def row(seconds: float, low: float, high: float, runs: int = 2) -> dict[str, Any]:
    return {"seconds": seconds, "spread": [low, high], "runs": runs}


def test_the_verdict_says_plainly_when_another_one_wins_and_when_it_is_a_draw() -> None:
    won = {"systems": {"zc-delta": row(2, 1.9, 2.1), "hsdp": row(1, 0.9, 1.1)}, "fastest": "hsdp"}
    assert report.verdict(won) == "hsdp is fastest: 2.00 times as fast as zc-delta"
    draw = {"systems": {"zc-delta": row(1.0, 0.9, 1.2), "hsdp": row(1.1, 1.0, 1.3)}, "fastest": "zc-delta"}
    assert "take it as a draw" in report.verdict(draw)
    once = {"systems": {"zc-delta": row(1.0, 1.0, 1.0, 1), "hsdp": row(3, 3, 3, 1)}, "fastest": "zc-delta"}
    assert "one run each" in report.verdict(once)


def test_whose_losses_differ_is_said_plainly() -> None:
    rows = {
        "hsdp": {"loss_difference": 0.001},
        "ddp": {"loss_difference": 0.0},
        "zc": {"loss_difference": -0.02},
        "bad": {"error": "no"},
    }
    found: dict[str, Any] = {"systems": rows, "reference": "ddp", "loss_tolerance": 0.005}
    assert report.losses(found) == "losses after the last step differ from that of ddp by more than 0.5 %: zc (-2.00 %)"
    rows["zc"]["loss_difference"] = float("nan")
    assert "zc (not a number)" in report.losses(found)
    del rows["zc"]
    assert report.losses(found) == "losses after the last step are within 0.5 % of that of ddp"
    assert report.losses({**found, "systems": {"ddp": rows["ddp"]}}) == "no losses to compare"


def test_ddp_with_a_bf16_wire_is_a_hook_that_torch_takes(ranks: Any) -> None:
    assert ranks(2).run(_ddp_bf16, timeout=60.0) == [1.5, 1.5]


def _ddp_bf16(rank: int) -> float:
    model = torch.nn.Linear(1, 1, bias=False)
    setting = systems.Setting(Topology.parse("2"), 1e-3, 1, torch.device("cpu"))
    trainer = systems.parse("ddp-bf16")(model, setting)
    trainer.model(torch.tensor([[rank + 1.0]])).sum().backward()
    (parameter,) = trainer.model.parameters()
    return float(parameter.grad)


def test_deepcompile_is_asked_for_and_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    engine = SimpleNamespace(compile=lambda: asked.update(compiled=True))

    def initialize(config: dict[str, Any], **rest: Any) -> tuple[Any]:
        asked.update(config)
        return (engine,)

    model = Decoder(SHAPES["tiny"])
    gpu, cpu = (systems.Setting(Topology.parse("2"), 1e-3, 1, torch.device(kind)) for kind in ("cuda", "cpu"))
    make = systems.parse("deepspeed-deepcompile")
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(RuntimeError, match="DeepSpeed is not installed here"):
        make(model, gpu)
    monkeypatch.setitem(sys.modules, "deepspeed", SimpleNamespace(initialize=initialize))
    monkeypatch.setitem(sys.modules, "deepspeed.compile.util", None)
    with pytest.raises(RuntimeError, match="this DeepSpeed has no DeepCompile"):
        make(model, gpu)
    supported = SimpleNamespace(is_deepcompile_supported=lambda: False)
    monkeypatch.setitem(sys.modules, "deepspeed.compile.util", supported)
    monkeypatch.setitem(sys.modules, "deepspeed.compile", SimpleNamespace(util=supported))
    with pytest.raises(RuntimeError, match="needs CUDA; this rank trains on cpu"):
        make(model, cpu)
    with pytest.raises(RuntimeError, match=f"does not support torch {torch.__version__.split('+')[0]}"):
        make(model, gpu)
    assert not asked
    supported.is_deepcompile_supported = lambda: True
    make(model, gpu)
    assert asked["compile"] == {"deepcompile": True} and asked["compiled"] and asked["zero_optimization"]["stage"] == 3
    asked.clear()
    systems.parse("deepspeed-zero3")(model, gpu)
    assert "compile" not in asked and "compiled" not in asked
