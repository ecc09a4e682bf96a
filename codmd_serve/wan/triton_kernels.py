"""The Triton kernels of `fused` and `rows`; importing this module needs the package triton."""

import triton
import triton.language as tl


@triton.jit
def add_norm_silu_kernel(  # type: ignore[no-untyped-def]
    value,
    bias,
    residual,
    weight,
    out,
    num_rows,
    channels,
    value_stride,
    value_row,
    residual_stride,
    residual_row,
    out_stride,
    out_row,
    eps,
    HAS_BIAS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    HAS_TOTAL: tl.constexpr,
    HAS_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of channels: add bias and residual, store the total, store SiLU(RMSNorm(total) * weight).

    Program (i, b) takes ROWS rows of video b from row i * ROWS on; WIDTH is a power of two of at least `channels`.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    video = tl.program_id(1).to(tl.int64)
    is_channel = column < channels
    inside = (row < num_rows)[:, None] & is_channel[None, :]
    # 64 bits: a full-size activation can pass 2^31 elements.
    value_place = value + video * value_stride + row[:, None] * value_row + column[None, :]
    total = tl.load(value_place, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        total += tl.load(bias + column, mask=is_channel, other=0.0).to(tl.float32)[None, :]
    if HAS_RESIDUAL:
        residual_place = residual + video * residual_stride + row[:, None] * residual_row + column[None, :]
        total += tl.load(residual_place, mask=inside, other=0.0).to(tl.float32)
    # Rounded before the norm, as the plain code does.
    rounded = total.to(value.dtype.element_ty)
    if HAS_TOTAL:
        tl.store(value_place, rounded, mask=inside)
    if HAS_OUT:
        wide = rounded.to(tl.float32)
        length = tl.maximum(tl.sqrt(tl.sum(wide * wide, axis=1)), eps)
        factors = tl.load(weight + column, mask=is_channel, other=0.0).to(tl.float32)
        scaled = wide / length[:, None] * factors[None, :]
        activated = scaled / (1.0 + tl.exp(-scaled))
        out_place = out + video * out_stride + row[:, None] * out_row + column[None, :]
        tl.store(out_place, activated.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_layer_norm_kernel(  # type: ignore[no-untyped-def]
    hidden,
    update,
    gate,
    weight,
    bias,
    total,
    out,
    width,
    eps,
    HAS_UPDATE: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row per program: total = hidden + gate * update, out = LayerNorm(total) * weight + bias."""
    column = tl.arange(0, WIDTH)
    inside = column < width
    place = tl.program_id(0).to(tl.int64) * width + column
    summed = tl.load(hidden + place, mask=inside, other=0.0)
    if HAS_UPDATE:
        added = tl.load(update + place, mask=inside, other=0.0).to(tl.float32)
        if HAS_GATE:
            added = added * tl.load(gate + column, mask=inside, other=0.0).to(tl.float32)
        # Rounded before the norm, as the plain code does.
        summed = (summed.to(tl.float32) + added).to(total.dtype.element_ty)
        tl.store(total + place, summed, mask=inside)
    if HAS_OUT:
        wide = summed.to(tl.float32)
        centred = tl.where(inside, wide - tl.sum(wide, axis=0) / width, 0.0)
        scale = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
        factors = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
        offset = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + place, (centred * scale * factors + offset).to(out.dtype.element_ty), mask=inside)


@triton.jit
def norm_rotate_kernel(  # type: ignore[no-untyped-def]
    features,
    weight,
    table,
    out,
    num_tokens,
    num_parts,
    width,
    head_width,
    token_stride,
    part_stride,
    eps,
    HAS_TABLE: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row per program: RMSNorm over all heads, then pairs of channels turned by the angles of the token."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    column = tl.arange(0, WIDTH)
    inside = column < width
    row = tl.load(features + token * token_stride + part * part_stride + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(row * row, axis=0) / width + eps)
    normed = row * scale * tl.load(weight + part * width + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_TABLE:
        # A video's tokens repeat for every video of the batch; all heads share the angles.
        pair = tl.arange(0, WIDTH // 2)
        angle = table + (token % num_tokens) * head_width + 2 * (pair % (head_width // 2))
        is_pair = 2 * pair < width
        cosine = tl.load(angle, mask=is_pair, other=0.0)
        sine = tl.load(angle + 1, mask=is_pair, other=0.0)
        first, second = tl.split(tl.reshape(normed, (WIDTH // 2, 2)))
        turned = tl.join(first * cosine - second * sine, first * sine + second * cosine)
        normed = tl.reshape(turned, (WIDTH,))
    place = (token * num_parts + part) * width + column
    tl.store(out + place, normed.to(out.dtype.element_ty), mask=inside)
