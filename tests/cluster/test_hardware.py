"""GPU profiles: names as CUDA and Ray give them, and figures that belong together."""

from __future__ import annotations

import pytest
from ray._private.accelerators.nvidia_gpu import NvidiaGPUAcceleratorManager
from ray.util.accelerators import accelerators

from cluster.hardware import GIB, PROFILES, GpuProfile, profile_of


@pytest.mark.parametrize(
    ("device_name", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100-PCIe"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80G"),
        ("A100-SXM4-80GB", "A100-80G"),
        ("NVIDIA A100 80GB PCIe", "A100-80G-PCIe"),
        ("NVIDIA A100-SXM4-40GB", "A100-40G"),
        ("NVIDIA A100-PCIE-40GB", "A100-40G"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
    ],
)
def test_a_device_is_known_by_cudas_name(device_name: str, name: str) -> None:
    profile = profile_of(device_name)
    assert profile is not None
    assert profile.name == name


@pytest.mark.parametrize(
    "device_name",
    [
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GH200 480GB",
        "NVIDIA L40",
        "Tesla T4",
        "",
    ],
)
def test_a_namesake_with_less_is_not_taken_for_it(device_name: str) -> None:
    assert profile_of(device_name) is None


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_ray_finds_the_same_accelerator_type(profile: GpuProfile) -> None:
    for name in profile.device_names:
        found = NvidiaGPUAcceleratorManager._gpu_name_to_accelerator_type(f"NVIDIA {name}")
        assert found == profile.accelerator_type


def test_types_and_sizes_are_constants_of_ray_where_it_has_them() -> None:
    constants = {value for value in vars(accelerators).values() if isinstance(value, str)}
    assert {profile.accelerator_type for profile in PROFILES} - constants == {"GeForce-RTX-4090"}
    assert {"A100-40G", "A100-80G"} <= {profile.name for profile in PROFILES} & constants


def test_names_are_told_apart() -> None:
    names = [profile.name for profile in PROFILES]
    devices = [device for profile in PROFILES for device in profile.device_names]
    assert len(set(names)) == len(names)
    assert len({device.casefold() for device in devices}) == len(devices)


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.name)
def test_figures_are_plausible(profile: GpuProfile) -> None:
    """An order of magnitude is where a typing error shows: FLOPs a byte of today's GPUs lie between 100 and 500."""
    assert 20 * GIB < profile.memory_bytes < 150 * GIB
    assert 100 < profile.bf16_flops / profile.bandwidth_bytes_per_second < 500


def test_grouped_gemm_is_hoppers() -> None:
    assert {profile.name for profile in PROFILES if profile.grouped_gemm} == {"H100", "H100-PCIe", "H200"}
