"""One device, one set of modules: GenerateParams in, an mp4 out, stage by stage; knows nothing of queues or HTTP.

Legend: B batch (1 here), C channels, F latent frames, H and W latent rows and columns, L prompt positions, D width.
"""

import functools
import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from codmd_serve.config import DEFAULT_CRF, DTYPES, GenerateParams, ModelFacts
from codmd_serve.denoise import DenoiseLoop, choose_execution
from codmd_serve.errors import CheckpointError, CodmdError, ConfigError, GenerationError
from codmd_serve.video import find_ffmpeg, write_video
from codmd_serve.wan.attention import pad_prompt_embeds
from codmd_serve.wan.checkpoint import Bundle, load_bundle
from codmd_serve.wan.fp8 import check_quantization, quantize_blocks
from codmd_serve.wan.kernels import LOSSY, AttentionShape, check_attention_name, choose_attention
from codmd_serve.wan.text import PromptEmbedder, choose_text_encoder, prompt_warnings
from codmd_serve.wan.transformer import FewStepTransformer, PromptCache
from codmd_serve.wan.vae import StreamingDecoder, latent_shape

NUM_PROMPTS_READY = 8  # keys and values of one prompt are up to 94 MB at the size of Wan 1.3B
MEMORY_SHARE = 0.9  # of what is free; the rest is for fragments, workspaces and the driver

