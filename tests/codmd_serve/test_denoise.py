"""The loop gives the same latents however it runs, warms in order, and falls back with a reason."""

import copy
import dataclasses
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline
from torch import Tensor

from codmd_serve import denoise as denoise_module
from codmd_serve.config import EXECUTIONS
from codmd_serve.denoise import PROMPT_SIZES, DenoiseLoop, choose_execution
from codmd_serve.errors import ConfigError
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.attention import compact_prompt_embeds, pad_prompt_embeds
from codmd_serve.wan.checkpoint import StudentSpec
from codmd_serve.wan.transformer import FewStepTransformer, PromptCache

SHAPE = (4, 1, 4, 2, 4, 6)


class PassThrough:
    """Runs the function again where a graph would be replayed; keeps what it was asked to record."""

    def __init__(self) -> None:
        self.num_replayed = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        output = run()

        def replay() -> None:
            self.num_replayed += 1
            output.copy_(run())

        return replay, output


@pytest.fixture
def transformer(tiny_pipeline: WanPipeline, tiny_spec: StudentSpec) -> FewStepTransformer:
    return FewStepTransformer(copy.deepcopy(tiny_pipeline.transformer), tiny_spec.timesteps)


def prompt_of(transformer: FewStepTransformer, seed: int, sizes: tuple[int, ...] = PROMPT_SIZES) -> PromptCache:
    embeds = torch.zeros(1, 512, 16)
    embeds[:, :7] = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed))
    return transformer.encode_prompt(pad_prompt_embeds(compact_prompt_embeds(embeds), sizes))


