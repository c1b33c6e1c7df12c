"""Launch scripts say what the plan says, as bash and independent parsers read them."""

import argparse
import os
import re
import subprocess
from pathlib import Path

import pytest
from builders import make_plan, sixteen_gpu_plan, tiny_model, tiny_topology
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from planner.engine_flags import memory_share, reachable_tokens
from planner.export import ENGINES, export
from plans.errors import MedhaError, UnknownName
from plans.mesh import Parallelism
from plans.model import RopeScaling
from plans.plan import Plan

DEGREES = {
    "vllm": ("tensor_parallel_size", "pipeline_parallel_size", "decode_context_parallel_size"),
    "sglang": ("tp_size", "pp_size", "dcp_size"),
}
CAPS = {
    "vllm": ("max_model_len", "long_prefill_token_threshold", "max_num_seqs", "block_size"),
    "sglang": ("context_length", "chunked_prefill_size", "max_running_requests", "page_size"),
}
SHARE = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static"}

STUB = """#!/bin/sh
printf '%s\\n' "program ${0##*/}" "env.CUDA_VISIBLE_DEVICES ${CUDA_VISIBLE_DEVICES-}" \\
  "env.VLLM_PP_LAYER_PARTITION ${VLLM_PP_LAYER_PARTITION-}" \\
  "env.SGLANG_PP_LAYER_PARTITION ${SGLANG_PP_LAYER_PARTITION-}" "$@" > "$CALLS/$$"
"""


