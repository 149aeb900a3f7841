"""GPUs by name: the most they compute and what they hold. From the makers' data sheets, dense (no sparsity).

H100 (SXM)  https://www.nvidia.com/en-us/data-center/h100/
H200        https://www.nvidia.com/en-us/data-center/h200/
A100 (80 GB SXM)  https://www.nvidia.com/en-us/data-center/a100/
L40S        https://www.nvidia.com/en-us/data-center/l40s/
L4          https://www.nvidia.com/en-us/data-center/l4/
RTX 4090    https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf
"""

from dataclasses import dataclass

from ray_kd.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """What a model runs on."""

    name: str
    peak_flops: float
    """FLOP/s of dense bf16 products with fp32 sums."""
    nbytes: float | None
    """Memory; None where it is the host's."""
    peer_bandwidth: float
    """Bytes/s in each direction between the GPUs of a node: NVLink, or PCIe where there is none."""


DEVICES = {
    device.name: device
    for device in (
        Device("H100", 989.4e12, 80e9, 450e9),
        Device("H200", 989.4e12, 141e9, 450e9),
        Device("A100", 312e12, 80e9, 300e9),
        Device("L40S", 362e12, 48e9, 32e9),
        Device("L4", 121e12, 24e9, 32e9),
        Device("RTX4090", 165.2e12, 24e9, 32e9),
    )
}


def device_of(name: str, option: str) -> Device:
    """The device of that name, however it is spelled. Raises ConfigError for one that is not in the table."""
    wanted = "".join(filter(str.isalnum, name)).upper()
    if wanted not in DEVICES:
        raise ConfigError(f"{option} is '{name}': allowed is {' | '.join(DEVICES)}, or --flops")
    return DEVICES[wanted]
