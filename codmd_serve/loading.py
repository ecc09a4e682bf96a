"""From a bundle folder to a warm engine: what goes on which device, and the first videos."""

import logging
import math
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from codmd_serve.config import DEFAULT_CRF, GenerateParams, ModelFacts
from codmd_serve.denoise import choose_execution
from codmd_serve.device import choose_device, choose_dtype
from codmd_serve.engine import Engine
from codmd_serve.errors import CheckpointError, CodmdError, GenerationError
from codmd_serve.files import first_line
from codmd_serve.video import find_ffmpeg
from codmd_serve.wan.checkpoint import Bundle, load_bundle, native_attention_shape
from codmd_serve.wan.fp8 import check_quantization, quantize_blocks
from codmd_serve.wan.kernels import LOSSY, check_attention_name, choose_attention
from codmd_serve.wan.preview import fit_preview
from codmd_serve.wan.text import PromptEmbedder, choose_text_encoder
from codmd_serve.wan.transformer import FewStepTransformer

MEMORY_SHARE = 0.9  # of what is free; the rest is for fragments, workspaces and the driver

logger = logging.getLogger(__name__)


def load_engine(
    path: Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    attention: str = "auto",
    quantization: str = "none",
    execution: str = "auto",
    text_encoder: str = "auto",
    text_cache: str = "",
    threads: int = 0,
) -> Engine:
    """Load a bundle and make its native video once, so that the first request finds everything warm.

    Args:
        path: the bundle folder.
        device: auto (cuda where there is one), cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on cuda, float32 on cpu), float32, bfloat16 or float16.
        attention: auto (the fastest right one that is installed), or the name of a kernel.
        quantization: none, or fp8 for 8-bit matrix products.
        execution: auto (what is fastest; eager on a CPU), eager, graph, compiled or compiled+graph.
        text_encoder: auto (gpu where its weights leave room, else offload), gpu, cpu or offload.
        text_cache: folder for embeddings; empty is memory only.
        threads: CPU threads of torch; 0 leaves them as they are.

    Raises:
        CheckpointError: the bundle cannot be loaded.
        ConfigError: no such device, kernel, quantization or execution, or no ffmpeg.
        GenerationError: the bundle loads, but its native video cannot be made here.
    """
    start_s = time.perf_counter()
    find_ffmpeg()
    if threads:
        torch.set_num_threads(threads)
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    chosen_execution = choose_execution(execution, chosen_device)
    check_attention_name(attention, chosen_device)
    check_quantization(quantization, chosen_device, chosen_dtype)
    choose_text_encoder(text_encoder, chosen_device, 0, 0, 0)  # a wrong name shall not cost a load
    free_bytes = torch.cuda.mem_get_info(chosen_device)[0] if chosen_device.type == "cuda" else 0
    bundle = load_bundle(path, chosen_dtype, chosen_device, text_device="cpu")
    embedder = _embedder(bundle, chosen_device, text_encoder, text_cache, free_bytes)
    facts = _describe(bundle, chosen_device, chosen_dtype)
    _check_native(path, facts)
    chosen = choose_attention(
        attention,
        native_attention_shape(bundle.transformer.config, bundle.vae.config, bundle.spec.native),
        chosen_device,
        chosen_dtype,
    )
    lossy = [name for name in (quantization, attention) if name == "fp8" or name in LOSSY]
    facts = replace(facts, attention=chosen.name, lossy="+".join(lossy))
    transformer = FewStepTransformer(bundle.transformer, bundle.spec.timesteps, attend=chosen.attend)
    if quantization == "fp8":
        quantize_blocks(transformer)
    engine = Engine(bundle, transformer, facts, execution=chosen_execution, embedder=embedder)
    _warm_up(engine, path)
    engine.facts = replace(engine.facts, load_s=time.perf_counter() - start_s)
    return engine


def _warm_up(engine: Engine, path: Path) -> None:
    """Make the first videos, and note in the facts what they showed."""
    try:
        if not engine.preview_map:  # a bundle of before there were previews
            engine.preview_map = fit_preview(engine.decoder)
        warm_s, max_video_px = _make_native_videos(engine)
    except CodmdError:
        raise
    except Exception as error:  # parts that load but do not work together fail anywhere, with any exception
        raise GenerationError(
            f"{path} loads but cannot make its own native video: {first_line(error)}", "warm_up"
        ) from error
    device = engine.transformer.device
    engine.facts = replace(
        engine.facts,
        execution=engine.loop.execution,
        fallback=engine.loop.fallback,
        max_video_px=max_video_px,
        num_devices=torch.cuda.device_count() if device.type == "cuda" else 1,
        service_s=warm_s,
    )