def run_script(text: bytes, folder: Path) -> list[tuple[dict[str, str], argparse.Namespace]]:
    """Runs a script in bash with programs that only note how they were called."""
    bin_, calls = folder / "bin", folder / "calls"
    for each in (bin_, calls):
        each.mkdir(parents=True)
    for program in ("vllm", "python3", "torchrun", "medha-run", "medha-sim"):
        (bin_ / program).write_text(STUB)
        (bin_ / program).chmod(0o755)
    script = folder / "bundle" / "launch" / "script.sh"
    script.parent.mkdir(parents=True)
    script.write_bytes(text)
    places = {f"HEAD_ADDR_{node}": f"host{node}" for node in range(4)}
    given_ = {"CALLS": str(calls), "WEIGHTS": "random", "REQUESTS": "in.jsonl"}
    path = f"{bin_}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", str(script)],
        env={**places, **given_, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    found = []
    for call in sorted(calls.iterdir()):
        first = call.read_text().splitlines()
        settings = dict(line.split(" ", 1) for line in first[:4])
        found.append((settings, parsed(first[4:])))
    return found


def parsed(words: list[str]) -> argparse.Namespace:
    """Flags as argparse reads them, and `rest` in order."""
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    names = {word for word in words if word.startswith("--")}
    for place, word in enumerate(words):
        if word in names:
            names.remove(word)
            after = words[place + 1 : place + 2]
            switch = not after or after[0].startswith("--")
            parser.add_argument(word, action="store_true") if switch else parser.add_argument(word)
    parser.add_argument("-m")
    known, rest = parser.parse_known_args(words)
    known.rest = rest
    return known


def grouped(nodes: int = 1, **mesh: int) -> Plan:
    """A plan of a small model that has room for everything, on nodes of equally many devices."""
    parallelism = Parallelism(**mesh)
    per_node = -(-(parallelism.ranks + parallelism.idle) // nodes)
    model = tiny_model(heads=8, kv_heads=2, weight_dtype="bf16", layers=6)
    topology = tiny_topology(nodes=nodes, devices_per_node=per_node)
    plan = make_plan(model=model, parallelism=parallelism, topology=topology, kv_dtype="bf16")
    return with_memory(plan, plan.kv.pages_per_rank)


def with_memory(plan: Plan, pages: int) -> Plan:
    """The plan on devices that hold it with so many pages and nothing else."""
    memory = plan.memory
    kv = memory.kv_bytes * pages // plan.kv.pages_per_rank
    capacity = memory.weights_bytes + memory.activations_bytes + kv + memory.reserved_bytes
    return structs.replace(
        plan,
        kv=structs.replace(plan.kv, pages_per_rank=pages),
        memory=structs.replace(memory, kv_bytes=kv, capacity_bytes=capacity, free_bytes=0),
        topology=structs.replace(plan.topology, device_memory_bytes=capacity),
    )


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("nodes", "mesh"),
    [
        (1, {}),
        (1, {"tp": 2, "idle": 1}),
        (1, {"tp": 2, "spp": 2}),
        (2, {"tp": 2, "spp": 2}),
        (2, {"tp": 2, "spp": 3, "replicas": 2}),
        (1, {"tp": 2, "replicas": 3}),
        (1, {"tp": 1, "kvp": 2}),
        (1, {"tp": 2, "kvp": 4}),
        (2, {"tp": 2, "kvp": 2, "spp": 2}),
    ],
)
def test_what_bash_starts_is_the_plan(engine, nodes, mesh, tmp_path):
    if nodes == 2 and mesh.get("replicas") == 2:
        mesh = {**mesh, "spp": 2}
    plan = grouped(nodes, **mesh)
    launch = export(plan, engine)
    seen: dict[int, list[tuple[int, int]]] = {}
    for node in range(nodes):
        text = launch.files[f"launch/run_{node}.sh"]
        for settings, flags in run_script(text, tmp_path / str(node)):
            tensor, stages, shared = (
                int(getattr(flags, name, None) or 1) for name in DEGREES[engine]
            )
            p = plan.parallelism
            assert tensor == p.tp * p.kvp
            assert stages == p.spp
            assert tensor % shared == 0
            assert [int(getattr(flags, name)) for name in CAPS[engine]] == [
                plan.limits.context_tokens,
                plan.prefill.chunks[0].chunk_tokens,
                plan.limits.sequences,
                plan.kv.page_tokens,
            ]
            if engine == "vllm":  # which wants at least one token for each sequence
                chunk, sequences = plan.prefill.chunks[0].chunk_tokens, plan.limits.sequences
                assert int(flags.max_num_batched_tokens) == max(chunk, sequences)
            assert float(getattr(flags, SHARE[engine])) == memory_share(plan, engine)
            if p.spp > 1:
                cut = settings[f"env.{engine.upper()}_PP_LAYER_PARTITION"]
                assert [int(each) for each in cut.split(",")] == [b - a for a, b in plan.stages]
            assert "MODEL" not in " ".join(flags.rest)
            devices = [int(each) for each in settings["env.CUDA_VISIBLE_DEVICES"].split(",")]
            meeting = getattr(flags, "port", None)
            if getattr(flags, "nnodes", None):
                assert (int(flags.nnodes), int(flags.node_rank)) == (nodes, node)
                head = getattr(flags, "master_addr", None) or flags.dist_init_addr.split(":")[0]
                assert head == "host0"
            replica = len(seen) if meeting is None else int(meeting) - 8000
            seen.setdefault(replica, []).extend((node, each) for each in devices)
    p = plan.parallelism
    started = sorted(each for devices in seen.values() for each in devices)
    assert started == sorted(plan.placement.rank_map)


@pytest.mark.parametrize("nodes", [1, 2, 3])
def test_torchrun_starts_the_ranks_where_the_plan_has_them(nodes, tmp_path):
    launching = pytest.importorskip("runtime.parallel.launch")
    distributed = pytest.importorskip("torch.distributed.run")
    mesh = {"tp": 2, "spp": nodes, "replicas": 2}
    plan = grouped(nodes, **mesh) if nodes < 3 else _uneven()
    launch = export(plan, "torchrun")
    ranks = 0
    for row, node in enumerate(sorted({node for node, _ in plan.placement.rank_map})):
        ((settings, flags),) = run_script(
            launch.files[f"launch/run_{node}.sh"], tmp_path / str(node)
        )
        if nodes == 1:
            assert settings["program"] == "medha-run"
            launching.check_launch(plan, None)
            continue
        assert settings["program"] == "torchrun"
        words = Path(next((tmp_path / str(node) / "calls").iterdir())).read_text().splitlines()[4:]
        read = distributed.get_args_parser().parse_args(words)
        assert read.training_script == "runtime.cli_run"
        assert (read.module, int(read.node_rank), read.master_addr) == (True, row, "host0")
        here = int(read.nproc_per_node)
        for local in range(here):
            place = launching.Torchrun(
                rank=ranks + local,
                ranks=plan.parallelism.ranks,
                local_rank=local,
                local_ranks=here,
                host=read.master_addr,
                port=read.master_port,
                attempt=0,
                agent_store=True,
            )
            launching.check_launch(plan, place)
        ranks += here
        assert flags.weights == "random"
    assert nodes == 1 or ranks == plan.parallelism.ranks


def _uneven() -> Plan:
    """Three nodes of four devices: two of them full, one with a single tp group."""
    return grouped(3, tp=2, spp=5, idle=2)


def test_engines_want_equally_many_ranks_a_node_and_torchrun_does_not():
    plan = _uneven()
    for engine in ("vllm", "sglang"):
        with pytest.raises(MedhaError, match=r"4 on node 0, 4 on node 1, 2 on node 2; nearest: --"):
            export(plan, engine)
    assert set(export(plan, "torchrun").files) == {
        *(f"launch/run_{node}.sh" for node in range(3)),
        "launch/bench.sh",
    }


@pytest.mark.parametrize("engine", ENGINES)
def test_scripts_are_the_same_bytes_each_time_and_name_what_they_lose(engine):
    plan = sixteen_gpu_plan()
    launch = export(plan, engine)
    assert export(plan, engine) == launch
    for name, text in launch.files.items():
        if name != "launch/bench.sh":
            assert all(f"# - {each}" in text.decode() for each in launch.lost)


def test_a_chunk_list_is_named_with_what_its_loss_costs():
    launch = export(sixteen_gpu_plan(), "vllm")
    lost = next(each for each in launch.lost if "chunk list" in each)
    plan = sixteen_gpu_plan()
    first, last = plan.prefill.chunks[0].chunk_tokens, plan.prefill.chunks[-1].chunk_tokens
    assert f"{first} tokens at every prefix" in lost
    assert f"down to {last}" in lost
    behind = plan.limits.context_tokens - first
    wanted_s = plan.step_time.step_s(((first, behind),), ())
    assert f"for {wanted_s * 1e3:.0f} ms" in lost


def test_kvp_is_cut_by_vllm_where_tensor_ranks_outnumber_kv_heads(tmp_path):
    plan = grouped(1, tp=2, kvp=4)  # two KV heads
    ((_, flags),) = run_script(export(plan, "vllm").files["launch/run_0.sh"], tmp_path / "v")
    assert (flags.tensor_parallel_size, flags.decode_context_parallel_size) == ("8", "4")
    ((_, flags),) = run_script(export(plan, "sglang").files["launch/run_0.sh"], tmp_path / "s")
    assert not hasattr(flags, "dcp_size")
    assert any("kvp 4" in each for each in export(plan, "sglang").lost)


def test_groups_that_cannot_become_tensor_ranks_stay_idle_and_are_named(tmp_path):
    plan = grouped(1, tp=2, kvp=3)
    launch = export(plan, "vllm")
    ((settings, flags),) = run_script(launch.files["launch/run_0.sh"], tmp_path)
    assert flags.tensor_parallel_size == "2"
    assert settings["env.CUDA_VISIBLE_DEVICES"] == "0,1"
    assert any("4 GPUs of each server stay idle" in each for each in launch.lost)
    two = export(grouped(2, tp=2, kvp=3, spp=2), "vllm")
    assert set(two.files) == {"launch/run_0.sh", "launch/bench.sh"}  # four ranks fit on one node
    assert any("8 GPUs of each server stay idle" in each for each in two.lost)


def test_a_context_that_the_engine_cannot_hold_is_cut_and_named(tmp_path):
    """Memory for a third of the context on each of three groups, and an engine without groups."""
    plan = grouped(1, tp=2, kvp=3)
    plan = with_memory(plan, plan.kv.tokens_per_kvp_shard // plan.kv.page_tokens)
    launch = export(plan, "vllm")
    ((_, flags),) = run_script(launch.files["launch/run_0.sh"], tmp_path)
    fits = int(flags.max_model_len)
    share = float(flags.gpu_memory_utilization)
    # what the share leaves beside weights and activations, by the bytes of K and V of two heads
    layers, token = 6, 2 * 1 * plan.model.head_dim * 2
    memory = plan.memory
    room = memory.capacity_bytes * share - memory.weights_bytes - memory.activations_bytes
    assert fits == room // (layers * token) // plan.kv.page_tokens * plan.kv.page_tokens
    assert fits < plan.limits.context_tokens
    assert any(f"{fits} tokens fit" in each for each in launch.lost)


def test_assumed_rope_scaling_is_told_and_a_checkpoints_own_is_not():
    own = RopeScaling(kind="yarn", factor=4.0, original_context_tokens=256)
    plan = grouped()
    for assumed in (True, False):
        rope = structs.replace(plan.model.rope, scaling=structs.replace(own, assumed=assumed))
        changed = structs.replace(plan, model=structs.replace(plan.model, rope=rope))
        text = export(changed, "vllm").files["launch/run_0.sh"].decode()
        assert ('"factor": 4.0' in text) == assumed


@given(
    tp=st.integers(1, 8),
    shared=st.integers(1, 4),
    room=st.integers(0, 1 << 24),
)
def test_more_ranks_for_a_sequence_never_hold_less(tp, shared, room):
    plan = grouped()
    here = reachable_tokens(plan, tp, shared, room)
    assert reachable_tokens(plan, tp, shared + 1, room) >= here
    assert reachable_tokens(plan, tp + 1, shared, room) >= here or tp + 1 > plan.model.kv_heads


def test_the_benchmark_offers_the_workload_at_its_medians(tmp_path):
    plan = grouped()
    calls = run_script(export(plan, "vllm").files["launch/bench.sh"], tmp_path)
    lengths = sorted(int(flags.random_input_len) for _, flags in calls)
    assert lengths == [64, 704]  # quantile 0.5 of the tables of tests/builders.py
    rates = [float(flags.request_rate) for _, flags in calls]
    assert sum(rates) == pytest.approx(0.8 * plan.predicted.capacity_rps)


def test_the_benchmark_of_our_runtime_is_the_simulator(tmp_path):
    plan = grouped()
    ((settings, flags),) = run_script(export(plan, "torchrun").files["launch/bench.sh"], tmp_path)
    assert settings["program"] == "medha-sim"
    assert float(flags.qps) == pytest.approx(0.8 * plan.predicted.capacity_rps)
    assert Path(flags.rest[0]).resolve() == (tmp_path / "bundle").resolve()


def test_an_unknown_engine_names_the_nearest():
    with pytest.raises(UnknownName, match="nearest: vllm"):
        export(grouped(), "vlm")


def test_no_line_continues_into_a_comment():
    for engine in ENGINES:
        for text in export(sixteen_gpu_plan(), engine).files.values():
            assert not re.search(r"\\\n\s*#", text.decode())
