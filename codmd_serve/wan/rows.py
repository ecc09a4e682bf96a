"""Elementwise and norm operations of the transformer between its matrix products: plain, or fused by Triton.

Eager torch reads 32,760 tokens several times for every norm. A step of Wan 1.3B on an H200 takes 605 ms plain,
516 compiled by inductor, whose reductions read a row twice, and 496 with these kernels, which read it once and write it
once (10 of them saved by GELU in the epilogue of its matrix product). The plain code is the reference of the tests, and
what a CPU runs.

Legend: B batch, N tokens, D width, P parts (query and key), G heads, E width of a head.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from codmd_serve.device import on_device
from codmd_serve.files import first_line

ROW_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
WIDE_ROW = 4096  # elements from which a program takes 8 warps


@dataclass(frozen=True, slots=True)
class RowOps:
    """The operations, plain or fused.

    Attributes:
        add_norm: (hidden (B, N, D), update or None, gate (D,) or None, weight (D,) or None, bias, eps) to the total
            hidden + gate * update and LayerNorm(total) * weight + bias; without a weight the total twice.
        norm_rotate: (features (B, N, P, D), weight (P, D), eps, G, table (1, N, 1, E/2, 2) or None) to RMSNorm, turned
            by the table, (B, N, P, G, E).
        linear_gelu: GELU of a linear layer, in the tanh form.
        is_fused: whether these are the Triton kernels.
    """

    add_norm: Callable[
        [Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]
    ]
    norm_rotate: Callable[[Tensor, Tensor, float, int, Tensor | None], Tensor]
    linear_gelu: Callable[[nn.Module, Tensor], Tensor]
    is_fused: bool


def add_norm(
    hidden: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `RowOps.add_norm` in plain torch; gate, weight and bias are float32."""
    total = hidden
    if update is not None:
        total = hidden + update if gate is None else _gated(hidden, update, gate)
    return total, total if weight is None or bias is None else layer_norm(total, weight, bias, eps)


def norm_rotate(features: Tensor, weight: Tensor, eps: float, num_heads: int, table: Tensor | None) -> Tensor:
    """Compute `RowOps.norm_rotate` in plain torch; rotated in float32."""
    if table is None:
        return split_last(rms_norm(features, weight, eps), num_heads, -1)
    pairs = split_last(rms_norm(features, weight, eps, keep_float32=True), num_heads, -1, 2)
    return rotated(pairs, table[:, :, None]).flatten(-2).to(features.dtype)


def linear_gelu(layer: nn.Module, features: Tensor) -> Tensor:
    """Compute `RowOps.linear_gelu` in plain torch."""
    return functional.gelu(layer(features), approximate="tanh")


def split_last(features: Tensor, *sizes: int) -> Tensor:
    """Split the last dimension into several."""
    return features.reshape(*features.shape[:-1], *sizes)


def layer_norm(hidden: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Apply LayerNorm in float32, returned in the dtype of `hidden`; weight and bias are float32."""
    normed = functional.layer_norm(hidden.float(), weight.shape, weight.float(), bias.float(), eps)
    return normed.to(hidden.dtype)


def rms_norm(features: Tensor, weight: Tensor, eps: float, keep_float32: bool = False) -> Tensor:
    """Apply RMSNorm in float32 over the last dimension: torch's own is six operators on a CPU, this one is three."""
    wide = features.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = (length.square_() * (1.0 / wide.shape[-1])).add_(eps).rsqrt_()
    normed: Tensor = (wide * scale).mul_(weight)
    return normed if keep_float32 else normed.to(features.dtype)


def rotated(pairs: Tensor, table: Tensor) -> Tensor:
    """Rotate (..., 2) pairs of channels by the angles whose cosine and sine are in (..., 2) `table`."""
    if torch.compiler.is_compiling():
        # The compiler has no complex numbers: it would leave the fusion around every one of them.
        (first, second), (cos, sin) = pairs.unbind(-1), table.unbind(-1)
        return torch.stack([first * cos - second * sin, first * sin + second * cos], -1)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(table))


def _gated(hidden: Tensor, update: Tensor, gate: Tensor) -> Tensor:
    """Return hidden + gate * update, in float32, cast to the dtype of `hidden`."""
    if hidden.dtype == torch.float32:
        return torch.addcmul(hidden, update, gate)
    return torch.addcmul(hidden.float(), update.float(), gate).to(hidden.dtype)


