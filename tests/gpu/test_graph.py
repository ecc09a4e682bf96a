"""CUDA graphs and attention kernels on a device: replay equals eager bit for bit, whatever ran in between."""

from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from codmd_serve.config import GenerateParams
from codmd_serve.cuda_graph import CudaRecorder, Graphs
from codmd_serve.denoise import DenoiseLoop
from codmd_serve.loading import load_engine
from codmd_serve.wan.checkpoint import StudentSpec
from codmd_serve.wan.kernels import AttentionShape, choose_attention
from codmd_serve.wan.transformer import FewStepTransformer, PromptCache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPES = ((4, 1, 4, 3, 8, 12), (4, 1, 4, 2, 8, 8))


@pytest.fixture(scope="module")
def transformer(tiny_spec: StudentSpec) -> FewStepTransformer:
    torch.manual_seed(0)
    source = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=64,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=128,
        num_layers=2,
    )
    return FewStepTransformer(source.eval().to("cuda", torch.bfloat16), tiny_spec.timesteps)


def prompt_of(transformer: FewStepTransformer, seed: int, size: int) -> PromptCache:
    embeds = torch.zeros(1, size, 16)
    embeds[:, :7] = torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(seed))
    return transformer.encode_prompt(embeds)


def noise_of(seed: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


@torch.inference_mode()
def test_replay_equals_eager_with_two_shapes_interleaved(
    transformer: FewStepTransformer, tiny_spec: StudentSpec
) -> None:
    loop, eager = DenoiseLoop(transformer, tiny_spec, execution="graph"), DenoiseLoop(transformer, tiny_spec)
    for shape in SHAPES:
        loop.warm(noise_of(0, shape), [prompt_of(transformer, 0, size) for size in (32, 512)])
    assert (loop.execution, loop.fallback) == ("graph", "")
    for seed in range(1, 5):
        for shape in SHAPES:
            for size in (32, 512):
                noise, prompt = noise_of(seed, shape), prompt_of(transformer, seed, size)
                got = loop(noise, prompt)
                torch.empty(2**24, device="cuda").fill_(float("nan"))  # over memory that the graph does not own
                assert torch.equal(got, eager(noise, prompt))


@torch.inference_mode()
def test_eviction_leaves_the_others_right(transformer: FewStepTransformer) -> None:
    graphs = Graphs(CudaRecorder(transformer.device), max_graphs=2)

    def doubled(tensor: Tensor) -> Tensor:
        return (2 * tensor).sum(0, keepdim=True) + tensor

    for size in (3, 4, 5):
        assert graphs.record(doubled, torch.ones(size, device="cuda"))
    assert graphs.replay(torch.ones(3, device="cuda")) is None
    for size in (4, 5, 4):
        inputs = torch.arange(size, dtype=torch.float32, device="cuda")
        assert torch.equal(graphs.replay(inputs), doubled(inputs))


@torch.inference_mode()
def test_what_cannot_be_recorded_leaves_the_device_usable(transformer: FewStepTransformer) -> None:
    graphs = Graphs(CudaRecorder(transformer.device))

    def waits(tensor: Tensor) -> Tensor:
        return tensor * float(tensor.sum())

    inputs = torch.ones(3, device="cuda")
    assert not graphs.record(waits, inputs)
    assert graphs.failure and graphs.replay(inputs) is None
    assert waits(inputs).tolist() == [3.0] * 3
    # torch's default generator would still believe in the capture.
    assert torch.randn(3, device="cuda").isfinite().all()


def test_an_engine_serves_from_its_graph_and_gives_the_same_video(tiny_bundle: Path, tmp_path: Path) -> None:
    params = GenerateParams(prompt="a red circle", seed=7, height=32, width=32, num_frames=9, fps=16, crf=18)
    videos = []
    for execution in ("eager", "graph"):
        engine = load_engine(tiny_bundle, "cuda", attention="native", execution=execution)
        assert engine.facts.execution == execution and engine.facts.fallback == ""
        assert engine.facts.max_video_px >= 32 * 32 * 9
        engine.generate(params, tmp_path / f"{execution}.mp4")
        videos.append((tmp_path / f"{execution}.mp4").read_bytes())
    # Not the same bytes: the graph pads prompts, which sums in another order.
    assert all(len(video) > 1000 for video in videos)


def test_a_text_encoder_gives_the_same_wherever_it_lives(tiny_bundle: Path) -> None:
    embeds = {}
    for place in ("gpu", "offload", "cpu"):
        engine = load_engine(tiny_bundle, "cuda", "float32", execution="eager", text_encoder=place)
        assert engine.bundle.text_encoder.device.type == ("cuda" if place == "gpu" else "cpu")
        with torch.inference_mode():  # as a request runs
            embeds[place] = engine.embedder("a red circle moves")
    assert torch.equal(embeds["gpu"], embeds["offload"])
    # Another device sums in another order.
    torch.testing.assert_close(embeds["cpu"], embeds["gpu"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_fastest_right_kernel_of_the_device_is_found(dtype: torch.dtype) -> None:
    shape = AttentionShape(num_tokens=4096, num_heads=12, head_width=128)
    chosen = choose_attention("auto", shape, torch.device("cuda"), dtype)
    working = [entry for entry in chosen.table if entry.self_ms is not None]
    print(*chosen.table, sep="\n")
    assert len(working) >= 2 and chosen.name
