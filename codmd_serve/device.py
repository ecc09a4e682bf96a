"""Devices and dtypes by name, for both commands; knows no network."""

import contextlib

import torch

from codmd_serve.errors import ConfigError

# As serving spells them, and as training does.
DTYPES_BY_NAME = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def choose_device(name: str) -> torch.device:
    """Return the device of a name: auto (cuda where there is one), cpu, cuda or cuda:N.

    Raises:
        ConfigError: no such name, or no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    wanted = f"--device must be auto, cpu, cuda or cuda:N, got {name!r}"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(wanted) from None
    if device.type not in ("cpu", "cuda") or (device.type == "cpu" and device.index):
        raise ConfigError(wanted)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"no device {name}: this torch sees {torch.cuda.device_count()} CUDA devices")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name; auto is bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ConfigError: no such name.
    """
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES_BY_NAME:
        raise ConfigError(f"dtype must be one of auto, {', '.join(DTYPES_BY_NAME)}, got {name!r}")
    return DTYPES_BY_NAME[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    """Return whether `device` has instructions for matrix products in bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make a CUDA device the current one of this thread within the block; do nothing for another kind.

    torch's own operators follow their tensors. What Triton launches goes to the current device, which is the first one
    in every new thread.
    """
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
