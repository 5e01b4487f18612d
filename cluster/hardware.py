"""GPU types that Raysoner knows: memory, speed, and what Ray and CUDA call them. No torch, no ray.

Sources, all NVIDIA's: "H100 Tensor Core GPU" datasheet (SXM and PCIe), "H200 Tensor Core GPU" datasheet, "A100 Tensor
Core GPU" datasheet (80 GB) and "A100 Tensor Core GPU Architecture" whitepaper (40 GB), "L40S" datasheet, "Ada GPU
Architecture" whitepaper, appendix A (GeForce RTX 4090). FLOP/s are those of dense matrices with fp32 accumulation:
half of what the datasheets print "with sparsity". Links are NVLink where it joins all GPUs of a host, else PCI Express
(the datasheets' "Interconnect"; sixteen lanes of generation 4 for the RTX 4090), at half of what is printed, which is
both directions together. Compute capabilities: the CUDA C++ Programming Guide.

Memory is what CUDA leaves to programs, which is less than the name of the card says. It differs between drivers; the
table has the least, to a tenth of a GiB, of what PyTorch's out-of-memory messages in public reports give as the total
capacity.
"""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True)
class GpuProfile:
    """A GPU type. Its figures are ceilings, not measurements."""

    name: str
    """of this table; for an A100 the label that tells Ray its size, which must be put on a node by hand"""
    accelerator_type: str
    """what Ray finds out by itself and `accelerator_type` of a task asks for; sizes of one GPU share it"""
    device_names: tuple[str, ...]
    """as CUDA reports them, without the vendor in front"""
    memory_bytes: int
    """that CUDA reports"""
    bandwidth_bytes_per_second: float
    """of its memory"""
    bf16_flops: float
    """per second, dense, accumulated in fp32"""
    capability: tuple[int, int]
    """CUDA compute capability, major and minor"""
    link_bytes_per_second: float
    """to the other GPUs of its host, in one direction"""

    @property
    def grouped_gemm(self) -> bool:
        """PyTorch multiplies bf16 groups in one kernel here.

        Elsewhere, from capability 8.0 up, `torch.nn.functional.grouped_mm` waits for the device and runs one product
        after another (pytorch pull request 161407; issue 186620 says that this will stay).
        """
        return self.capability[0] in (9, 10)


PROFILES: tuple[GpuProfile, ...] = (
    GpuProfile("H100", "H100", ("H100 80GB HBM3",), int(79.1 * GIB), 3.35e12, 989.4e12, (9, 0), 450e9),
    GpuProfile("H100-PCIe", "H100", ("H100 PCIe",), int(79.1 * GIB), 2.0e12, 756e12, (9, 0), 64e9),
    GpuProfile("H200", "H200", ("H200",), int(139.7 * GIB), 4.8e12, 989.4e12, (9, 0), 450e9),
    GpuProfile(
        "A100-80G", "A100", ("A100-SXM4-80GB", "A100-SXM-80GB"), int(79.1 * GIB), 2.039e12, 312e12, (8, 0), 300e9
    ),
    GpuProfile("A100-80G-PCIe", "A100", ("A100 80GB PCIe",), int(79.1 * GIB), 1.935e12, 312e12, (8, 0), 32e9),
    GpuProfile(
        "A100-40G", "A100", ("A100-SXM4-40GB", "A100-PCIE-40GB"), int(39.3 * GIB), 1.555e12, 312e12, (8, 0), 300e9
    ),
    GpuProfile("L40S", "L40S", ("L40S",), int(44.3 * GIB), 864e9, 362.05e12, (8, 9), 32e9),
    GpuProfile(
        "RTX-4090", "GeForce-RTX-4090", ("GeForce RTX 4090",), int(23.5 * GIB), 1.008e12, 165.2e12, (8, 9), 32e9
    ),
)


def profile_of(device_name: str) -> GpuProfile | None:
    """The profile of a device by the name that CUDA reports, such as "NVIDIA H100 80GB HBM3".

    None for every other name: a slice of a GPU ("… MIG 1g.10gb"), a laptop's or a cut-down model is not its namesake.
    """
    name = re.sub(r"^NVIDIA\s+", "", device_name.strip(), flags=re.IGNORECASE).casefold()
    known = {own.casefold(): profile for profile in PROFILES for own in profile.device_names}
    return known.get(name)


def ask_driver(*fields: str) -> list[tuple[str, ...]]:
    """What `nvidia-smi` says of each GPU of this machine, numbers without units; nothing where there is no driver.

    Args:
        fields: of its `--query-gpu`.
    """
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [tuple(cell.strip() for cell in line.rsplit(",", len(fields) - 1)) for line in said.splitlines()]
