"""RMSNorm with SiLU in one pass over memory, for the VAE in half precision; knows nothing of convolutions.

The elementwise parts of a VAE decoder are bound by memory bandwidth. Eager torch moves 40 bytes per element: it casts
to float32, sums squares, divides, multiplies, applies SiLU, casts back and copies. One Triton kernel reads and writes
each element once, adds the bias of the previous convolution and the residual, and writes into the next convolution's
input: 1.36 ms where inductor's fusion of the plain code takes 1.48 (H200, 16 frames of 480 x 832 x 96). The plain code
computes the same in float32 and is the reference of the tests.

Legend: B batch, C channels, T frames, H and W rows and columns.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from codmd_serve.device import on_device
from codmd_serve.files import first_line

NORM_EPS = 1e-12
# The fastest of 2048, 4096 and 8192 with 4 and 8 warps on an H200: 2.8 TB/s alone, 3.6 with bias, residual and total.
ELEMENTS_PER_PROGRAM = 4096
NUM_WARPS = 8
NORM_SILU_TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@dataclass(frozen=True, slots=True)
class Sum:
    """A deferred sum value + bias + residual; the next kernel adds it.

    Attributes:
        value: (B, C, T, H, W), owned by the sum: it may be overwritten with the total.
        bias: (C,) float32, or None.
        residual: of the shape of `value`, only read, or None.
    """

    value: Tensor
    bias: Tensor | None = None
    residual: Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Return whether there is nothing to add."""
        return self.bias is None and self.residual is None


# (sum, weight (C,) float32 or None, where SiLU(RMSNorm(total) * weight) goes or None, keep_total) -> total or None
AddNormSilu = Callable[[Sum, Tensor | None, Tensor | None, bool], Tensor | None]


def add_norm_silu(given: Sum, weight: Tensor | None, out: Tensor | None, keep_total: bool) -> Tensor | None:
    """Add up, write SiLU(RMSNorm(total) * weight) to `out`, and return the total, in plain torch.

    Args:
        given: the sum; its value is overwritten.
        weight: (C,) float32, gamma * sqrt(C).
        out: of the shape of the value, any strides; None only adds up.
        keep_total: whether the total is wanted.
    """
    total = _added(given)
    if out is not None and weight is not None:
        factors = weight.reshape(1, -1, 1, 1, 1)
        if total.dtype != torch.float32:
            wide = total.float()
            length = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(NORM_EPS)
            out.copy_(functional.silu(wide.div_(length).mul_(factors), inplace=True))
        else:
            length = torch.linalg.vector_norm(total, dim=1, keepdim=True).clamp_min_(NORM_EPS)
            torch.div(total, length, out=out)
            functional.silu(out.mul_(factors), inplace=True)
    return total if keep_total else None


def _added(given: Sum) -> Tensor:
    if given.is_plain:
        return given.value
    if given.value.dtype == torch.float32:
        total = given.value
        if given.bias is not None:
            total = total.add_(given.bias.reshape(1, -1, 1, 1, 1))
        return total if given.residual is None else total.add_(given.residual)
    wide = given.value.float()
    if given.bias is not None:
        wide += given.bias.reshape(1, -1, 1, 1, 1)
    if given.residual is not None:
        wide += given.residual
    return given.value.copy_(wide)


def choose_add_norm_silu(device: torch.device, dtype: torch.dtype) -> tuple[AddNormSilu, str]:
    """Return the Triton kernel where it works, else the plain code and one sentence that says why.

    Float32 on a CPU takes the plain code without a word: nothing there runs Triton.
    """
    if device.type != "cuda":
        return add_norm_silu, ""
    if importlib.util.find_spec("triton") is None:
        return add_norm_silu, "VAE norms unfused: no package triton"
    try:
        error = _self_test(device, dtype)
    except Exception as problem:  # a compiler that is missing or broken raises anything
        return add_norm_silu, f"VAE norms unfused: {first_line(problem)}"
    if not error <= NORM_SILU_TOLERANCE[dtype]:
        return add_norm_silu, f"VAE norms unfused: the Triton kernel is {error:.2g} off"
    return add_norm_silu_triton, ""


