"""Loads a bundle folder into a warm engine: places modules on devices and makes the warm-up video."""

import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from codmd_serve import __version__
from codmd_serve.config import LOSSY_ENGINES, ModelFacts
from codmd_serve.cpu import processor_name
from codmd_serve.denoise import choose_execution
from codmd_serve.device import choose_device, choose_dtype, multiplies_bfloat16
from codmd_serve.engine import Engine
from codmd_serve.errors import CheckpointError, CodmdError, ConfigError, GenerationError
from codmd_serve.files import first_line
from codmd_serve.overlap import choose_overlap
from codmd_serve.verdicts import Verdicts
from codmd_serve.video import find_ffmpeg
from codmd_serve.wan.checkpoint import Bundle, load_bundle, load_module, native_attention_shape
from codmd_serve.wan.cpu_dtype import fastest_dtype
from codmd_serve.wan.fp8 import check_quantization, quantize_blocks
from codmd_serve.wan.kernels import (
    LOSSY,
    AttentionShape,
    ChosenAttention,
    check_attention_name,
    choose_attention,
    installed_kernels,
)
from codmd_serve.wan.precision import choose_vae_dtype
from codmd_serve.wan.preview import fit_preview
from codmd_serve.wan.teacher import load_teacher
from codmd_serve.wan.text import PromptEmbedder, choose_text_encoder, fingerprint
from codmd_serve.wan.transformer import FewStepTransformer
from codmd_serve.wan.vae import latent_shape
from codmd_serve.warm import warm_engine

logger = logging.getLogger(__name__)


def load_engine(
    path: Path,
    device: str = "auto",
    dtype: str = "auto",
    *,
    attention: str = "auto",
    quantization: str = "none",
    lossy: str = "none",
    execution: str = "auto",
    text_encoder: str = "auto",
    text_cache: str = "",
    vae_dtype: str = "auto",
    cache: str = "",
    threads: int = 0,
    teacher: bool = False,
    overlap: str = "auto",
) -> Engine:
    """Load a bundle and warm it up with its native video, so that the first request is fast.

    Args:
        path: the bundle folder.
        device: auto (cuda where there is one), cpu, cuda or cuda:N.
        dtype: auto (bfloat16 on cuda, on a cpu what is faster), float32, bfloat16 or float16.
        attention: auto (the fastest right one that is installed), or the name of a kernel.
        quantization: none, fp8 for 8-bit matrix products, or fp8-emulated.
        lossy: none, or what a second, lossy engine beside the exact one has: fp8, sage, fp8+sage or fp8-emulated.
        execution: auto (what is fastest; eager on a CPU), eager, graph, compiled or compiled+graph.
        text_encoder: auto (gpu where its weights leave room, else offload), gpu, cpu or offload.
        text_cache, cache: folders for embeddings, and for what was measured, for the next load; empty keeps neither.
        vae_dtype: the same, but that auto is float16 on cuda, where the activations fit.
        threads: CPU threads of torch; 0 leaves them as they are.
        teacher: whether to load the base's transformer too, for jobs that ask for the teacher.
        overlap: whether a video is decoded while the next one is denoised: auto (on cuda), on or off.

    Raises:
        CheckpointError: the bundle, or the teacher that is asked for, cannot be loaded.
        ConfigError: no such device, kernel, quantization or execution, or no ffmpeg.
        GenerationError: the bundle loads, but its native video cannot be made here.
    """
    start_s = time.perf_counter()
    find_ffmpeg()
    torch.set_num_threads(threads or torch.get_num_threads())
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    plan = choose_execution(execution, chosen_device)
    chosen_vae_dtype = choose_vae_dtype(vae_dtype, chosen_device)
    _check_names(attention, quantization, lossy, text_encoder, chosen_device, chosen_dtype)
    free_bytes = torch.cuda.mem_get_info(chosen_device)[0] if chosen_device.type == "cuda" else 0
    bundle = _load_bundle(path, chosen_dtype, chosen_device)
    embedder = _embedder(bundle, chosen_device, text_encoder, text_cache, free_bytes, 2 if teacher else 1)
    facts = _check_native(path, _describe(bundle, chosen_device, chosen_dtype))
    shape = native_attention_shape(bundle.transformer.config, bundle.vae.config, bundle.spec.native)
    verdicts = _verdicts(cache, bundle, facts, (shape, attention, quantization, execution))
    bundle = _raced(bundle, verdicts) if dtype == "auto" and multiplies_bfloat16(chosen_device) else bundle
    transformer, facts, twin = _network(bundle, facts, shape, attention, quantization, lossy, verdicts)
    engine = Engine(bundle, transformer, facts, execution=plan, verdicts=verdicts, embedder=embedder, lossy=twin)
    engine.teacher = load_teacher(bundle, transformer.dtype, chosen_device, transformer.attend) if teacher else None
    _warm_up(engine, path, chosen_vae_dtype, verdicts, overlap)
    engine.facts = replace(engine.facts, load_s=time.perf_counter() - start_s)
    return engine


def _load_bundle(path: Path, dtype: torch.dtype, device: torch.device) -> Bundle:
    # A prompt takes milliseconds: on a CPU its encoder stays float32 whatever the network is.
    text_dtype = torch.float32 if device.type == "cpu" else None
    return load_bundle(path, dtype, device, text_device="cpu", text_dtype=text_dtype)


def _raced(bundle: Bundle, verdicts: Verdicts) -> Bundle:
    """Return a bundle whose transformer, if it is a float32 one on a CPU, has the faster dtype."""
    if bundle.transformer.device.type != "cpu":
        return bundle
    native = bundle.spec.native
    latents = latent_shape(bundle.vae, native.height, native.width, native.num_frames)
    dtype = fastest_dtype(bundle.transformer, bundle.spec.timesteps, latents, verdicts)
    if dtype == torch.float32:
        return bundle
    transformer = load_module(WanTransformer3DModel, bundle.path, "transformer", torch_dtype=dtype)
    return replace(bundle, transformer=transformer.requires_grad_(False).eval())