def noise_of(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def lengths(prompt: PromptCache) -> int:
    return prompt.keys_values[0][0].shape[1]


def test_padding_a_prompt_changes_rounding_only(transformer: FewStepTransformer, tiny_spec: StudentSpec) -> None:
    loop = DenoiseLoop(transformer, tiny_spec)
    short, *padded = (prompt_of(transformer, 1, sizes) for sizes in ((), (32,), (128, 512), (512,)))
    assert [lengths(prompt) for prompt in (short, *padded)] == [8, 32, 128, 512]
    want = loop(noise_of(1), short)
    for prompt in padded:
        torch.testing.assert_close(loop(noise_of(1), prompt), want, rtol=1e-4, atol=1e-5)


def test_a_replay_equals_eager_bit_for_bit_for_other_noise_and_prompts(
    transformer: FewStepTransformer, tiny_spec: StudentSpec
) -> None:
    record = PassThrough()
    eager, loop = (DenoiseLoop(transformer, tiny_spec, execution=e, record=record) for e in ("eager", "graph"))
    loop.warm(noise_of(0), [prompt_of(transformer, 0, (size,)) for size in (32, 512)])
    assert (loop.execution, loop.fallback) == ("graph", "")
    for seed in (1, 2, 3):
        for size in (32, 512):  # 512 has no bias: one input fewer
            prompt = prompt_of(transformer, seed, (size,))
            want = eager(noise_of(seed), prompt)
            with torch.inference_mode():
                assert torch.equal(loop(noise_of(seed), prompt), want)
    assert record.num_replayed == 6


def test_progress_is_told_per_step_or_once_per_replay(transformer: FewStepTransformer, tiny_spec: StudentSpec) -> None:
    loop = DenoiseLoop(transformer, tiny_spec, execution="graph", record=PassThrough())
    prompt, seen = prompt_of(transformer, 0), list[int]()
    loop(noise_of(0), prompt, lambda step, _: seen.append(step))
    assert seen == [0, 1, 2, 3]
    loop.warm(noise_of(0), [prompt])
    loop(noise_of(0), prompt, lambda step, _: seen.append(step))
    assert seen == [0, 1, 2, 3, 3]


def test_a_shape_that_was_not_warmed_runs_eager_and_is_logged(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, caplog: pytest.LogCaptureFixture
) -> None:
    record = PassThrough()
    loop = DenoiseLoop(transformer, tiny_spec, execution="graph", record=record)
    prompt, other = prompt_of(transformer, 0), noise_of(1, (4, 1, 4, 3, 4, 4))
    loop.warm(noise_of(0), [prompt])
    want = DenoiseLoop(transformer, tiny_spec)(other, prompt)
    for _ in range(2):
        assert torch.equal(loop(other, prompt), want)
    assert record.num_replayed == 0
    assert caplog.text.count("execution=eager reason=not_warmed shape=4x1x4x3x4x4") == 1


def test_a_shape_that_was_not_compiled_runs_eager_and_is_logged(
    transformer: FewStepTransformer,
    tiny_spec: StudentSpec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = DenoiseLoop(transformer, tiny_spec, execution="compiled")
    monkeypatch.setattr(transformer, "compile_blocks", lambda: None)  # blocks that were not compiled run as they are
    prompt, other = prompt_of(transformer, 0), noise_of(1, (4, 1, 4, 3, 4, 4))
    loop.warm(noise_of(0), [prompt])
    loop(noise_of(1), prompt)
    assert loop.execution == "compiled" and "not_warmed" not in caplog.text
    want, seen = DenoiseLoop(transformer, tiny_spec)(other, prompt), list[bool]()
    forward = transformer.forward
    monkeypatch.setattr(transformer, "forward", lambda *words: (seen.append(words[3]), forward(*words))[1])
    for _ in range(2):
        assert torch.equal(loop(other, prompt), want)
    assert seen == [False] * 8
    assert caplog.text.count("execution=eager reason=not_warmed shape=4x1x4x3x4x4") == 1


def test_auto_races_one_step_then_records_the_longest_first(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    loop = DenoiseLoop(transformer, tiny_spec, execution="auto", record=PassThrough())
    forward, run, record = transformer.forward, loop._run, loop._graphs.record

    def step(latents: Tensor, index: int, prompt: PromptCache, is_compiled: bool = False) -> Tensor:
        order.append(("compiled" if is_compiled else "eager", lengths(prompt)))
        return forward(latents, index, prompt)

    def whole_loop(noise: Tensor, prompt: PromptCache, on_step: Any, is_compiled: bool) -> Tensor:
        order.append(("loop", lengths(prompt)))
        return run(noise, prompt, on_step, is_compiled)

    def recording(function: Any, *inputs: Tensor, keeps: Any) -> bool:
        order.append(("record", inputs[1].shape[1]))
        assert keeps is transformer.rotary_table(SHAPE[1:])
        return record(function, *inputs, keeps=keeps)

    monkeypatch.setattr(transformer, "compile_blocks", lambda: None)
    monkeypatch.setattr(transformer, "forward", step)
    monkeypatch.setattr(loop, "_run", whole_loop)
    monkeypatch.setattr(loop._graphs, "record", recording)
    monkeypatch.setattr(denoise_module, "MAX_TIME_RATIO", 1e9)  # everything pays
    loop.warm(noise_of(0), [prompt_of(transformer, 0, (size,)) for size in (32, 512, 128)])
    assert loop.execution == "compiled+graph"
    # What is recorded runs too; only firsts tell the order.
    assert list(dict.fromkeys(order)) == [
        ("eager", 512),
        *(("compiled", n) for n in (512, 128, 32)),
        *((word, n) for n in (512, 128, 32) for word in ("record", "loop")),
    ]
    # No loop is timed: each runs as often as a recording runs it.
    assert order.count(("loop", 512)) == 1


def test_auto_leaves_the_compiler_alone_where_kernels_are_fused(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "compile_blocks", lambda: pytest.fail("compiled"))
    transformer.rows = dataclasses.replace(transformer.rows, is_fused=True)
    monkeypatch.setattr(denoise_module, "MAX_TIME_RATIO", 1e9)
    loop = DenoiseLoop(transformer, tiny_spec, execution="auto", record=PassThrough())
    loop.warm(noise_of(0), [prompt_of(transformer, 0)])
    assert loop.execution == "graph"


def test_a_verdict_spares_the_race(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(transformer, "compile_blocks", lambda: None)
    monkeypatch.setattr(denoise_module, "MAX_TIME_RATIO", 1e9)
    races, race = list[str](), DenoiseLoop._race
    monkeypatch.setattr(DenoiseLoop, "_race", lambda *given: (races.append("race"), race(*given))[1])

    def warmed(*parts: object) -> str:
        verdicts = Verdicts(tmp_path / "cache", *parts)
        loop = DenoiseLoop(transformer, tiny_spec, execution="auto", record=PassThrough(), verdicts=verdicts)
        loop.warm(noise_of(0), [prompt_of(transformer, 0)])
        return loop.execution

    assert [warmed("torch 1"), warmed("torch 1"), warmed("torch 2")] == ["compiled+graph"] * 3
    assert len(races) == 2  # the second load knew, the one with another torch did not
    (tmp_path / "cache" / "verdicts.json").write_text("{")
    assert warmed("torch 1") == "compiled+graph" and len(races) == 3


def test_the_notice_of_tf32_is_no_failed_compilation(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def notice() -> None:
        warnings.warn("TensorFloat32 tensor cores for float32 matrix multiplication available", stacklevel=1)
        warnings.warn("`torch.jit.script_method` is deprecated. Please switch", DeprecationWarning, stacklevel=1)

    monkeypatch.setattr(transformer, "compile_blocks", notice)
    loop = DenoiseLoop(transformer, tiny_spec, execution="compiled")
    loop.warm(noise_of(0), [prompt_of(transformer, 0)])
    assert (loop.execution, loop.fallback) == ("compiled", "")


def test_auto_keeps_only_what_pays(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformer, "compile_blocks", lambda: None)
    monkeypatch.setattr(denoise_module, "MAX_TIME_RATIO", 0.0)  # nothing pays
    loop = DenoiseLoop(transformer, tiny_spec, execution="auto", record=PassThrough())
    loop.warm(noise_of(0), [prompt_of(transformer, 0)])
    assert (loop.execution, loop.fallback, len(loop._graphs)) == ("eager", "", 0)


def test_a_recording_that_fails_leaves_eager_and_the_reason(
    transformer: FewStepTransformer, tiny_spec: StudentSpec
) -> None:
    loop = DenoiseLoop(transformer, tiny_spec, execution="graph")
    prompt = prompt_of(transformer, 0)
    loop.warm(noise_of(0), [prompt])
    assert loop.execution == "eager"
    assert loop.fallback == "RuntimeError: CUDA graphs need a CUDA device, got cpu"
    assert torch.equal(loop(noise_of(0), prompt), DenoiseLoop(transformer, tiny_spec)(noise_of(0), prompt))


def test_a_compiler_that_fails_leaves_eager_and_the_reason(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_compiler() -> None:
        def broken(*_: Any) -> Tensor:
            raise RuntimeError("no compiler found")

        for block in transformer.blocks:
            monkeypatch.setattr(block, "_compiled_call_impl", broken)

    monkeypatch.setattr(transformer, "compile_blocks", no_compiler)
    loop = DenoiseLoop(transformer, tiny_spec, execution="compiled")
    prompt = prompt_of(transformer, 0)
    loop.warm(noise_of(0), [prompt])
    assert (loop.execution, loop.fallback) == ("eager", "blocks not compiled: RuntimeError: no compiler found")
    assert loop(noise_of(0), prompt).isfinite().all()


def test_compiled_blocks_equal_eager_ones(
    transformer: FewStepTransformer, tiny_spec: StudentSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_blocks = transformer.compile_blocks
    # The tracer without its code generator, which takes minutes: what is traced is what would be generated.
    monkeypatch.setattr(transformer, "compile_blocks", lambda: compile_blocks("eager"))
    loop = DenoiseLoop(transformer, tiny_spec, execution="compiled")
    prompts = [prompt_of(transformer, 0, (size,)) for size in (32, 128)]
    loop.warm(noise_of(0), prompts)
    assert loop.execution == "compiled" and loop.fallback == ""
    for prompt in prompts:
        want = DenoiseLoop(transformer, tiny_spec)(noise_of(1), prompt)
        torch.testing.assert_close(loop(noise_of(1), prompt), want, rtol=1e-4, atol=1e-5)


def test_choose_execution() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_execution("auto", cpu) == "eager" and choose_execution("auto", cuda) == "auto"
    assert all(choose_execution(name, cuda) == name for name in EXECUTIONS)
    with pytest.raises(ConfigError, match=r"execution must be one of auto, eager, graph.*got 'fast'"):
        choose_execution("fast", cpu)
