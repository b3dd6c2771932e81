"""Launcher variables: what they mean, and what is missing."""

from __future__ import annotations

import os
from typing import Any

import pytest
from support.spawn import run

from zcompile.launcher import Launch, first_host, init_from_launcher, read_launch
from zcompile.runtime import Runtime
from zcompile.topology import Topology


@pytest.mark.parametrize(
    ("env", "launch"),
    [
        ({}, Launch(0, 1, 0, None)),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, Launch(0, 1, 0, None)),
        (
            {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "29500"},
            Launch(3, 8, 1, ("h", 29500)),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "16",
                "SLURM_PROCID": "9",
                "SLURM_LOCALID": "1",
                "SLURM_STEP_NODELIST": "n[07-08]",
                "SLURM_JOB_ID": "100",
                "SLURM_STEP_ID": "2",
            },
            Launch(9, 16, 1, ("n07", 10702)),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1"}, Launch(0, 1, 0, None)),
    ],
)
def test_launcher_variables(env: dict[str, str], launch: Launch) -> None:
    assert read_launch(env) == launch


@pytest.mark.parametrize(
    ("env", "text"),
    [
        ({"WORLD_SIZE": "4"}, "RANK is missing"),
        ({"RANK": "4", "WORLD_SIZE": "4"}, "rank 4 of 4"),
        ({"RANK": "one", "WORLD_SIZE": "4"}, "RANK is 'one'"),
        ({"RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "h"}, "MASTER_PORT is missing"),
    ],
)
def test_launcher_errors_name_the_variable(env: dict[str, str], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        read_launch(env)


def test_first_host_of_a_slurm_node_list() -> None:
    assert [first_host(text) for text in ("frontier[00012-00015,00020]", "a,b", "n[3,5]-ib", "solo", "")] == [
        "frontier00012",
        "a",
        "n3-ib",
        "solo",
        "",
    ]


def _from_launcher(rank: int) -> Any:
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), TORCHELASTIC_USE_AGENT_STORE="True")
    init_from_launcher("cpu")
    return Runtime.get(Topology.parse("2")).agreement.exchange([rank])


def test_init_from_launcher_meets_at_the_address() -> None:
    assert run(_from_launcher, 2, backend=None) == [[[0], [1]]] * 2
