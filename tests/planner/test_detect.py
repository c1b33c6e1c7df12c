"""Recorded texts of nvidia-smi and /sys become topologies that a search accepts."""

import sys
from pathlib import Path

import pytest

from planner import detect as detecting
from planner.catalog import load_device, load_node_type, topology_for
from planner.detect import detect, parse_gpus, parse_matrix, parse_nvlinks, read_ports
from planner.placement import place, slowest_link
from plans.errors import MedhaError, UnknownName, UsageError
from plans.mesh import Parallelism

TAIL = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks
"""


def matrix(names: list[str], cell, affinity) -> str:
    """A matrix as the tool prints it: tabs, the first cell blank, the underlined heading."""
    heads = "".join(f"\t\x1b[4m{name}" for name in names)
    rows = [
        "\t".join(
            [
                one,
                *(" X " if one == two else cell(row, column) for column, two in enumerate(names)),
                *((f"{affinity(row)}", f"{row // 4}\t\tN/A") if one.startswith("GPU") else ()),
            ]
        )
        for row, one in enumerate(names)
    ]
    return f"{heads}\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n" + "\n".join(rows) + TAIL


def eight(kind: str) -> str:
    return "".join(f"{each}, {kind}, 5, 16\n" for each in range(8))


def hgx_cell(row: int, column: int) -> str:
    """Eight GPUs on switches, then eight ports: port i shares a PCIe switch with GPU i."""
    if row < 8 and column < 8:
        return "NV18"
    if row % 8 == column % 8:
        return "PIX"
    return "NODE" if row % 8 // 4 == column % 8 // 4 else "SYS"


HGX_NAMES = [*(f"GPU{each}" for each in range(8)), *(f"NIC{each}" for each in range(8))]
HGX_LEGEND = "\nNIC Legend:\n\n" + "".join(f"  NIC{each}: mlx5_{each}\n" for each in range(8))


def affinity(row: int) -> str:
    return "0-55,112-167" if row % 8 < 4 else "56-111,168-223"


def links(device: int, count: int, speed: str) -> str:
    rows = "".join(f"\t Link {each}: {speed} GB/s\n" for each in range(count))
    return f"GPU {device}: NVIDIA H100 80GB HBM3 (UUID: GPU-{device:08d})\n{rows}"


HGX = {
    "--query-gpu": eight("NVIDIA H100 80GB HBM3"),
    "-m": matrix(HGX_NAMES, hgx_cell, affinity) + HGX_LEGEND,
    "nvlink": "".join(links(each, 18, "26.562") for each in range(8)),
}

PAIRS = {
    "--query-gpu": "".join(f"{each}, NVIDIA H100 NVL, 5, 16\n" for each in range(4)),
    "-m": matrix(
        [f"GPU{each}" for each in range(4)],
        lambda row, column: "NV12" if row // 2 == column // 2 else "SYS",
        lambda row: f"{row // 2 * 32}-{row // 2 * 32 + 31}",
    ),
    "nvlink": "".join(links(each, 12, "26.562") for each in range(4)),
}

PCIE = {
    "--query-gpu": "".join(f"{each}, NVIDIA L40S, 4, 16\n" for each in range(4)),
    "-m": matrix(
        ["GPU0", "GPU1", "GPU2", "GPU3", "mlx5_0", "mlx5_1"],
        lambda row, column: "PIX" if row == 4 or column == 4 else "NODE",
        lambda _: "0-63",
    ),
}


RECORDED_ONE = (
    "\t\x1b[4mGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\nGPU0\t X \t0-15\t0\t\tN/A\n"
) + TAIL
"""`nvidia-smi topo -m` of a machine with one H100, as driver 580 printed it."""
HEADS_OF_TWO = "\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
RECORDED_TWO = {
    "--query-gpu": "0, NVIDIA H100 80GB HBM3, 5, 16\n1, NVIDIA H100 80GB HBM3, 5, 16\n",
    "-m": f"{HEADS_OF_TWO}GPU0\t X \tNV18\t0-31\t0\t\tN/A\nGPU1\tNV18\t X \t0-31\t0\t\tN/A\n{TAIL}",
    "-mp": f"{HEADS_OF_TWO}GPU0\t X \tPHB\t0-31\t0\t\tN/A\nGPU1\tPHB\t X \t0-31\t0\t\tN/A\n{TAIL}",
    "nvlink": links(0, 18, "26.562") + links(1, 18, "26.562"),
}
"""What the same driver printed on a machine with two H100."""


def runner(texts):
    """Answers from recorded texts, by the word that tells the commands apart."""

    def run(command):
        words = sorted(texts, key=len, reverse=True)  # -mp before -m
        return next((texts[word] for word in words if any(word in w for w in command)), None)

    return lambda command: None if command[-1] == "-mp" and "-mp" not in texts else run(command)


def make_ports(root: Path, ports: dict[str, tuple[str, str, str]]) -> Path:
    for name, (state, rate, layer) in ports.items():
        folder = root / "class/infiniband" / name / "ports/1"
        folder.mkdir(parents=True)
        for file, text in (("state", state), ("rate", rate), ("link_layer", layer)):
            (folder / file).write_text(f"{text}\n")
    return root


def infiniband(root: Path, count: int) -> Path:
    fast = ("4: ACTIVE", "400 Gb/sec (4X NDR)", "InfiniBand")
    ports = {f"mlx5_{each}": fast for each in range(count)}
    ports["mlx5_20"] = ("4: ACTIVE", "25 Gb/sec (1X EDR)", "Ethernet")  # for management
    ports["mlx5_21"] = ("1: DOWN", "400 Gb/sec (4X NDR)", "InfiniBand")
    return make_ports(root, ports)


def planned(text: str, tmp_path: Path, gpus: int):
    path = tmp_path / "here.yaml"
    path.write_text(text)
    node = load_node_type(path)
    return topology_for(load_device(node.device), gpus, node)


def test_an_hgx_node_has_switches_pcie_cpus_and_a_rail_for_each_port(tmp_path):
    text = detect(runner(HGX), infiniband(tmp_path / "sys", 8))
    topology = planned(text, tmp_path, 16)
    kinds = [part.kind for part in topology.fabric.parts]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "nvlink-switch": 1,
        "cpu": 2,
        "pcie-switch": 8,
        "nic": 8,
    }
    assert topology.fabric.network.rails
    mesh = Parallelism(tp=8, spp=2)
    placement = place(topology, mesh)
    tp, spp = (slowest_link(topology, mesh, placement, axis) for axis in ("tp", "spp"))
    assert (tp.kind, tp.bandwidth_bytes_per_s) == ("nvlink", 450e9)
    assert (spp.kind, spp.bandwidth_bytes_per_s) == ("infiniband", 50e9)


def test_the_same_machine_gives_the_same_text(tmp_path):
    ports = infiniband(tmp_path / "sys", 8)
    assert detect(runner(HGX), ports) == detect(runner(HGX), ports)


def test_bridged_pairs_are_wires_between_devices(tmp_path):
    topology = planned(detect(runner(PAIRS), tmp_path), tmp_path, 4)
    two, four = Parallelism(tp=2, replicas=2), Parallelism(tp=4)
    link = slowest_link(topology, two, place(topology, two), "tp")
    assert (link.kind, link.bandwidth_bytes_per_s) == ("nvlink", 300e9)
    assert slowest_link(topology, four, place(topology, four), "tp").kind == "socket"


def test_a_box_without_nvlink_shares_its_fastest_port(tmp_path):
    sys = make_ports(
        tmp_path / "sys",
        {
            "mlx5_0": ("4: ACTIVE", "200 Gb/sec (4X HDR)", "Ethernet"),
            "mlx5_1": ("4: ACTIVE", "10 Gb/sec (1X QDR)", "Ethernet"),
        },
    )
    topology = planned(detect(runner(PCIE), sys), tmp_path, 8)
    assert topology.fabric.ports == ("nic0",)
    mesh = Parallelism(tp=4, spp=2)
    spp = slowest_link(topology, mesh, place(topology, mesh), "spp")
    assert (spp.kind, spp.bandwidth_bytes_per_s) == ("ethernet", pytest.approx(25e9 / 4))
    tp = slowest_link(topology, mesh, place(topology, mesh), "tp")
    assert (tp.kind, tp.bandwidth_bytes_per_s) == ("pcie", 31.504e9)


def test_the_matrix_without_nvlink_tells_more_where_the_driver_has_it(tmp_path):
    """Without ports nothing but -mp says which GPUs share a switch."""
    names = [f"GPU{each}" for each in range(4)]
    texts = {
        "--query-gpu": "".join(f"{each}, NVIDIA H200, 5, 16\n" for each in range(4)),
        "-mp": matrix(names, lambda a, b: "PXB" if a // 2 == b // 2 else "NODE", lambda _: "0-9"),
        "-m": matrix(names, lambda *_: "NV18", lambda _: "0-9"),
    }
    found = planned(detect(runner(texts), tmp_path), tmp_path, 4).fabric
    assert [part.kind for part in found.parts].count("pcie-switch") == 2
    assert [part.kind for part in found.parts].count("nvlink-switch") == 1


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ({(0, 1): "NV2", (0, 2): "NV1", (1, 3): "NV1", (2, 3): "NV2"}, [50e9, 25e9]),  # a ring
        ({(a, b): "NV4" for a in range(4) for b in range(4)}, [100e9]),  # four, 12 links each
    ],
)
def test_direct_links_stay_direct(tmp_path, cells, expected):
    names = [f"GPU{each}" for each in range(4)]
    texts = {
        "--query-gpu": "".join(f"{each}, NVIDIA A100-SXM4-80GB, 4, 16\n" for each in range(4)),
        "-m": matrix(
            names,
            lambda a, b: cells.get((min(a, b), max(a, b)), "NODE"),
            lambda _: "0-9",
        ),
        "nvlink": "".join(links(each, 12, "25") for each in range(4)),
    }
    fabric = planned(detect(runner(texts), tmp_path), tmp_path, 4).fabric
    found = [each.link.bandwidth_bytes_per_s for each in fabric.wires if each.link.kind == "nvlink"]
    assert found == expected
    assert all(part.kind != "nvlink-switch" for part in fabric.parts)


def test_one_gpu_needs_no_graph(tmp_path):
    text = detect(runner({"--query-gpu": "0, NVIDIA H200, 5, 16\n"}), tmp_path)
    assert planned(text, tmp_path, 1).fabric is None


def test_a_recorded_machine_of_one_h100_is_one_device_that_a_plan_accepts(tmp_path):
    matrix_of_one = parse_matrix(RECORDED_ONE)
    assert matrix_of_one.cells == {("GPU0", "GPU0"): "X"}
    assert matrix_of_one.affinity == {"GPU0": "0-15"}
    texts = {
        "--query-gpu": "0, NVIDIA H100 80GB HBM3, 5, 16\n",
        "-m": RECORDED_ONE,
        "-mp": RECORDED_ONE,
        "nvlink": links(0, 18, "26.562"),
    }
    text = detect(runner(texts), tmp_path)
    assert "no matrix" not in text
    topology = planned(text, tmp_path, 1)
    assert (topology.device, topology.devices_per_node) == ("h100-sxm-80gb", 1)
    assert topology.fabric is None


def test_two_devices_of_a_guest_have_their_nvlinks_between_them(tmp_path):
    """A virtual machine with two of eight: no ports, one CPU, links by a switch outside."""
    names = ["GPU0", "GPU1"]
    texts = {
        "--query-gpu": "".join(f"{each}, NVIDIA H100 80GB HBM3, 5, 16\n" for each in range(2)),
        "-m": matrix(names, lambda *_: "NV18", lambda _: "0-31"),
        "-mp": matrix(names, lambda *_: "PHB", lambda _: "0-31"),
        "nvlink": "".join(links(each, 18, "26.562") for each in range(2)),
    }
    topology = planned(detect(runner(texts), tmp_path), tmp_path, 2)
    for mesh, axis in ((Parallelism(tp=2), "tp"), (Parallelism(spp=2), "spp")):
        link = slowest_link(topology, mesh, place(topology, mesh), axis)
        assert (link.kind, link.bandwidth_bytes_per_s) == ("nvlink", 450e9)


def test_a_recorded_machine_of_two_h100_is_a_pair_by_nvlink_under_one_cpu(tmp_path):
    text = detect(runner(RECORDED_TWO), tmp_path)
    topology = planned(text, tmp_path, 2)
    assert (topology.device, topology.devices_per_node) == ("h100-sxm-80gb", 2)
    assert [(each.name, each.kind) for each in topology.fabric.parts] == [("cpu0", "cpu")]
    nvlink, pcie = topology.fabric.wires
    # 18 links of 25 GB/s of data each way; 16 lanes of 32 GT/s at 128 of 130 bits
    assert (nvlink.link.kind, nvlink.link.bandwidth_bytes_per_s) == ("nvlink", 450e9)
    assert (pcie.link.kind, pcie.link.bandwidth_bytes_per_s) == ("pcie", 63.008e9)
    assert nvlink.joins == (("gpu0", "gpu1"),)
    assert pcie.joins == (("gpu0", "cpu0"), ("gpu1", "cpu0"))
    assert topology.fabric.network is None


def test_gpus_without_a_matrix_are_taken_to_share_a_cpu(tmp_path):
    text = detect(
        runner({"--query-gpu": "0, NVIDIA L40S, 4, 16\n1, NVIDIA L40S, 4, 8\n"}), tmp_path
    )
    assert "no matrix of connections" in text
    (wires,) = planned(text, tmp_path, 2).fabric.wires
    assert wires.link.bandwidth_bytes_per_s == 15.752e9  # the narrower of the two


def test_what_a_driver_does_not_know_is_assumed_and_said(tmp_path):
    query = "0, NVIDIA L40S, [N/A], [N/A]\n1, NVIDIA L40S, [N/A], [N/A]\n"
    text = detect(runner({"--query-gpu": query}), tmp_path)
    assert "nvidia-smi does not say; assumed" in text


@pytest.mark.parametrize(
    "texts", [{}, {"--query-gpu": ""}, {"--query-gpu": "No devices were found\n"}]
)
def test_a_machine_without_gpus_is_an_error_with_status_1(tmp_path, texts):
    with pytest.raises(MedhaError, match="no GPU found") as caught:
        detect(runner(texts), tmp_path)
    assert caught.value.exit_status == 1
    assert not isinstance(caught.value, UsageError)


def test_this_machine_is_asked_where_nothing_else_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MedhaError, match="no GPU found"):
        detect()
    assert detecting.run_command(("false",)) is None


def test_gpus_of_two_kinds_are_refused(tmp_path):
    query = "0, NVIDIA L40S, 4, 16\n1, NVIDIA H200, 5, 16\n"
    with pytest.raises(MedhaError, match="differ: NVIDIA H200, NVIDIA L40S"):
        detect(runner({"--query-gpu": query}), tmp_path)


def test_a_gpu_that_the_catalog_lacks_names_the_nearest(tmp_path):
    with pytest.raises(UnknownName, match=r"nearest: .*H100") as caught:
        detect(runner({"--query-gpu": "0, NVIDIA H100 80GB HBM4, 5, 16\n"}), tmp_path)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("parse", "text", "named"),
    [
        (parse_gpus, "0, NVIDIA H200\n", "0, NVIDIA H200"),
        (parse_gpus, "0, NVIDIA H200, 5, 16\n0, NVIDIA H200, 5, 16\n", "device 0 more than once"),
        (parse_matrix, "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tNV0\n", "NV0"),
        (parse_matrix, "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \n", "GPU0"),
        (parse_matrix, "\tGPU0\tGPU1\tCPU Affinity\nGPU0\t X \tFOO\n", "FOO"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(parse, text, named):
    with pytest.raises(MedhaError, match=named):
        parse(text)


def test_warnings_among_the_devices_are_passed_over():
    rows = parse_gpus("0, NVIDIA H200, 5, 16\nWARNING: infoROM is corrupted at gpu 0000:17:00.0\n")
    assert [each.name for each in rows] == ["NVIDIA H200"]


def test_other_text_has_no_matrix_no_links_and_no_ports(tmp_path):
    assert parse_matrix("nvidia-smi has failed\n").cells == {}
    assert parse_nvlinks("Unable to retrieve NVLink information\n") == {}
    assert parse_nvlinks("GPU 0: NVIDIA L40S\n\t Link 0: <inactive>\n") == {}
    assert read_ports(tmp_path) == ()


def test_a_device_that_the_matrix_leaves_out_is_said_where_it_is_put(tmp_path):
    query = "".join(f"{each}, NVIDIA H100 80GB HBM3, 5, 16\n" for each in range(3))
    text = detect(runner({**RECORDED_TWO, "--query-gpu": query}), tmp_path)
    assert "matrix of connections has no GPU2: it is taken to be under a CPU of its own" in text
    assert ("gpu2", "cpu1") in planned(text, tmp_path, 3).fabric.wires[1].joins


def test_a_matrix_may_begin_with_any_device(tmp_path):
    names = ["NIC0", "GPU1", "GPU0"]
    cells = parse_matrix(matrix(names, lambda row, column: "PIX", affinity)).cells
    assert cells["GPU0", "GPU1"] == cells["NIC0", "GPU0"] == "PIX"
    assert len(cells) == 9


def test_a_matrix_that_cannot_be_read_is_not_called_none(tmp_path):
    query = "0, NVIDIA L40S, 4, 16\n1, NVIDIA L40S, 4, 16\n"
    text = detect(runner({"--query-gpu": query, "-m": "topology: unsupported\n"}), tmp_path)
    assert "gave no matrix of connections that can be read" in text


def test_output_that_is_no_text_is_no_traceback():
    command = (sys.executable, "-c", "import sys; sys.stdout.buffer.write(b'0, \\xff, 5, 16')")
    assert detecting.run_command(command) == "0, \N{REPLACEMENT CHARACTER}, 5, 16"
