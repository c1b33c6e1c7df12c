"""Every tunable op under pytest-benchmark: `pytest bench/kernels --benchmark-only`.

On a CUDA device each problem of the tuner (codegen/tune.py) is timed twice, with the defaults of
its spec and with the parameters that records of the catalog name, as a CUDA graph over data that
L2 does not hold; a round ends when the device has finished. `us_a_call` and `of_floor` in the
extra info are those of one call. `medha-tune --kernels` searches the parameters themselves.

Without one, the torch reference of each op runs on small shapes, in the group `reference, CPU`: it
shows that the benches work here, and nothing about the kernels.
"""

import pytest
import torch

from codegen import tune
from codegen.kernels import load_reference
from codegen.problems import Where, make, rates, release
from planner.profiles import catalog_device
from planner.tuned import chosen, records_for
from plans.errors import UnknownName

JOBS = tune.jobs()[0]
SMALL = {"batch": 2, "keys": 256, "tokens": 8, "width": 256, "n": 768, "k": 128}
GPU = torch.cuda.is_available()


def tuned_params(job: tune.Job) -> dict[str, int]:
    """What the catalog's record of this device says; empty where there is none of this source."""
    memory = torch.cuda.get_device_properties(0).total_memory
    device = catalog_device(torch.cuda.get_device_name(0), memory)
    try:
        records, _ = records_for(device or "")
    except UnknownName:
        return {}
    record = records.get(job.op)
    if record is None or record.source_sha256 != tune.source_sha256(job.op):
        return {}
    return {
        name: value
        for name, value in chosen(record, job.sizes).items()
        if name in job.search.values
    }


@pytest.mark.gpu
@pytest.mark.parametrize("params", ["default", "tuned"])
@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.title)
def test_kernel(benchmark, job, params):
    tuned = tuned_params(job) if params == "tuned" else {}
    if params == "tuned" and not tuned:
        pytest.skip(f"no tuned record of {job.op} for this device and source")
    where = Where(device=torch.device("cuda", 0))
    with tune.applied(job.op, tuned):
        problem = make(job.op, job.sizes, where)
        for call in problem.calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in problem.calls:
                call()

    def finished() -> None:
        graph.replay()
        torch.cuda.synchronize()

    benchmark.group = job.title
    benchmark.pedantic(finished, rounds=20, warmup_rounds=3)
    flops_per_s, bytes_per_s = rates(where.device)
    floor_s = problem.floor_s(flops_per_s=flops_per_s, bytes_per_s=bytes_per_s)
    if benchmark.stats is not None:
        call_s = benchmark.stats.stats.median / len(problem.calls)
        benchmark.extra_info["us_a_call"] = round(call_s * 1e6, 3)
        benchmark.extra_info["of_floor"] = round(floor_s / call_s, 3)
    benchmark.extra_info["params"] = tuned
    benchmark.extra_info["device"] = torch.cuda.get_device_name(0)
    release()


@pytest.mark.skipif(GPU, reason="there is a CUDA device: the kernels themselves are timed")
@pytest.mark.parametrize("op", sorted({job.op for job in JOBS}))
def test_reference_on_the_cpu(benchmark, op):
    job = next(each for each in JOBS if each.op == op)
    sizes = {name: min(size, SMALL.get(name, size)) for name, size in job.sizes.items()}
    where = Where(device=torch.device("cpu"), dtype=torch.float32, cold=False)
    arguments = make(op, sizes, where).arguments
    benchmark.group = "reference, CPU"
    benchmark.extra_info["device"] = "CPU; small shapes, torch reference, no kernel of ours"
    benchmark.pedantic(load_reference(op), args=arguments, rounds=5, warmup_rounds=1)
