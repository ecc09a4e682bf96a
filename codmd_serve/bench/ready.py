"""Predicts the seconds from load to ready on an H200: `python -m codmd_serve.bench.ready` prints the table of the docs.

Bytes, steps and latent frames are counted on the modules and on the constants of the warm-up, which a test compares
with what a warm-up runs. Rates were measured on an H200 (docs/results/gpu-h200.md) but for those marked as assumed.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from codmd_serve import chunk_graphs, cuda_graph, denoise
from codmd_serve.bench.floor import num_parameters, transformer_work
from codmd_serve.bench.weights import preset
from codmd_serve.wan.vae import CHUNK, FIRST_CHUNK, latent_shape

NAMES = ("wan-1.3b", "wan-14b")
BARS_S = {"wan-1.3b": 40.0, "wan-14b": 120.0}
GIB = 2**30

LOOP_FLOP_PER_S = 571e12  # measured: 1,132 TFLOP in 1.984 s
HALF_DECODE_S, FLOAT_DECODE_S, DECODED_LATENTS = 1.324, 1.623, 21  # measured, of 81 frames; float16 before fused norms
READ_BYTES_PER_S = 2.6 * GIB  # published, of a server with the same files
IMPORTS_S = 4.0  # assumed: as on a CPU
ATTENTION_S, ATTENTION_HEADS = 0.6, 12  # measured at 32,760 tokens; time grows with heads
NUM_TRITON_VARIANTS, TRITON_VARIANT_S = 18, 0.35  # counted: flags and widths of three kernels; assumed
CUDNN_S = 2.0  # assumed: cuDNN times its kernels for the convolutions of two chunk shapes
ENCODER_TAIL_S = 0.1  # assumed


@dataclass(frozen=True, slots=True)
class WarmUp:
    """What the warm-up of a first start runs, in denoising steps and latent frames.

    Attributes:
        loop_steps: of the first video and of the one that is timed.
        race_steps, replayed_steps: of the race of one step, run and replayed.
        half_latents, float_latents: decoded to fit the dtype, to warm up, and for the timed video.
        race_latents, replayed_latents: of the race of two VAE chunks, run and replayed.
    """

    loop_steps: int
    race_steps: int
    replayed_steps: int
    half_latents: int
    float_latents: int
    race_latents: int
    replayed_latents: int


def count_warm_up(num_steps: int, num_latents: int) -> WarmUp:
    """Count a first start with `auto`, where neither graph wins.

    Args:
        num_steps: of the sampler.
        num_latents: latent frames of the native video, a first chunk and at least one later one.
    """
    timed = denoise.NUM_TIMED + 1
    recorded = cuda_graph.NUM_WARM_RUNS + 1
    raced = FIRST_CHUNK + CHUNK
    rest = {min(CHUNK, num_latents - start) for start in range(FIRST_CHUNK, num_latents, CHUNK)}
    chunk_timed = chunk_graphs.NUM_TIMED + 1
    return WarmUp(
        loop_steps=2 * num_steps,
        race_steps=timed + recorded,
        replayed_steps=timed,
        half_latents=CHUNK + 2 * num_latents,
        float_latents=CHUNK,
        race_latents=chunk_timed * raced + (1 + recorded) * (FIRST_CHUNK + sum(rest)),
        replayed_latents=chunk_timed * raced,
    )


@functools.cache
def weight_bytes(name: str) -> int:
    """Count the bytes of a preset that are read: transformer and text encoder in bfloat16, the VAE in float32."""
    plan = preset(name)
    with torch.device("meta"):
        halves = (WanTransformer3DModel(**plan.transformer), UMT5EncoderModel(UMT5Config(**plan.text_encoder)))
        vae = AutoencoderKLWan(**plan.vae)
    return sum(2 * num_parameters(module) for module in halves) + 4 * num_parameters(vae)


@functools.cache
def predict_ready(name: str) -> dict[str, tuple[float, float]]:
    """Return the seconds of each part at a first start and at a second one, whose caches are filled.

    Args:
        name: of a preset of `bench.weights`.
    """
    plan = preset(name)
    native, heads = plan.native, plan.transformer["num_attention_heads"]
    with torch.device("meta"):
        latents = latent_shape(AutoencoderKLWan(**plan.vae), native.height, native.width, native.num_frames)
    step_s = transformer_work(plan.transformer, latents, torch.bfloat16).flop / LOOP_FLOP_PER_S
    half_s, float_s = HALF_DECODE_S / DECODED_LATENTS, FLOAT_DECODE_S / DECODED_LATENTS
    work = count_warm_up(len(plan.grid.timesteps), latents[1])
    reading_s = weight_bytes(name) / READ_BYTES_PER_S
    vae_s = half_s * work.half_latents + float_s * work.float_latents + CUDNN_S
    return {
        "imports": (IMPORTS_S, IMPORTS_S),
        "weights: transformer, UMT5-XXL, VAE": (reading_s, reading_s),
        "attention kernels": (ATTENTION_S * heads / ATTENTION_HEADS, 0.0),
        "Triton kernels": (NUM_TRITON_VARIANTS * TRITON_VARIANT_S, 0.0),
        "denoising steps of two videos": (step_s * work.loop_steps, step_s * work.loop_steps),
        "race of one step": (step_s * (work.race_steps + work.replayed_steps), 0.0),
        "VAE: range, cuDNN, two videos": (vae_s, vae_s),
        "race of two VAE chunks": (half_s * (work.race_latents + work.replayed_latents), 0.0),
        "last frames in the encoder": (ENCODER_TAIL_S, ENCODER_TAIL_S),
    }


def ready_table(names: Sequence[str] = NAMES) -> str:
    """Return the Markdown table of the predictions."""
    predictions = [predict_ready(name) for name in names]
    lines = [f"| seconds | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    sizes = [weight_bytes(name) / 1e9 for name in names]
    lines.append(f"| weights | {' | '.join(f'{size:.1f} GB' for size in sizes)} |")
    for label in predictions[0]:
        cells = [f"{prediction[label][0]:.1f}" for prediction in predictions]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    sums = [[sum(values) for values in zip(*prediction.values(), strict=True)] for prediction in predictions]
    firsts = [f"**{first:.0f}** (bar {BARS_S[name]:.0f})" for name, (first, _) in zip(names, sums, strict=True)]
    lines.append(f"| first start | {' | '.join(firsts)} |")
    lines.append(f"| second start, with `--cache` | {' | '.join(f'{second:.0f}' for _, second in sums)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(ready_table())
