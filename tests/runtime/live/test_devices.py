"""A plan that runs on another device than it was made for says so."""

import pytest
import torch
from builders import make_plan
from msgspec import structs

from runtime.parallel.devices import other_devices, warning

NAMES = {
    "a100-sxm-80gb": "NVIDIA A100-SXM4-80GB",
    "a100-pcie-80gb": "NVIDIA A100 80GB PCIe",
    "b200-sxm-180gb": "NVIDIA B200",
    "h100-sxm-80gb": "NVIDIA H100 80GB HBM3",
    "h100-nvl-94gb": "NVIDIA H100 NVL",
    "h200-sxm-141gb": "NVIDIA H200",
    "l40s-48gb": "NVIDIA L40S",
}


@pytest.mark.parametrize("planned", NAMES)
def test_a_device_is_known_by_its_product(planned):
    product = planned.split("-")[0]
    alike = {name for each, name in NAMES.items() if each.split("-")[0] == product}
    assert set(other_devices(planned, list(NAMES.values()))) == set(NAMES.values()) - alike


def test_other_devices_are_named_once_before_anything_loads(monkeypatch):
    plan = make_plan()
    plan = structs.replace(plan, topology=structs.replace(plan.topology, device="h200-sxm-141gb"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(
        torch.cuda, "get_device_name", lambda at: "NVIDIA H200" if at == 1 else "NVIDIA L40S"
    )
    said = warning(plan)
    assert said.count("NVIDIA L40S") == 1
    assert "h200-sxm-141gb" in said
    assert "NVIDIA H200" not in said


def test_a_plan_of_cpus_has_nothing_to_say(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("looked for GPUs"))
    plan = make_plan()
    plan = structs.replace(plan, topology=structs.replace(plan.topology, device="cpu"))
    assert warning(plan) == ""