def add_norm_triton(
    hidden: Tensor,
    update: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Compute `RowOps.add_norm` in one kernel."""
    has_out = weight is not None and bias is not None
    if update is None and not has_out:
        return hidden, hidden
    # Here: triton is a package of CUDA builds, and nothing else needs it.
    from codmd_serve.wan.triton_kernels import add_layer_norm_kernel

    hidden = hidden.contiguous()
    update = update if update is None else update.contiguous()
    width = hidden.shape[-1]
    total = hidden if update is None else torch.empty_like(hidden)
    out = torch.empty_like(hidden) if has_out else total
    padded = 1 << (width - 1).bit_length()
    with on_device(hidden.device):
        add_layer_norm_kernel[(hidden.numel() // width,)](
            hidden,
            hidden if update is None else update,
            hidden if gate is None else gate,
            hidden if weight is None else weight,
            hidden if bias is None else bias,
            total,
            out,
            width,
            eps,
            HAS_UPDATE=update is not None,
            HAS_GATE=gate is not None,
            HAS_OUT=has_out,
            WIDTH=padded,
            num_warps=_num_warps(padded),
        )
    return total, out


def norm_rotate_triton(features: Tensor, weight: Tensor, eps: float, num_heads: int, table: Tensor | None) -> Tensor:
    """Compute `RowOps.norm_rotate` in one kernel."""
    from codmd_serve.wan.triton_kernels import norm_rotate_kernel

    batch, tokens, parts, width = features.shape
    if features.stride(3) != 1 or features.stride(0) != tokens * features.stride(1):
        features = features.contiguous()
    out = torch.empty(batch, tokens, parts, width, dtype=features.dtype, device=features.device)
    padded = 1 << (width - 1).bit_length()
    with on_device(features.device):
        norm_rotate_kernel[(batch * tokens, parts)](
            features,
            weight,
            features if table is None else table,
            out,
            tokens,
            parts,
            width,
            width // num_heads,
            features.stride(1),
            features.stride(2),
            eps,
            HAS_TABLE=table is not None,
            WIDTH=padded,
            num_warps=_num_warps(padded),
        )
    return split_last(out, num_heads, -1)


def _num_warps(padded: int) -> int:
    return 8 if padded > WIDE_ROW else 4


def linear_gelu_epilogue(layer: nn.Module, features: Tensor) -> Tensor:
    """Fuse `RowOps.linear_gelu` into cuBLASLt's epilogue; layers other than nn.Linear take the plain code."""
    if type(layer) is not nn.Linear:
        return linear_gelu(layer, features)
    rows = features.reshape(-1, features.shape[-1])
    out = torch._addmm_activation(layer.bias, rows, layer.weight.t(), use_gelu=True)
    return out.reshape(*features.shape[:-1], -1)


PLAIN = RowOps(add_norm, norm_rotate, linear_gelu, False)
FUSED = RowOps(add_norm_triton, norm_rotate_triton, linear_gelu_epilogue, True)


def choose_rows(device: torch.device, dtype: torch.dtype) -> tuple[RowOps, str]:
    """Return the fused operations where they work, else the plain ones and one sentence that says why."""
    if device.type != "cuda":
        return PLAIN, ""
    if importlib.util.find_spec("triton") is None:
        return PLAIN, "norms unfused: no package triton"
    try:
        error = self_test(FUSED, device, dtype)
    except Exception as problem:  # a compiler that is missing or broken raises anything
        return PLAIN, f"norms unfused: {first_line(problem)}"
    if not error <= ROW_TOLERANCE[dtype]:
        return PLAIN, f"norms unfused: the Triton kernels are {error:.2g} off"
    return FUSED, ""


@torch.no_grad()
def self_test(ops: RowOps, device: torch.device, dtype: torch.dtype) -> float:
    """Return the largest difference from the plain code, on values around 1."""
    rng = torch.Generator(device).manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, device=device)

    hidden, update, qkv = (drawn(1, 5, width).to(dtype) for width in (192, 192, 576))
    gate, weight, bias, table, both = drawn(192), drawn(192), drawn(192), drawn(1, 5, 1, 32, 2), drawn(2, 192)
    layer = nn.Linear(192, 64, device=device, dtype=dtype)
    results = [
        [
            *run.add_norm(hidden, update, gate, weight, bias, 1e-6),
            *run.add_norm(hidden, update, None, None, None, 1e-6),
            run.norm_rotate(split_last(qkv, 3, -1)[:, :, :2], both, 1e-6, 3, table),
            run.norm_rotate(hidden[:, :, None], both[:1], 1e-6, 3, None),
            run.linear_gelu(layer, hidden),
        ]
        for run in (PLAIN, ops)
    ]
    pairs = zip(*results, strict=True)
    return max(float(((want.float() - got.float()).abs() / (1 + want.float().abs())).max()) for want, got in pairs)