def _embedder(bundle: Bundle, device: torch.device, place: str, cache: str, free_bytes: int) -> PromptEmbedder:
    """Put the text encoder where it was asked to be, or where it fits."""
    sizes = [sum(p.nbytes for p in module.parameters()) for module in (bundle.transformer, bundle.vae)]
    encoder_bytes = sum(p.nbytes for p in bundle.text_encoder.parameters())
    chosen = choose_text_encoder(place, device, encoder_bytes, sum(sizes), free_bytes)
    logger.info("text_encoder=%s asked=%s weights_gib=%.1f", chosen, place, encoder_bytes / 2**30)
    if chosen == "gpu":
        bundle.text_encoder.to(device)
    return PromptEmbedder(
        bundle.tokenizer,
        bundle.text_encoder,
        lend_to=device if chosen == "offload" else None,
        folder=Path(cache) if cache else None,
    )


def _make_native_videos(engine: Engine) -> tuple[float, int]:
    """Make the native video twice; returns the seconds of the second time, and the pixels that memory has room for."""
    facts, device = engine.facts, engine.transformer.device
    params = GenerateParams(
        prompt="warm up",
        seed=0,
        height=facts.height,
        width=facts.width,
        num_frames=facts.num_frames,
        fps=facts.fps,
        crf=DEFAULT_CRF,
    )
    with tempfile.TemporaryDirectory(prefix="codmd-warm-") as folder:
        engine.embed(params.prompt)  # first, or an encoder that is lent to the device would be taken for activations
        resident_bytes = _allocated_bytes(device)
        # Eager, and before anything is recorded: libraries choose their kernels, and activations take what they take.
        engine.generate(params, Path(folder) / "warm.mp4")
        needed_bytes = _peak_bytes(device) - resident_bytes
        engine.warm_loop(params)
        max_video_px = _affordable_px(params, device, needed_bytes)
        warm_s = time.perf_counter()
        engine.generate(params, Path(folder) / "warm.mp4")
    return time.perf_counter() - warm_s, max_video_px


def _allocated_bytes(device: torch.device) -> int:
    """Memory that is allocated now, where `_peak_bytes` counts from; 0 on a CPU, where nobody counts."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak_bytes(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _affordable_px(params: GenerateParams, device: torch.device, needed_bytes: int) -> int:
    """Pixels of the largest video that fits, when `params` needs `needed_bytes`; 0 is unknown.

    Activations grow with the number of tokens, and no other memory grows faster.
    """
    native_px = params.height * params.width * params.num_frames
    if device.type != "cuda" or needed_bytes <= 0:
        return 0
    torch.cuda.empty_cache()
    free_bytes, _ = torch.cuda.mem_get_info(device)
    return max(native_px, int(MEMORY_SHARE * native_px * free_bytes / needed_bytes))


def _check_native(path: Path, facts: ModelFacts) -> None:
    sizes = (facts.height, facts.width)
    if any(size % facts.size_multiple or size > facts.max_side_px for size in sizes) or not (
        (facts.num_frames - 1) % facts.frame_multiple == 0 and facts.num_frames <= facts.max_num_frames
    ):
        raise CheckpointError(
            f"{path}: native must have sides that are multiples of {facts.size_multiple} up to {facts.max_side_px} and "
            f"{facts.frame_multiple}k + 1 frames up to {facts.max_num_frames}, got {facts.width}x{facts.height} and "
            f"{facts.num_frames}"
        )


def _describe(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> ModelFacts:
    native, vae, config = bundle.spec.native, bundle.vae.config, bundle.transformer.config
    side_px = vae.scale_factor_spatial * config.patch_size[1]
    return ModelFacts(
        name=bundle.path.resolve().name,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        dtype=str(dtype).removeprefix("torch."),
        attention="",
        execution="eager",
        num_steps=len(bundle.spec.timesteps),
        height=native.height,
        width=native.width,
        num_frames=native.num_frames,
        fps=native.fps,
        size_multiple=math.lcm(16, side_px),
        max_side_px=config.rope_max_seq_len * side_px,
        frame_multiple=vae.scale_factor_temporal,
        max_num_frames=(config.rope_max_seq_len - 1) * vae.scale_factor_temporal + 1,
        service_s=0.0,
        load_s=0.0,
    )