# (stage, done, total): text 1 of 1, denoise k of num_steps, decode frames of num_frames. May raise CancelledError.
OnProgress = Callable[[str, int, int], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """What is known about a finished video besides its bytes.

    Args:
        timings_ms: milliseconds spent in text, denoise, decode and encode. Encoding runs beside decoding in a process
            of its own, so `encode` is only what was waited for.
        warnings: one sentence each, about what the model could not take as asked.
    """

    timings_ms: dict[str, float]
    warnings: list[str]


class Engine:
    """A warm student on one device. Not thread-safe: one owner, one video at a time.

    Args:
        bundle: its transformer is not used; its weights went into `transformer`.
        transformer: built for the timesteps of the bundle.
        facts: as reported to clients.
        execution: as `DenoiseLoop` takes it; takes effect at warm-up.
        embedder: of the bundle's text encoder; None is one that remembers in memory only.
    """

    def __init__(
        self,
        bundle: Bundle,
        transformer: FewStepTransformer,
        facts: ModelFacts,
        *,
        execution: str = "eager",
        embedder: PromptEmbedder | None = None,
    ) -> None:
        self.bundle = bundle
        self.transformer = transformer
        self.loop = DenoiseLoop(transformer, bundle.spec, execution=execution)
        self.decoder = StreamingDecoder(bundle.vae)
        self.facts = facts
        self.embedder = embedder or PromptEmbedder(bundle.tokenizer, bundle.text_encoder)
        self.embed = functools.lru_cache(maxsize=NUM_PROMPTS_READY)(self._embed_uncached)

    @torch.inference_mode()
    def _embed_uncached(self, prompt: str) -> PromptCache:
        embeds_BLD = pad_prompt_embeds(self.embedder(prompt), self.loop.prompt_sizes)
        return self.transformer.encode_prompt(embeds_BLD)

    @torch.inference_mode()
    def generate(self, params: GenerateParams, path: Path, on_progress: OnProgress | None = None) -> GenerateResult:
        """Make one video; the same params give the same bytes, whatever ran before.

        Args:
            params: validated; sizes that fit the grid of the bundle.
            path: of the mp4, which appears whole or not at all.
            on_progress: called after the text, after each denoising step and after each decoded chunk.

        Raises:
            CancelledError: when on_progress raises it; nothing is written.
            GenerationError: code out_of_memory, non_finite or encode_failed.
        """
        report = on_progress or _nothing
        clock = _StageClock(self.facts.device)
        try:
            prompt = self.embed(params.prompt)
            clock.stop("text")
            report("text", 1, 1)
            x0_pred = self._denoise(params, prompt, report)
            clock.stop("denoise")
            frames = self._decoded(params, x0_pred, clock, report)
            comment = json.dumps({"bundle": self.facts.name, **asdict(params)})
            write_video(
                frames,
                path,
                height=params.height,
                width=params.width,
                fps=params.fps,
                crf=params.crf,
                comment=comment,
            )
            clock.stop("encode")
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            shape = f"{params.width}x{params.height}, {params.num_frames} frames"
            raise GenerationError(f"out of memory at {shape}; ask for fewer pixels", "out_of_memory") from error
        return GenerateResult(timings_ms=clock.milliseconds, warnings=self._warnings(params))

    def _denoise(self, params: GenerateParams, prompt: PromptCache, report: OnProgress) -> Tensor:
        num_steps = len(self.bundle.spec.timesteps)
        noise = self._noise(params)
        x0_pred = self.loop(noise, prompt, lambda step_index, _: report("denoise", step_index + 1, num_steps))
        if not bool(x0_pred.isfinite().all()):
            raise GenerationError("the network gave values that are not finite", "non_finite")
        return x0_pred

    def _noise(self, params: GenerateParams) -> Tensor:
        shape = latent_shape(self.bundle.vae, params.height, params.width, params.num_frames)
        return draw_noise(params.seed, (len(self.bundle.spec.timesteps), 1, *shape)).to(self.transformer.device)

    @torch.inference_mode()
    def warm_loop(self, params: GenerateParams) -> None:
        """Compile and record the denoising of one shape for prompts of all lengths, where that was asked for."""
        text_dim = self.transformer.config.text_dim
        empty = [torch.zeros(1, size, text_dim) for size in self.loop.prompt_sizes]
        if empty:
            self.loop.warm(self._noise(params), [self.transformer.encode_prompt(embeds) for embeds in empty])

    def _decoded(
        self, params: GenerateParams, x0_pred: Tensor, clock: "_StageClock", report: OnProgress
    ) -> Iterator[memoryview]:
        num_done = 0
        for frames_BTHWC in self.decoder.frames(x0_pred):
            chunk = frames_BTHWC[0].cpu().numpy()
            if chunk.shape[1:] != (params.height, params.width, 3):
                made = "x".join(map(str, chunk.shape[1:]))
                raise GenerationError(f"the VAE made frames of {made}, its config promises another size", "wrong_vae")
            num_done += len(chunk)
            clock.stop("decode")
            report("decode", num_done, params.num_frames)
            yield chunk.data.cast("B")
            clock.stop("encode")

    def _warnings(self, params: GenerateParams) -> list[str]:
        native = self.bundle.spec.native
        warnings = prompt_warnings(self.bundle.tokenizer, params.prompt)
        if warnings and self.bundle.spec.vocabulary_note:
            warnings.append(self.bundle.spec.vocabulary_note)
        asked = (params.height, params.width, params.num_frames)
        if asked != (native.height, native.width, native.num_frames):
            warnings.append(
                f"trained at {native.width}x{native.height} with {native.num_frames} frames, "
                f"asked for {params.width}x{params.height} with {params.num_frames}: expect less of it"
            )
        return warnings


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

    Raises:
        CheckpointError: the bundle cannot be loaded.
        ConfigError: no such device, kernel, quantization or execution, or no ffmpeg.
        GenerationError: the bundle loads, but its native video cannot be made here.
    """
    start_s = time.perf_counter()
    find_ffmpeg()
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
    chosen = choose_attention(attention, _attention_shape(bundle), chosen_device, chosen_dtype)
    lossy = [name for name in (quantization, attention) if name == "fp8" or name in LOSSY]
    facts = replace(facts, attention=chosen.name, lossy="+".join(lossy))
    transformer = FewStepTransformer(bundle.transformer, bundle.spec.timesteps, attend=chosen.attend)
    if quantization == "fp8":
        quantize_blocks(transformer)
    engine = Engine(bundle, transformer, facts, execution=chosen_execution, embedder=embedder)
    try:
        warm_s, max_video_px = _warm(engine)
    except CodmdError:
        raise
    except Exception as error:  # parts that load but do not work together fail anywhere, with any exception
        reason = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        raise GenerationError(f"{path} loads but cannot make its own native video: {reason}", "warm_up") from error
    engine.facts = replace(
        facts,
        execution=engine.loop.execution,
        fallback=engine.loop.fallback,
        max_video_px=max_video_px,
        service_s=warm_s,
        load_s=time.perf_counter() - start_s,
    )
    return engine


def _embedder(bundle: Bundle, device: torch.device, place: str, cache: str, free_bytes: int) -> PromptEmbedder:
    """Put the text encoder where it was asked to be, or where it fits."""
    sizes = [sum(p.nbytes for p in module.parameters()) for module in (bundle.transformer, bundle.vae)]
    encoder_bytes = sum(p.nbytes for p in bundle.text_encoder.parameters())
    chosen = choose_text_encoder(place, device, encoder_bytes, sum(sizes), free_bytes)
    log.info("text_encoder=%s asked=%s weights_gib=%.1f", chosen, place, encoder_bytes / 2**30)
    if chosen == "gpu":
        bundle.text_encoder.to(device)
    return PromptEmbedder(
        bundle.tokenizer,
        bundle.text_encoder,
        lend_to=device if chosen == "offload" else None,
        folder=Path(cache) if cache else None,
    )


def _warm(engine: Engine) -> tuple[float, int]:
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


def choose_device(device: str) -> torch.device:
    """Turn auto, cpu, cuda or cuda:N into a device that is there.

    Raises:
        ConfigError: not a device, or not on this machine.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}") from None
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"no device {device}: this torch sees {torch.cuda.device_count()} CUDA devices")
    return chosen


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Turn auto or a name into a dtype: bfloat16 on CUDA, float32 elsewhere.

    Raises:
        ConfigError: not one of the names.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    chosen: torch.dtype = getattr(torch, dtype)
    return chosen


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """All noise of one video, float32 on the CPU, so that it depends on the seed alone and not on the device.

    Args:
        seed: 0..2^63-1. torch's CPU generator looks at the low 32 bits only; larger seeds are hashed into them, or
            7 and 7 + 2^32 would be the same video. Seeds below 2^32 are what torch.manual_seed makes of them.
        shape: of the result.
    """
    if seed >= 2**32:
        seed = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=4).digest(), "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


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


def _attention_shape(bundle: Bundle) -> AttentionShape:
    native, config = bundle.spec.native, bundle.transformer.config
    _, *latent = latent_shape(bundle.vae, native.height, native.width, native.num_frames)
    return AttentionShape(
        num_tokens=math.prod(size // patch for size, patch in zip(latent, config.patch_size, strict=True)),
        num_heads=config.num_attention_heads,
        head_width=config.attention_head_dim,
    )


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator has no exception of its own.
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class _StageClock:
    """Adds the time since the last stop to a stage; waits for the device first, or the time would be the next one's."""

    def __init__(self, device: str) -> None:
        self.milliseconds = dict.fromkeys(("text", "denoise", "decode", "encode"), 0.0)
        self._synchronize: Callable[[], Any] = torch.cuda.synchronize if device != "cpu" else _nothing
        self._last_s = time.perf_counter()

    def stop(self, stage: str) -> None:
        self._synchronize()
        now_s = time.perf_counter()
        self.milliseconds[stage] += 1000 * (now_s - self._last_s)
        self._last_s = now_s


def _nothing(*_: object) -> None:
    pass
