"""Choosing attention: wrong and failing kernels are refused, the fastest right one wins."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan import kernels
from codmd_serve.wan.attention import pad_logit_bias
from codmd_serve.wan.kernels import AttentionShape, choose_attention, installed_kernels, kernel, measure_kernels
from codmd_serve.wan.transformer import Attend, sdpa

CPU = torch.device("cpu")
SHAPE = AttentionShape(num_tokens=70, num_heads=2, head_width=16)


def slow(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    for _ in range(300):  # far slower than one, however busy the machine is
        sdpa(query, key, value, bias)
    return sdpa(query, key, value, bias)


def without_last_key(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return sdpa(query, key[:, :-1], value[:, :-1], None if bias is None else bias[..., :-1])


def without_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return sdpa(query, key, value, None)


def without_scale(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return sdpa(4 * query, key, value, bias)


def refuses_bias(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    if bias is not None:
        raise ValueError("`attn_mask` is not supported\nand more")
    return sdpa(query, key, value, bias)


def not_a_number(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return query * float("nan")


def another_shape(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return query[:, :-1]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let these functions be the kernels of the machine, under their own names, as if on a device with a race."""

    def installed(*functions: Attend) -> None:
        fakes = {function.__name__: function for function in functions}  # type: ignore[attr-defined]
        real = kernels.kernel
        monkeypatch.setattr(kernels, "kernel", lambda name: fakes.get(name) or real(name))
        monkeypatch.setattr(kernels, "installed_kernels", lambda _: tuple(fakes))

    return installed


class RacingDevice:
    """The CPU, but for the rule that nothing races there."""

    type = "cuda"


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], kernels.ChosenAttention]:
    measure = kernels.measure_kernels
    monkeypatch.setattr(kernels, "measure_kernels", lambda names, shape, _, dtype: measure(names, shape, CPU, dtype))
    return lambda name: choose_attention(name, SHAPE, RacingDevice(), torch.float32)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", kernels.ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_kernel_of_a_cpu_is_right(name: str, dtype: torch.dtype) -> None:
    (entry,) = measure_kernels([name], SHAPE, CPU, dtype)
    assert entry.self_ms is not None and entry.prompt_ms is not None and entry.problem == ""


def test_a_kernel_equals_the_formula_with_bias() -> None:
    query, key, value = torch.randn(3, 1, 9, 2, 8).unbind(0)
    bias = pad_logit_bias(9, 512, like=query)[None, None, None]
    logits = torch.einsum("bnge,bmge->bgnm", query, key) / 8**0.5 + bias
    want = torch.einsum("bgnm,bmge->bnge", logits.softmax(-1), value)
    for name in kernels.ON_CPU:
        torch.testing.assert_close(kernel(name)(query, key, value, bias), want)


@pytest.mark.parametrize("wrong", [without_last_key, without_scale, not_a_number, another_shape])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_numbers_are_refused(install: Callable[..., None], wrong: Attend, dtype: torch.dtype) -> None:
    install(wrong)
    (entry,) = measure_kernels([wrong.__name__], SHAPE, CPU, dtype)  # type: ignore[attr-defined]
    assert entry.self_ms is None and "wrong numbers, relative error" in entry.problem


def test_the_fastest_right_kernel_is_taken(
    install: Callable[..., None], chosen: Callable[[str], kernels.ChosenAttention]
) -> None:
    install(slow, without_last_key, refuses_bias)
    # The fastest is wrong, and the next one takes no bias: prompts go to the slow one.
    taken = chosen("auto")
    assert taken.name == "refuses_bias+slow"
    assert [entry.name for entry in taken.table] == ["slow", "without_last_key", "refuses_bias"]
    assert taken.table[2].problem == "not for prompts: ValueError: `attn_mask` is not supported"
    query, bias = torch.randn(1, 5, 2, 8), torch.zeros(1, 1, 1, 5)
    assert torch.equal(taken.attend(query, query, query, bias), taken.attend(query, query, query, None))


def test_one_that_ignores_the_bias_is_not_used_for_prompts(
    install: Callable[..., None], chosen: Callable[[str], kernels.ChosenAttention]
) -> None:
    install(without_bias, slow)
    assert chosen("auto").name == "without_bias+slow"


def test_of_equally_fast_ones_the_first_is_taken() -> None:
    entries = [
        kernels.KernelTiming(name=name, self_ms=ms, prompt_ms=None, problem="")
        for name, ms in (("a", 1.2), ("b", 1.04), ("c", 1.0), ("d", None))
    ]
    assert kernels._fastest(entries, [entry.self_ms for entry in entries]) == "b"
    assert kernels._fastest(entries, [None] * 4) is None


def test_a_named_kernel_is_used_though_another_is_faster(
    install: Callable[..., None], chosen: Callable[[str], kernels.ChosenAttention]
) -> None:
    install(refuses_bias, slow)
    assert chosen("slow").name == "slow"
    assert chosen("refuses_bias").name == "refuses_bias+slow"


def test_a_named_kernel_that_is_wrong_is_refused(
    install: Callable[..., None], chosen: Callable[[str], kernels.ChosenAttention]
) -> None:
    install(without_scale, slow)
    with pytest.raises(ConfigError, match=r"no attention kernel works at 70 tokens .*without_scale: wrong numbers"):
        chosen("without_scale")


def test_no_kernel_with_a_bias_is_an_error(
    install: Callable[..., None], chosen: Callable[[str], kernels.ChosenAttention]
) -> None:
    install(refuses_bias, without_bias)
    with pytest.raises(ConfigError, match="no attention kernel takes the logit bias"):
        chosen("auto")


def test_a_cpu_holds_no_race() -> None:
    taken = choose_attention("auto", SHAPE, CPU, torch.float32)
    assert taken.name == "native" and len(taken.table) == 1


def test_unknown_and_missing_kernels_are_refused_with_the_list() -> None:
    with pytest.raises(ConfigError) as caught:
        choose_attention("flashy", SHAPE, CPU, torch.float32)
    assert str(caught.value) == (
        "attention 'flashy' is unknown for cpu; known: auto, native, _native_cudnn, flash_4, _flash_3, flash_4_hub, "
        "_flash_3_hub, flash, _native_flash, "
        "xformers, _native_efficient, _native_math, sage; installed: native, _native_flash, _native_math"
    )
    with pytest.raises(ConfigError, match="attention 'xformers' is not installed for cpu"):
        choose_attention("xformers", SHAPE, CPU, torch.float32)


def test_packages_are_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "xformers" else None)
    found = installed_kernels(device)
    assert "xformers" in found and "flash" not in found and "_native_cudnn" in found


def as_sage(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """What SageAttention rounds: queries and keys to 127 steps per token, keys without their mean; the rest to e4m3."""
    if bias is not None:
        raise ValueError("no mask")
    query, key, value = (tensor.float() for tensor in (query, key, value))

    def stepped(tensor: Tensor) -> Tensor:
        step = tensor.abs().amax(-1, keepdim=True) / 127
        return (tensor / step).round() * step

    def rounded(tensor: Tensor, highest: Tensor) -> Tensor:
        return (tensor * (448 / highest)).to(torch.float8_e4m3fn).float() * (highest / 448)

    key = key - key.mean(1, keepdim=True)
    logits = torch.einsum("bnge,bmge->bgnm", stepped(query), stepped(key)) / query.shape[-1] ** 0.5
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    value = rounded(value, value.abs().amax(1, keepdim=True))
    summed = torch.einsum("bgnm,bmge->bgne", rounded(weights, torch.ones(())), value)
    return (summed / weights.sum(-1, keepdim=True)).transpose(1, 2)


def without_64_keys(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    return as_sage(query, key[:, 64:], value[:, 64:], bias)


LARGE = AttentionShape(num_tokens=1024, num_heads=2, head_width=128)


@pytest.fixture
def lossy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let a function be `sage` on a device that has it beside two right kernels."""

    def installed(function: Attend) -> None:
        real = kernels.kernel
        fakes: dict[str, Attend] = {"sage": function, "refuses_bias": refuses_bias, "slow": slow}
        monkeypatch.setattr(kernels, "kernel", lambda name: fakes.get(name) or real(name))
        monkeypatch.setattr(kernels, "installed_kernels", lambda _: ("slow", "refuses_bias", kernels.MATH, "sage"))

    return installed


def test_the_lossy_tolerance_is_what_8_bits_lose_and_less_than_a_lost_block(lossy: Callable[..., None]) -> None:
    lossy(as_sage)
    (entry,) = measure_kernels(["sage"], LARGE, CPU, torch.bfloat16)
    assert entry.self_ms is not None and entry.problem == "not for prompts: ValueError: no mask"
    lossy(without_64_keys)
    (entry,) = measure_kernels(["sage"], LARGE, CPU, torch.bfloat16)
    assert entry.self_ms is None and "wrong numbers, relative error" in entry.problem


def test_8_bits_are_more_than_other_kernels_may_lose(install: Callable[..., None]) -> None:
    install(as_sage)
    (entry,) = measure_kernels(["as_sage"], LARGE, CPU, torch.bfloat16)
    assert entry.self_ms is None and "wrong numbers, relative error" in entry.problem


def test_auto_never_takes_a_lossy_kernel(
    lossy: Callable[..., None], chosen: Callable[[str], kernels.ChosenAttention]
) -> None:
    lossy(sdpa)  # right, and the fastest of all
    taken = chosen("auto")
    assert taken.name == "refuses_bias+slow" and "sage" not in {entry.name for entry in taken.table}
    assert chosen("sage").name == "sage"


def test_a_lossy_kernel_by_name_leaves_prompts_to_a_right_one(
    lossy: Callable[..., None], chosen: Callable[[str], kernels.ChosenAttention]
) -> None:
    lossy(refuses_bias)
    assert chosen("sage").name == "sage+slow"


def test_sage_is_refused_where_it_is_not_installed_or_does_not_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"attention 'sage' is not installed for cpu; known: .*; installed: native"):
        choose_attention("sage", SHAPE, CPU, torch.bfloat16)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"attention 'sage' is not installed for cuda; known: .*; installed: native"):
        kernels.check_attention_name("sage", torch.device("cuda"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if name == "sageattention" else None)
    kernels.check_attention_name("sage", torch.device("cuda"))
    monkeypatch.setattr(kernels, "installed_kernels", lambda _: ("native", "sage"))
    with pytest.raises(
        ConfigError, match=r"no attention kernel works at 70 tokens .*: sage: ModuleNotFoundError: [^\n]+$"
    ):
        choose_attention("sage", SHAPE, CPU, torch.bfloat16)


def test_sage_is_called_with_our_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    def sageattn(q: Tensor, k: Tensor, v: Tensor, *, tensor_layout: str, is_causal: bool) -> Tensor:
        assert tensor_layout == "NHD" and not is_causal
        return sdpa(q, k, v, None)

    monkeypatch.setitem(sys.modules, "sageattention", SimpleNamespace(sageattn=sageattn))  # type: ignore[arg-type]
    query, key, value = torch.randn(3, 1, 9, 2, 8).unbind(0)
    assert torch.equal(kernel("sage")(query, key, value, None), sdpa(query, key, value, None))
    with pytest.raises(ConfigError, match="SageAttention takes no logit bias"):
        kernel("sage")(query, key, value, torch.zeros(1, 1, 1, 9))


def test_a_package_that_is_absent_fails_like_any_other() -> None:
    (entry,) = measure_kernels(["xformers"], SHAPE, CPU, torch.float32)
    assert entry.self_ms is None and entry.problem


@pytest.mark.parametrize("gives_tuple", [False, True])
@pytest.mark.parametrize("name", ["flash_4", "_flash_3", "flash_4_hub", "_flash_3_hub"])
def test_flash_packages_are_called_with_our_layout_and_without_a_bias(
    monkeypatch: pytest.MonkeyPatch, name: str, gives_tuple: bool
) -> None:
    seen: list[tuple[int, ...]] = []

    def flash_attn_func(query: Tensor, key: Tensor, value: Tensor) -> object:
        seen.append(tuple(query.shape))
        out = sdpa(query, key, value, None)
        return (out, None) if gives_tuple else out

    module = SimpleNamespace(flash_attn_func=flash_attn_func)
    asked: list[tuple[str, int]] = []
    hub = SimpleNamespace(get_kernel=lambda repository, version: (asked.append((repository, version)), module)[1])
    for wanted, found in (("flash_attn", module), ("flash_attn.cute", module), ("flash_attn_interface", module)):
        monkeypatch.setitem(sys.modules, wanted, found)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "kernels", hub)  # type: ignore[arg-type]
    kernels._flash_function.cache_clear()
    (entry,) = measure_kernels([name], SHAPE, CPU, torch.float32)
    kernels._flash_function.cache_clear()
    assert entry.self_ms is not None and entry.prompt_ms is None
    assert entry.problem == f"not for prompts: {name} takes no logit bias"
    assert set(seen) == {(1, 70, 2, 16)}
    assert asked == ([kernels.FLASH_ON_HUB[name]] if name.endswith("hub") else [])


def test_a_package_that_cannot_be_looked_at_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> object:
        raise OSError("built for another torch")

    monkeypatch.setattr("importlib.util.find_spec", broken)
    assert installed_kernels(torch.device("cuda"))[:3] == ("native", "_native_cudnn", "_native_flash")


def test_a_remembered_kernel_is_checked_alone_and_raced_anew_when_it_fails(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    raced: list[tuple[str, ...]] = []
    measure = kernels.measure_kernels

    def measured(names: Any, shape: AttentionShape, _device: torch.device, dtype: torch.dtype) -> Any:
        raced.append(tuple(names))
        return measure(names, shape, CPU, dtype)

    monkeypatch.setattr(kernels, "measure_kernels", measured)
    verdicts = Verdicts(tmp_path)

    def chosen_name() -> str:
        return choose_attention("auto", SHAPE, RacingDevice(), torch.float32, verdicts).name  # type: ignore[arg-type]

    install(slow, sdpa)
    assert [chosen_name(), chosen_name()] == ["sdpa", "sdpa"]
    assert raced == [("slow", "sdpa"), ("sdpa",)]
    fakes: dict[str, Attend] = {"slow": slow, "sdpa": not_a_number}
    monkeypatch.setattr(kernels, "kernel", lambda name: fakes.get(name) or kernel(name))
    assert chosen_name() == "slow"
    assert raced[2:] == [("sdpa",), ("slow", "sdpa")]
