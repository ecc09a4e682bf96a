"""A lossy engine beside the exact one: which requests it makes, what both share, and when it is refused."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from codmd_serve import loading as loading_module
from codmd_serve.config import GenerateParams, default_bundle_path
from codmd_serve.engine import Engine
from codmd_serve.errors import ConfigError
from codmd_serve.loading import load_engine
from codmd_serve.wan.transformer import FewStepTransformer, sdpa

PARAMS = GenerateParams(prompt="a red circle", seed=7, height=96, width=96, num_frames=5, fps=16, crf=18)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(default_bundle_path(), "cpu", "float32", vae_dtype="float32", lossy="fp8-emulated")


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def test_a_request_that_allows_it_is_made_by_the_lossy_engine(engine: Engine, tmp_path: Path) -> None:
    assert (engine.facts.lossy, engine.facts.lossy_beside, engine.facts.fallback) == ("", "fp8-emulated", "")
    exact, lossy = engine.denoised(PARAMS), engine.denoised(replace(PARAMS, may_be_lossy=True))
    # fp8 rounds both factors to four bits: a product is off by .037, and four steps add up, to .221 in DMD's student.
    assert 0.005 < relative(lossy, exact) < 0.25
    assert torch.equal(engine.denoised(PARAMS), exact)
    engine.generate(replace(PARAMS, may_be_lossy=True), tmp_path / "lossy.mp4")
    engine.generate(PARAMS, tmp_path / "exact.mp4")
    assert b'"may_be_lossy": true' in (tmp_path / "lossy.mp4").read_bytes()
    assert b"may_be_lossy" not in (tmp_path / "exact.mp4").read_bytes()


def test_the_exact_engine_is_what_it_is_alone(engine: Engine) -> None:
    alone = load_engine(default_bundle_path(), "cpu", "float32", vae_dtype="float32")
    assert alone.lossy_loop is None
    exact = alone.denoised(PARAMS)
    assert torch.equal(exact, engine.denoised(PARAMS))
    assert torch.equal(exact, alone.denoised(replace(PARAMS, may_be_lossy=True)))  # nothing else is there


def test_both_engines_share_what_is_not_quantized(engine: Engine) -> None:
    assert engine.lossy_loop is not None
    exact, lossy = engine.transformer, engine.lossy_loop.transformer
    assert exact.blocks[0].qkv.weight.dtype == torch.float32
    assert lossy.blocks[0].qkv.weight.dtype == torch.float8_e4m3fn
    for name in ("cross_kv.weight", "qk_weight", "scale"):
        ours, theirs = (_tensors(network)[name] for network in (exact, lossy))
        assert ours.data_ptr() == theirs.data_ptr()
    assert exact.patch_weight.data_ptr() == lossy.patch_weight.data_ptr()


def _tensors(network: FewStepTransformer) -> dict[str, torch.Tensor]:
    block = network.blocks[0]
    return {**dict(block.named_parameters()), **dict(block.named_buffers())}


def test_a_twin_attends_by_its_own_kernel(engine: Engine) -> None:
    calls = list[torch.Size]()

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(query.shape)
        return sdpa(query, key, value, bias)

    twin = engine.transformer.twin(attend)
    prompt = engine.embed(PARAMS.prompt).prompt
    latents = torch.randn(1, 16, 2, 12, 12)
    want = engine.transformer(latents, 0, prompt)
    assert not calls
    assert torch.equal(twin(latents, 0, prompt), want)
    assert len(calls) == 2 * len(twin.blocks)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lossy": "int4"}, "lossy must be one of none, fp8, sage, fp8\\+sage, fp8-emulated, got 'int4'"),
        ({"lossy": "fp8"}, r"fp8 needs a CUDA device of compute capability 8\.9 or higher, got cpu"),
        ({"lossy": "fp8+sage"}, "needs a CUDA device"),
        ({"lossy": "sage"}, "attention 'sage' is not installed for cpu"),
        ({"lossy": "fp8-emulated", "quantization": "fp8-emulated"}, "this one has fp8-emulated: leave one out"),
    ],
)
def test_what_cannot_be_served_is_refused_before_it_loads(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_engine(Path("/nowhere"), "cpu", **settings)  # type: ignore[arg-type]


def test_sage_beside_the_exact_engine_replaces_its_attention(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading_module, "LOSSY", ("sage",))
    monkeypatch.setattr(loading_module, "check_attention_name", lambda *_: None)
    asked, choose = list[str](), loading_module.choose_attention

    def chosen(name: str, *rest: object) -> object:
        asked.append(name)
        return choose("_native_math" if name == "sage" else name, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(loading_module, "choose_attention", chosen)
    engine = load_engine(tiny_bundle, "cpu", lossy="sage")
    assert asked == ["auto", "sage"] and engine.lossy_loop is not None
    assert engine.lossy_loop.transformer.attend is not engine.transformer.attend
    assert engine.facts.lossy_beside == "sage"