@torch.no_grad()
def _self_test(device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference between the kernel and the plain code, on values around 1."""
    rng = torch.Generator(device).manual_seed(0)
    value, residual = (
        torch.randn(2, 96, 2, 4, 4, generator=rng, device=device).to(dtype, memory_format=torch.channels_last_3d)
        for _ in range(2)
    )
    bias, weight = (torch.randn(96, generator=rng, device=device) for _ in range(2))
    worst = 0.0
    outs, totals = [], []
    for run in (add_norm_silu, add_norm_silu_triton):
        out = torch.empty_like(value)
        total = run(Sum(value.clone(), bias, residual), weight, out, True)
        assert total is not None
        outs.append(out.float())
        totals.append(total.float())
    for first, second in (outs, totals):
        worst = max(worst, float(((first - second).abs() / (1 + first.abs())).max()))
    return worst


def add_norm_silu_triton(given: Sum, weight: Tensor | None, out: Tensor | None, keep_total: bool) -> Tensor | None:
    """Compute `add_norm_silu` in one kernel; value and residual are copied where their channels are not side by side.

    Raises:
        ValueError: `out` has channels that do not lie side by side, frame after frame.
    """
    if given.is_plain and out is None:
        return given.value
    # Convolutions choose the layout of what they return: of one frame, cuDNN's may come channels first.
    value, bias = channels_last(given.value), given.bias
    residual = None if given.residual is None else channels_last(given.residual)
    # Here: triton is a package of CUDA builds, and nothing else needs it.
    from codmd_serve.wan.triton_kernels import add_norm_silu_kernel

    batch, channels, frames, height, width = value.shape
    # A plain total is the value, and need not be written again.
    writes_total = keep_total and not given.is_plain
    strides = [size for t in (value, residual, out) for size in (row_strides(t) if t is not None else (0, 0))]
    num_rows = frames * height * width
    padded = 1 << (channels - 1).bit_length()
    rows_each = max(1, ELEMENTS_PER_PROGRAM // padded)
    with on_device(value.device):
        add_norm_silu_kernel[(-(-num_rows // rows_each), batch)](
            value,
            value if bias is None else bias,
            value if residual is None else residual,
            value if weight is None else weight,
            value if out is None else out,
            num_rows,
            channels,
            *strides,
            NORM_EPS,
            HAS_BIAS=bias is not None,
            HAS_RESIDUAL=residual is not None,
            HAS_TOTAL=writes_total,
            HAS_OUT=out is not None,
            WIDTH=padded,
            ROWS=rows_each,
            num_warps=NUM_WARPS,
        )
    return value if keep_total else None


def channels_last(tensor: Tensor) -> Tensor:
    """Return a (B, C, T, H, W) tensor as `row_strides` takes it: itself, or else a copy."""
    return tensor if _row_of(tensor) is not None else _copied(tensor)


def _copied(tensor: Tensor) -> Tensor:
    # Not contiguous(): of a tensor with one channel or one place it may say that nothing needs to be done.
    copied = torch.empty(
        (tensor.shape[0], *tensor.shape[2:], tensor.shape[1]), dtype=tensor.dtype, device=tensor.device
    ).movedim(-1, 1)
    return copied.copy_(tensor)


def row_strides(tensor: Tensor) -> tuple[int, int]:
    """Return the strides between videos and between positions of a (B, C, T, H, W) tensor, in elements.

    Raises:
        ValueError: its channels do not lie side by side, or its places not at equal distances.
    """
    row = _row_of(tensor)
    if row is None:
        raise ValueError(f"expected channels last, got strides {tensor.stride()} of {tuple(tensor.shape)}")
    return tensor.stride()[0], row


def _row_of(tensor: Tensor) -> int | None:
    """Return the stride between positions, or None where there is no one stride or the channels are apart."""
    _, channels, frames, height, width = tensor.shape
    strides = tensor.stride()
    # Where there is one column, rows tell the distance, and so on; more channels may be stored than there are.
    spans = ((width, 1, strides[4]), (height, width, strides[3]), (frames, height * width, strides[2]))
    row = next((stride // rows for size, rows, stride in spans if size > 1), channels)
    is_even = all(size == 1 or stride == rows * row for size, rows, stride in spans)
    return row if is_even and row >= channels and (channels == 1 or strides[1] == 1) else None