def _network(
    bundle: Bundle,
    facts: ModelFacts,
    shape: AttentionShape,
    attention: str,
    quantization: str,
    lossy: str,
    verdicts: Verdicts,
) -> tuple[FewStepTransformer, ModelFacts, FewStepTransformer | None]:
    """Return the network, the facts with what was chosen for it, and its lossy twin where one is wanted."""
    device, dtype = bundle.transformer.device, bundle.transformer.proj_out.weight.dtype
    chosen = choose_attention(attention, shape, device, dtype, verdicts)
    transformer = FewStepTransformer(bundle.transformer, bundle.spec.timesteps, attend=chosen.attend)
    twin = _lossy_twin(lossy, transformer, chosen, shape) if lossy != "none" else None
    if quantization != "none":
        quantize_blocks(transformer)
    facts = replace(
        facts,
        dtype=str(dtype).removeprefix("torch."),
        attention=chosen.name,
        lossy=_lossy(quantization, attention),
        lossy_beside=_lossy(*lossy.split("+")),
    )
    return transformer, facts, twin


def _warm_up(engine: Engine, path: Path, vae_dtype: torch.dtype | None, verdicts: Verdicts, overlap: str) -> None:
    """Make the warm-up videos, and record their findings in the facts."""
    if choose_overlap(overlap, engine.transformer.device):
        engine.start_overlap()
    try:
        if not engine.preview_map:  # a bundle of before there were previews
            engine.preview_map = fit_preview(engine.decoder)
        warm_engine(engine, vae_dtype, verdicts)
    except CodmdError:
        raise
    except Exception as error:  # parts that load but do not work together fail anywhere, with any exception
        raise GenerationError(
            f"{path} loads but cannot make its own native video: {first_line(error)}", "warm_up"
        ) from error


def _lossy(*names: str) -> str:
    """Return the names of the lossy settings, joined by `+`; empty when all are exact."""
    return "+".join(name for name in names if name.startswith("fp8") or name in LOSSY)


def _check_names(
    attention: str, quantization: str, lossy: str, text_encoder: str, device: torch.device, dtype: torch.dtype
) -> None:
    """Refuse what cannot run before it costs a load."""
    check_attention_name(attention, device)
    check_quantization(quantization, device, dtype)
    _check_lossy(lossy, _lossy(quantization, attention), device, dtype)
    choose_text_encoder(text_encoder, device, 0, 0, 0)


def _check_lossy(name: str, of_main: str, device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a second, lossy engine that cannot run, or one beside an engine that is lossy itself.

    Raises:
        ConfigError: says what would work.
    """
    if name not in LOSSY_ENGINES:
        raise ConfigError(f"lossy must be one of {', '.join(LOSSY_ENGINES)}, got {name!r}")
    if name == "none":
        return
    if of_main:
        raise ConfigError(f"lossy {name} is for beside an exact engine, and this one has {of_main}: leave one out")
    for part in name.split("+"):
        if part in LOSSY:
            check_attention_name(part, device)
        else:
            check_quantization(part, device, dtype)


def _lossy_twin(
    name: str, transformer: FewStepTransformer, exact: ChosenAttention, shape: AttentionShape
) -> FewStepTransformer:
    """Return a lossy network that shares the weights of the exact one, but for those that are quantized."""
    parts = name.split("+")
    attend = exact.attend
    for kernel in (part for part in parts if part in LOSSY):
        attend = choose_attention(kernel, shape, transformer.device, transformer.dtype).attend
    twin = transformer.twin(attend)
    if any(part.startswith("fp8") for part in parts):
        quantize_blocks(twin)
    return twin


def _verdicts(cache: str, bundle: Bundle, facts: ModelFacts, asked: tuple[object, ...]) -> Verdicts:
    """Return the cached measurements of this bundle on this device with these versions."""
    if not cache:
        return Verdicts(None)
    versions = (__version__, torch.__version__, torch.version.cuda, installed_kernels(torch.device("cuda")))
    machine = (processor_name(), torch.get_num_threads()) if facts.device == "cpu" else ()
    what = (facts.name, facts.device, facts.dtype, bundle.spec, fingerprint(bundle.transformer))
    return Verdicts(Path(cache), versions, machine, what, asked)


def _embedder(
    bundle: Bundle, device: torch.device, place: str, cache: str, free_bytes: int, num_transformers: int
) -> PromptEmbedder:
    """Place the text encoder on the requested device, or where it fits."""
    modules = [*[bundle.transformer] * num_transformers, bundle.vae]
    sizes = [sum(p.nbytes for p in module.parameters()) for module in modules]
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


def _check_native(path: Path, facts: ModelFacts) -> ModelFacts:
    """Return the facts of a bundle whose native video can be asked for.

    Raises:
        CheckpointError: it cannot.
    """
    sizes = (facts.height, facts.width)
    if any(size % facts.size_multiple or size > facts.max_side_px for size in sizes) or not (
        (facts.num_frames - 1) % facts.frame_multiple == 0 and facts.num_frames <= facts.max_num_frames
    ):
        raise CheckpointError(
            f"{path}: native must have sides that are multiples of {facts.size_multiple} up to {facts.max_side_px} and "
            f"{facts.frame_multiple}k + 1 frames up to {facts.max_num_frames}, got {facts.width}x{facts.height} and "
            f"{facts.num_frames}"
        )
    return facts


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
        about=bundle.grammar.about if bundle.grammar is not None else "",
        examples=bundle.grammar.examples if bundle.grammar is not None else (),
    )
