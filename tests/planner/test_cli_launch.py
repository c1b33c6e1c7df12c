"""medha-plan --detect, --topology and --export as a user meets them."""

import json
import sys
from pathlib import Path

import pytest

from planner.cli_plan import main
from plans.check import load_plan

SMALL = ("--model", "llama3-8b", "--gpus", "2", "--workload", "chat", "--no-kernels")


@pytest.fixture
def plan_it(capsys, monkeypatch, tmp_path):
    """Runs the command in a folder of its own: exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["medha-plan", *map(str, flags)])
        with pytest.raises(SystemExit) as caught:
            main()
        return (caught.value.code or 0, *capsys.readouterr())

    return run


def test_a_machine_without_gpus_cannot_be_detected(plan_it, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    status, out, err = plan_it("--detect")
    assert (status, out) == (1, "")
    assert err.startswith("no GPU found: nvidia-smi is not here")


def test_detection_stands_alone(plan_it):
    status, _, err = plan_it("--detect", "--gpus", 2)
    assert status == 2
    assert err == "--gpus: not here, --detect stands alone\n"


def test_a_topology_names_its_own_device(plan_it):
    flags = ("--model", "llama3-8b", "--workload", "chat", "--no-kernels", "--max-context", "8k")
    status, _, err = plan_it(*flags, "--gpus", 4, "--topology", "a100-pcie-mixed", "--out", "box")
    assert (status, err) == (0, "")
    plan = load_plan("box/plan.yaml")
    assert plan.topology.device == "a100-pcie-80gb"
    assert plan.topology.fabric is not None
    status, _, err = plan_it(
        *flags, "--gpus", 4, "--topology", "a100-pcie-mixed", "--hardware", "h100", "--out", "no"
    )
    assert status == 2
    assert "has a100-pcie-80gb, not h100-sxm-80gb" in err


def test_a_topology_file_with_a_mistake_names_the_field(plan_it, tmp_path):
    file = tmp_path / "lab.yaml"
    file.write_text(
        "name: lab\ndevice: h100\ndevices_per_node: 2\nfabric:\n  wires:\n    - link: {kind: pcie,"
        " scope: node, bandwidth_bytes_per_s: -1.0, efficiency: 0.5, latency_s: 1e-5, source: x}\n"
        "      joins: [[gpu0, gpu1]]\n"
    )
    status, out, err = plan_it("--model", "llama3-8b", "--gpus", 2, "--topology", file)
    assert (status, out) == (2, "")
    assert "fabric.wires[0].link.bandwidth_bytes_per_s: -1.0 is not allowed" in err


@pytest.mark.parametrize("engine", ["sglang", "torchrun", "vllm"])
def test_launch_scripts_are_in_the_bundle_and_their_losses_on_the_terminal(plan_it, engine):
    status, out, _ = plan_it(*SMALL, "--export", engine, "--out", engine)
    assert status == 0
    script = Path(engine, "launch/run_0.sh").read_text()
    assert Path(engine, "launch/bench.sh").is_file()
    assert f"bash {engine}/launch/run_0.sh" in out
    lost = [line.removeprefix("# - ") for line in script.splitlines() if line.startswith("# - ")]
    told = " ".join(out.split())
    assert lost
    assert all(f"not in the {engine} scripts: {each}" in told for each in lost)
    status, again, err = plan_it(f"{engine}/plan.yaml", "--export", engine)
    assert status == 0
    assert script in again
    assert all(each in err for each in lost)


def test_launch_scripts_are_in_the_object(plan_it):
    status, out, _ = plan_it(*SMALL, "--export", "vllm", "--format", "json", "--out", "bundle")
    assert status == 0
    launch = json.loads(out)["launch"]
    assert launch["engine"] == "vllm"
    assert launch["files"]["launch/run_0.sh"] == Path("bundle/launch/run_0.sh").read_text()
