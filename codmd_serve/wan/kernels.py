"""Chooses the attention kernel: checks and times every installed one at load, and takes the fastest correct one.

Lossy kernels run only when named, and have a tolerance of their own. Names are those of diffusers' attention
dispatcher. Knows shapes, but neither prompts nor sampling.

Legend: B batch (1 here), N tokens, L prompt positions, G heads, E width of a head.
"""

import functools
import importlib
import importlib.util
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.attention import NUM_PROMPT_POSITIONS, pad_logit_bias
from codmd_serve.wan.transformer import Attend, sdpa

AUTO = "auto"
MATH = "_native_math"
# torch's own kernels; diffusers calls them too, but hands cuDNN copies where strided views do.
TORCH_KERNELS = {
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    MATH: SDPBackend.MATH,
}
PACKAGES = {
    "flash_4": "flash_attn.cute",
    "_flash_3": "flash_attn_interface",
    "flash_4_hub": "kernels",
    "_flash_3_hub": "kernels",
    "flash": "flash_attn.flash_attn_interface",
    "xformers": "xformers",
    "sage": "sageattention",
}
# FlashAttention-3 and -4, called as they are, in our layout: module and function, or repository on the hub and version.
# The hub's are built by its trusted publisher and fetched at the first load, where the package `kernels` is installed.
FLASH_PACKAGES = {"flash_4": "flash_attn.cute", "_flash_3": "flash_attn_interface"}
FLASH_ON_HUB = {
    "flash_4_hub": ("kernels-community/flash-attn4", 0),
    "_flash_3_hub": ("kernels-community/flash-attn3", 1),
}
# 8-bit on purpose: never chosen, only taken by name.
LOSSY = ("sage",)
# Of two that are equally fast the first is taken, so that two starts choose the same one and give the same video.
KNOWN = (
    "native",
    "_native_cudnn",
    "flash_4",
    "_flash_3",
    "flash_4_hub",
    "_flash_3_hub",
    "flash",
    "_native_flash",
    "xformers",
    "_native_efficient",
    MATH,
    *LOSSY,
)
EQUALLY_FAST = 1.05
ON_CPU = ("native", "_native_flash", MATH)
NUM_ROWS_CHECKED = 64
NUM_PROMPT_POSITIONS_MEASURED = 64
NUM_RUNS = 5
# Root mean square of the error over that of the output. Rounding the output alone is a quarter of it (bfloat16:
# eps / sqrt(12) = .0023, and as much again for the rounded weights); a lost key block or bias is above 0.1.
KERNEL_TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float32: 1e-4}
# 8-bit integers for queries and keys are .015 off, 8-bit floats for weights and values .037 (both rounded by .026).
LOSSY_TOLERANCE = 6e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionShape:
    """Shape of the network's attention: N tokens, G heads of width E, `num_positions` prompt positions in training."""

    num_tokens: int
    num_heads: int
    head_width: int
    num_positions: int = NUM_PROMPT_POSITIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelTiming:
    """Timing of one kernel on one shape.

    Attributes:
        name: as diffusers' dispatcher calls it.
        self_ms: median milliseconds of self-attention; None when it cannot, or gives wrong numbers.
        prompt_ms: the same for attention to a prompt, whose logits carry a bias.
        problem: why one of them is None, in one line; empty when neither is.
    """

    name: str
    self_ms: float | None
    prompt_ms: float | None
    problem: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenAttention:
    """The chosen kernel, its display name (`self` or `self+prompt`), and the timings."""

    attend: Attend
    name: str
    table: tuple[KernelTiming, ...]


def installed_kernels(device: torch.device) -> tuple[str, ...]:
    """Return the names of the kernels that may run on `device`, in order of preference."""
    if device.type == "cpu":
        return ON_CPU
    return tuple(name for name in KNOWN if name not in PACKAGES or _has_package(PACKAGES[name]))


def _has_package(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except Exception:  # a parent package that is missing, or built for another torch
        return False


def kernel(name: str) -> Attend:
    """Return the attention function of a known name; it may fail when called."""
    if name == "native":
        return sdpa
    if name in TORCH_KERNELS:
        return _torch_kernel(TORCH_KERNELS[name])
    if name == "sage":
        # Its kernels cannot be traced: compiled blocks are left for them and entered again.
        attend_sage: Attend = torch.compiler.disable(_sage)  # type: ignore[no-untyped-call]
        return attend_sage
    if name in FLASH_PACKAGES or name in FLASH_ON_HUB:
        # Compiled by CuTe or bound from C++: left out of what is traced, as above.
        attend_flash: Attend = torch.compiler.disable(_flash(name))  # type: ignore[no-untyped-call]
        return attend_flash
    backend = AttentionBackendName(name)

    def attend(query: Tensor, key: Tensor, value: Tensor, logit_bias: Tensor | None) -> Tensor:
        out: Tensor = dispatch_attention_fn(query, key, value, attn_mask=logit_bias, backend=backend)
        return out

    return attend


def _torch_kernel(backend: SDPBackend) -> Attend:
    def attend(query: Tensor, key: Tensor, value: Tensor, logit_bias: Tensor | None) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(query, key, value, logit_bias)

    return attend


def _flash(name: str) -> Attend:
    """FlashAttention-3 or -4: (B, N, G, E) in and out, any strides but of the last dimension, no bias."""

    def attend(query: Tensor, key: Tensor, value: Tensor, logit_bias: Tensor | None) -> Tensor:
        if logit_bias is not None:
            raise ConfigError(f"{name} takes no logit bias")
        out = _flash_function(name)(query, key, value)
        first: Tensor = out[0] if isinstance(out, tuple) else out  # some versions give the log-sum-exp as well
        return first

    return attend


@functools.cache
def _flash_function(name: str) -> Callable[..., Any]:
    if name in FLASH_PACKAGES:
        module: Any = importlib.import_module(FLASH_PACKAGES[name])
    else:
        repository, version = FLASH_ON_HUB[name]
        module = importlib.import_module("kernels").get_kernel(repository, version=version)
    function: Callable[..., Any] = module.flash_attn_func
    return function


def _sage(query: Tensor, key: Tensor, value: Tensor, logit_bias: Tensor | None) -> Tensor:
    """SageAttention's own choice for the device; called directly, because diffusers refuses the version on PyPI."""
    if logit_bias is not None:
        raise ConfigError("SageAttention takes no logit bias")
    from sageattention import sageattn

    out: Tensor = sageattn(query, key, value, tensor_layout="NHD", is_causal=False)
    return out


def check_attention_name(name: str, device: torch.device) -> None:
    """Refuse a kernel that is unknown or not installed.

    Raises:
        ConfigError: says which are known and which are installed.
    """
    installed = installed_kernels(device)
    if name != AUTO and name not in installed:
        state = "is not installed" if name in KNOWN else "is unknown"
        raise ConfigError(
            f"attention {name!r} {state} for {device.type}; known: {AUTO}, {', '.join(KNOWN)}; "
            f"installed: {', '.join(installed)}"
        )


def choose_attention(
    name: str,
    shape: AttentionShape,
    device: torch.device,
    dtype: torch.dtype,
    verdicts: Verdicts | None = None,
) -> ChosenAttention:
    """Choose the fastest correct kernel on the served shape.

    Args:
        name: auto or a kernel; auto is never a lossy one. On a CPU auto is `native`, without a race: there a video has
            to be the same bytes after every start, and two kernels that are nearly as fast would win in turn.
        shape: of the video that is served most.
        device, dtype: of the network.
        verdicts: of earlier loads; with one, auto checks that kernel alone. None remembers nothing.

    Returns:
        A function that uses one kernel for self-attention and one for attention with a logit bias, which not all take.

    Raises:
        ConfigError: an unknown kernel, or one that does not work here or gives wrong numbers.
    """
    check_attention_name(name, device)
    remembered = _remembered(name, shape, device, dtype, verdicts)
    if remembered is not None:
        return remembered
    named = ("native",) if name == AUTO and device.type == "cpu" else (name,)
    may_choose = tuple(n for n in installed_kernels(device) if n != MATH and n not in LOSSY)
    candidates = may_choose if named == (AUTO,) else named
    table = measure_kernels(candidates, shape, device, dtype)
    own = _fastest(table, [entry.self_ms for entry in table])
    if own is None:
        problems = "; ".join(f"{entry.name}: {entry.problem}" for entry in table)
        raise ConfigError(f"no attention kernel works at {shape.num_tokens} tokens in {dtype}: {problems}")
    prompt = _fastest(table, [entry.prompt_ms for entry in table])
    if prompt is None:
        # The named kernel takes no bias: attention to the prompt, 1 % of the work, goes to one that does.
        others = tuple(n for n in may_choose if n not in candidates)
        more = measure_kernels(others, shape, device, dtype)
        table += more
        prompt = _fastest(more, [entry.prompt_ms for entry in more])
    if prompt is None:
        raise ConfigError(f"no attention kernel takes the logit bias of prompts in {dtype} on {device.type}")
    if name == AUTO and verdicts is not None:
        verdicts.put("attention", own)
    return ChosenAttention(
        attend=_self_or_prompt(own, prompt), name=own if own == prompt else f"{own}+{prompt}", table=table
    )


def _remembered(
    name: str, shape: AttentionShape, device: torch.device, dtype: torch.dtype, verdicts: Verdicts | None
) -> ChosenAttention | None:
    """Return the cached fastest kernel of an earlier load, checked again; None where there is none."""
    if name != AUTO or verdicts is None:
        return None
    known = verdicts.get("attention", tuple(n for n in installed_kernels(device) if n not in LOSSY))
    if known is None:
        return None
    try:
        return choose_attention(known, shape, device, dtype)
    except ConfigError:  # worked once, and does not any more: raced anew
        return None


def _self_or_prompt(own: str, prompt: str) -> Attend:
    attend_self, attend_prompt = kernel(own), kernel(prompt)
    if own == prompt:
        return attend_self

    def attend(query: Tensor, key: Tensor, value: Tensor, logit_bias: Tensor | None) -> Tensor:
        chosen = attend_self if logit_bias is None else attend_prompt
        return chosen(query, key, value, logit_bias)

    return attend


def _fastest(table: Sequence[KernelTiming], times_ms: Sequence[float | None]) -> str | None:
    working = [(entry.name, ms) for entry, ms in zip(table, times_ms, strict=True) if ms is not None]
    if not working:
        return None
    least_ms = min(ms for _, ms in working)
    return next(name for name, ms in working if ms <= EQUALLY_FAST * least_ms)


@torch.no_grad()
def measure_kernels(
    names: Sequence[str], shape: AttentionShape, device: torch.device, dtype: torch.dtype
) -> tuple[KernelTiming, ...]:
    """Check and time kernels on random (1, N, G, E) queries, strided as the network makes them.

    Returns:
        One entry per name, in the order given. Nothing is raised for a kernel that fails: its entry says why.
    """
    rng = torch.Generator(device).manual_seed(0)

    def drawn(length: int, parts: int) -> tuple[Tensor, ...]:
        # Side by side in one tensor, as the fused projection leaves them.
        size = (1, length, parts, shape.num_heads, shape.head_width)
        return torch.randn(size, generator=rng, device=device).to(dtype).unbind(2)

    query, key, value = drawn(shape.num_tokens, 3)
    num_prompt = min(NUM_PROMPT_POSITIONS_MEASURED, shape.num_positions)
    prompt_key, prompt_value = drawn(num_prompt, 2)
    bias = pad_logit_bias(num_prompt, shape.num_positions, like=query)[None, None, None]
    entries = []
    for name in names:
        attend = kernel(name)
        tolerance = LOSSY_TOLERANCE if name in LOSSY else KERNEL_TOLERANCE[dtype]
        self_ms, self_problem = _tried(attend, tolerance, query, key, value, None)
        prompt_ms, prompt_problem = _tried(attend, tolerance, query, prompt_key, prompt_value, bias)
        problem = self_problem or (prompt_problem and f"not for prompts: {prompt_problem}")
        entries.append(KernelTiming(name=name, self_ms=self_ms, prompt_ms=prompt_ms, problem=problem))
    return tuple(entries)


def _tried(
    attend: Attend, tolerance: float, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None
) -> tuple[float | None, str]:
    with warnings.catch_warnings():
        # torch says in five warnings why it will not run a kernel, before it raises.
        warnings.simplefilter("ignore")
        try:
            error = _max_error(attend(query, key, value, bias), query, key, value, bias)
            if not error <= tolerance:
                return None, f"wrong numbers, relative error {error:.2g}"
            return _median_ms(lambda: attend(query, key, value, bias), query.device), ""
        except Exception as error:  # packages raise anything, and a kernel that cannot is not a failure of ours
            return None, first_line(error)


def _max_error(out: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> float:
    """Return the relative error of some rows, first and last among them, against the math kernel in float32.

    Not of all: at 32,760 tokens and 12 heads the math kernel would write 51 GB of logits.
    """
    if out.shape != query.shape:
        return float("inf")
    num_rows = min(NUM_ROWS_CHECKED, query.shape[1])
    rows = torch.linspace(0, query.shape[1] - 1, num_rows, device=query.device).round().long()
    wide_bias = None if bias is None else bias.float()
    want = kernel(MATH)(query[:, rows].float(), key.float(), value.float(), wide_bias)
    return float((out[:, rows].float() - want).norm() / want.norm())


def _median_ms(run: Callable[[], object], device: torch.device) -> float:
    times_s = []
    for _ in range(NUM_RUNS):
        _synchronize(device)
        start_s = time.perf_counter()
        run()
        _synchronize(device)
        times_s.append(time.perf_counter() - start_s)
    return 1000 * statistics.median(times_s)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
