"""What is refused before any process waits for another, and what the ranks compare; orphans."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
from builders import make_plan, tiny_topology
from parallel_worlds import FAMILIES, SEED, mesh_bundle, mesh_plan
from source_tree import ROOT

from plans.errors import BundleMismatch
from plans.mesh import Parallelism
from runtime.parallel import launch
from runtime.parallel.launch import Torchrun, check_launch, running_workers, torchrun_place
from runtime.parallel.worker import Setup
from runtime.program import load_bundle

TWO_NODES = make_plan(
    parallelism=Parallelism(tp=2, spp=2), topology=tiny_topology(nodes=2, devices_per_node=2)
)
ONE_NODE = make_plan(parallelism=Parallelism(tp=2, spp=2))


def place(rank: int, ranks: int, local_ranks: int) -> Torchrun:
    return Torchrun(
        rank=rank,
        ranks=ranks,
        local_rank=rank % local_ranks,
        local_ranks=local_ranks,
        host="node-a",
        port=29500,
        attempt=0,
        agent_store=True,
    )


@pytest.mark.parametrize("started", [1, 2, 5, 8])
def test_another_number_of_processes_than_ranks_is_refused_with_the_right_command(started):
    with pytest.raises(BundleMismatch, match=rf"4 ranks .*, and {started} processes.*\n.*torchrun"):
        check_launch(ONE_NODE, place(0, started, started))


def test_the_plans_own_layout_is_accepted_on_every_rank():
    for rank in range(4):
        check_launch(ONE_NODE, place(rank, 4, 4))
        check_launch(TWO_NODES, place(rank, 4, 2))
    check_launch(ONE_NODE, None)


def test_a_plan_for_two_nodes_is_not_started_on_one_machine():
    with pytest.raises(BundleMismatch, match=r"on 2 nodes; .*\n.*--nnodes 2 --nproc-per-node 2"):
        check_launch(TWO_NODES, None)


def test_ranks_that_the_plan_puts_on_other_nodes_are_refused():
    with pytest.raises(BundleMismatch, match="the plan places"):
        check_launch(TWO_NODES, place(0, 4, 4))
    with pytest.raises(BundleMismatch, match="the plan places"):
        check_launch(ONE_NODE, place(0, 4, 2))


def test_a_gpu_plan_is_refused_where_its_devices_are_not():
    topology = tiny_topology(device="h100-sxm-80gb", devices_per_node=512)
    plan = make_plan(parallelism=Parallelism(spp=4, kvp=128), topology=topology, page_tokens=16)
    with pytest.raises(BundleMismatch, match=r"512 devices .* CUDA devices are visible"):
        check_launch(plan, None)


def test_a_process_outside_any_launcher_has_no_place():
    assert torchrun_place({}) is None
    assert torchrun_place({"RANK": "1"}) is None


def test_the_environment_of_torchrun_is_a_place():
    environment = {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "node-a",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    assert torchrun_place(environment) == place(3, 4, 2)


@pytest.mark.parametrize("differs", ["bundle", "seed"])
def test_ranks_that_hold_something_else_are_refused_before_weights_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differs: str
):
    """As two nodes with different copies of a bundle, or different flags."""
    plan = mesh_plan(Parallelism(kvp=2), FAMILIES["llama"])
    bundle = mesh_bundle(tmp_path / "bundle", plan)
    other = mesh_bundle(tmp_path / "other", mesh_plan(Parallelism(kvp=2), FAMILIES["qwen3"]))
    changes: dict[str, Any] = {"bundle": str(other)} if differs == "bundle" else {"seed": SEED + 1}
    start = launch.start_worker

    def start_other(setup: Setup) -> Any:
        return start(msgspec.structs.replace(setup, **changes) if setup.rank == 1 else setup)

    monkeypatch.setattr(launch, "start_worker", start_other)
    plan = load_bundle(bundle).plan
    weights = "random" if differs == "seed" else "nowhere"
    field = "seed" if differs == "seed" else "plan_hash"
    with (
        pytest.raises(BundleMismatch, match=rf"rank 1 on .*: {field} .*, not"),
        running_workers(str(bundle), plan, weights, SEED, None),
    ):
        pass


def test_a_store_of_one_machine_listens_on_no_other_interface():
    store, port = launch.open_store(None)
    socket.create_connection(("127.0.0.1", port)).close()
    with pytest.raises(ConnectionRefusedError):  # every interface would take in this address, too
        socket.create_connection(("127.0.0.2", port))
    del store


DRIVER = """
import multiprocessing, sys, time
from runtime.parallel.launch import running_workers
from runtime.program import load_bundle

with running_workers(sys.argv[1], load_bundle(sys.argv[1]).plan, "random", 0, None):
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    time.sleep(1e6)
"""


def is_running(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in {"Z", "X"}


def test_a_killed_driver_leaves_no_worker_behind(tmp_path: Path):
    bundle = mesh_bundle(tmp_path / "bundle", mesh_plan(Parallelism(kvp=2), FAMILIES["llama"]))
    command = [sys.executable, "-c", DRIVER, str(bundle)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        pids = [int(word) for word in driver.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
        driver.send_signal(signal.SIGKILL)
    until_s = time.monotonic() + 5.0
    while any(is_running(pid) for pid in pids) and time.monotonic() < until_s:
        time.sleep(0.05)
    left = [pid for pid in pids if is_running(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == []
