"""Chunks of the VAE as CUDA graphs on a device: the frames of eager chunks bit for bit, and their memory comes back."""

import gc

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from codmd_serve.chunk_graphs import ChunkGraphs, warm_chunks
from codmd_serve.cuda_graph import CudaRecorder
from codmd_serve.loading import load_engine
from codmd_serve.overlap import DecodeThread
from codmd_serve.wan.checkpoint import default_bundle_path, load_module
from codmd_serve.wan.vae import StreamingDecoder, latent_shape
from codmd_serve.warm import measured_convolutions

CUDA = torch.device("cuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
NATIVE_FRAMES = 41  # chunks of 5, 4 and 2 latent frames


@pytest.fixture
def decoder() -> StreamingDecoder:
    base = default_bundle_path().parent / "shapeworld"
    vae: AutoencoderKLWan = load_module(AutoencoderKLWan, base, "vae", torch_dtype=torch.float32)
    decoder = StreamingDecoder(vae.eval().requires_grad_(False).cuda())
    decoder.set_dtype(torch.float16)
    return decoder


def latents_of(decoder: StreamingDecoder, num_frames: int, seed: int = 0) -> Tensor:
    channels = decoder.latents_mean.shape[1]
    shape = (1, channels, (num_frames - 1) // 4 + 1, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(CUDA)


@torch.inference_mode()
def decoded(decoder: StreamingDecoder, latents: Tensor) -> Tensor:
    return torch.cat(list(decoder.frames(latents)), dim=1)


def test_replayed_frames_equal_eager_ones_whatever_else_uses_memory(decoder: StreamingDecoder) -> None:
    cases = [(number, latents_of(decoder, number, number)) for number in (57, 9, 41, 33, 1, 45, 41)]
    with measured_convolutions():
        want = [decoded(decoder, latents) for _, latents in cases]
    graphs = ChunkGraphs(decoder, CudaRecorder(CUDA))
    assert graphs.record(latents_of(decoder, NATIVE_FRAMES)), graphs.failure
    decoder.replays = graphs
    history = graphs.history(cases[0][1].shape)
    assert history is not None
    addresses = history.addresses()
    for (number, latents), expected in zip(cases, want, strict=True):
        got = decoded(decoder, latents)
        torch.empty(2**26, device=CUDA).fill_(float("nan"))  # over memory that the graphs do not own
        assert torch.equal(got, expected), number
    assert history.addresses() == addresses


def test_a_replay_on_a_stream_of_its_own_beside_other_work_gives_the_same(decoder: StreamingDecoder) -> None:
    latents, thread = latents_of(decoder, NATIVE_FRAMES), DecodeThread(CUDA)
    # On the same thread: each has its own memory of the kernels that cuDNN has chosen for a shape.
    want = thread.submit(lambda: decoded(decoder, latents)).result()
    name, fallback = thread.submit(lambda: warm_chunks(decoder, latents, "graph")).result()
    assert (name, fallback) == ("graph", "")
    busy = torch.randn(2048, 2048, device=CUDA)
    for _ in range(5):
        got = thread.submit(lambda: decoded(decoder, latents))
        for _ in range(20):
            busy = torch.mm(busy, busy).clamp_(-1, 1)
        assert torch.equal(got.result(), want)


def test_the_memory_of_graphs_is_bounded_and_comes_back(decoder: StreamingDecoder) -> None:
    latents = latents_of(decoder, NATIVE_FRAMES)
    decoded(decoder, latents)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    decoded(decoder, latents)
    eager_peak = torch.cuda.max_memory_reserved() - before
    torch.cuda.empty_cache()
    graphs = ChunkGraphs(decoder, CudaRecorder(CUDA))
    assert graphs.record(latents), graphs.failure
    torch.cuda.empty_cache()
    taken = torch.cuda.memory_reserved() - before
    print(f"eager peak {eager_peak / 2**20:.0f} MiB, graphs keep {taken / 2**20:.0f} MiB")
    # One pool for all chunks, the history, and the recorder's workspace.
    assert taken <= 2 * eager_peak + 64 * 2**20
    graphs.clear()
    del graphs
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() - before <= 4 * 2**20


def test_an_engine_says_how_its_chunks_run() -> None:
    engine = load_engine(default_bundle_path(), "cuda", execution="graph")
    assert (engine.facts.vae_execution, engine.facts.fallback) == ("graph", "")
    shape = latent_shape(engine.bundle.vae, engine.facts.height, engine.facts.width, engine.facts.num_frames)
    assert engine.decoder.replays is not None and engine.decoder.replays.history((1, *shape)) is not None
