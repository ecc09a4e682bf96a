"""One device, one set of modules: GenerateParams in, an mp4 out, stage by stage; knows nothing of queues or HTTP.

Legend: B batch (1 here), C channels, F latent frames, H and W latent rows and columns, L prompt positions, D width.
"""

import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from codmd_serve.config import DEFAULT_CRF, GenerateParams, ModelFacts
from codmd_serve.denoise import DenoiseLoop, choose_execution
from codmd_serve.device import choose_device, choose_dtype
from codmd_serve.errors import CheckpointError, CodmdError, GenerationError
from codmd_serve.files import first_line
from codmd_serve.stages import Download, Span, StageClock, memory_errors
from codmd_serve.threads import HandOver, Memory
from codmd_serve.video import find_ffmpeg, write_video
from codmd_serve.wan.attention import pad_prompt_embeds
from codmd_serve.wan.checkpoint import Bundle, load_bundle, native_attention_shape
from codmd_serve.wan.fp8 import check_quantization, quantize_blocks
from codmd_serve.wan.kernels import LOSSY, check_attention_name, choose_attention
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
        timings_ms: milliseconds that the request spent in text, denoise, decode and encode. Encoding runs beside
            decoding in a process of its own, so `encode` is only what was waited for; a prompt that was prepared
            ahead costs no time in `text`.
        warnings: one sentence each, about what the model could not take as asked.
        spans: when the stages were really at work, one for each decoded chunk; that of a text lies before the request
            when the prompt was known already.
    """

    timings_ms: dict[str, float]
    warnings: list[str]
    spans: list[Span] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Text:
    prompt: PromptCache
    warnings: list[str]
    span: Span


class Engine:
    """A warm student on one device. One owner, who begins one video after the other; only `prepare` is for any thread.

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
        # Embedding and warnings together: a fast tokenizer keeps its padding in itself, so it is for one thread.
        self.embed = Memory(self._embed_uncached, size=NUM_PROMPTS_READY)
        self._tail: HandOver[Download, GenerateResult] | None = None
        device = transformer.device
        self._downloads = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def _embed_uncached(self, prompt: str) -> _Text:
        start_s = time.perf_counter()
        embeds_BLD = pad_prompt_embeds(self.embedder(prompt), self.loop.prompt_sizes)
        cache = self.transformer.encode_prompt(embeds_BLD)
        warnings = prompt_warnings(self.bundle.tokenizer, prompt)
        if warnings and self.bundle.spec.vocabulary_note:
            warnings.append(self.bundle.spec.vocabulary_note)
        return _Text(cache, warnings, Span("text", start_s, time.perf_counter()))

    def prepare(self, prompt: str) -> None:
        """Encode the prompt of a later request, from any thread, beside the one that the device is at.

        A text encoder that is lent to the device is left alone: the memory there is the running request's.
        """
        if self.embedder.lend_to is None:
            self.embed(prompt)

    def generate(self, params: GenerateParams, path: Path, on_progress: OnProgress | None = None) -> GenerateResult:
        """Make one video; the same params give the same bytes, whatever ran before or runs beside.

        Args:
            params: validated; sizes that fit the grid of the bundle.
            path: of the mp4, which appears whole or not at all.
            on_progress: called after the text, after each denoising step and after each decoded chunk.

        Raises:
            CancelledError: when on_progress raises it; nothing is written.
            GenerationError: code out_of_memory, non_finite or encode_failed.
        """
        video = self.begin(params, path, on_progress)
        try:
            return video.result()
        except BaseException as error:  # also of Ctrl-C, which finds this thread waiting for the encoder
            if self._tail is not None:
                self._tail.abandon(error)
            raise

    @torch.inference_mode()
    def begin(
        self, params: GenerateParams, path: Path, on_progress: OnProgress | None = None
    ) -> Future[GenerateResult]:
        """Do the device's part of one video and leave the rest to a thread: the next one may begin at once.

        Videos end in the order in which they began, and at most one is left to encode: a second one waits for it
        between its denoising and its decoding.

        Args:
            params, path, on_progress: as for `generate`.

        Returns:
            Ends when the mp4 is at `path`, with what `generate` returns or raises. Callbacks run in another thread.

        Raises:
            CancelledError, GenerationError: as `generate`, where the device's part fails.
        """
        report = on_progress or _nothing
        clock = StageClock(self.transformer.device)
        with memory_errors(params):
            text = self.embed(params.prompt)
            clock.stop("text")
            clock.spans[:] = [text.span]
            report("text", 1, 1)
            x0_pred = self._denoise(params, text.prompt, report)
            clock.stop("denoise")
            if self._tail is not None:
                self._tail.join()
            clock.wait("encode")
            warnings = [*text.warnings, *self._shape_warnings(params)]
            tail: HandOver[Download, GenerateResult] = HandOver(
                lambda frames: self._encoded(params, path, frames, clock, warnings)
            )
            self._tail = tail
            try:
                for download in self._decoded(params, x0_pred, clock, report):
                    tail.put(download)
                    clock.wait("encode")
            except BaseException as error:
                tail.abandon(error)
                raise
            tail.complete()
        return tail.result

    def _encoded(
        self,
        params: GenerateParams,
        path: Path,
        frames: "HandOver[Download, GenerateResult]",
        clock: StageClock,
        warnings: list[str],
    ) -> GenerateResult:
        """What is left when the device has done its part; runs in the thread of `frames`."""
        start_s = time.perf_counter()
        with memory_errors(params):
            write_video(
                (download.bytes() for download in frames),
                path,
                height=params.height,
                width=params.width,
                fps=params.fps,
                crf=params.crf,
                comment=json.dumps({"bundle": self.facts.name, **asdict(params)}),
                on_start=frames.on_abandon,
            )
        clock.wait("encode")
        spans = [*clock.spans, Span("encode", start_s, time.perf_counter())]
        return GenerateResult(timings_ms=clock.milliseconds, warnings=warnings, spans=spans)

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
        self, params: GenerateParams, x0_pred: Tensor, clock: StageClock, report: OnProgress
    ) -> Iterator[Download]:
        num_done = 0
        for frames_BTHWC in self.decoder.frames(x0_pred):
            frames_THWC = frames_BTHWC[0]
            if frames_THWC.shape[1:] != (params.height, params.width, 3):
                made = "x".join(map(str, frames_THWC.shape[1:]))
                raise GenerationError(f"the VAE made frames of {made}, its config promises another size", "wrong_vae")
            download = Download(frames_THWC, self._downloads)
            num_done += len(frames_THWC)
            clock.stop("decode")
            report("decode", num_done, params.num_frames)
            yield download

    def _shape_warnings(self, params: GenerateParams) -> list[str]:
        native = self.bundle.spec.native
        asked = (params.height, params.width, params.num_frames)
        if asked == (native.height, native.width, native.num_frames):
            return []
        return [
            f"trained at {native.width}x{native.height} with {native.num_frames} frames, "
            f"asked for {params.width}x{params.height} with {params.num_frames}: expect less of it"
        ]


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
    try:
        warm_s, max_video_px = _warm(engine)
    except CodmdError:
        raise
    except Exception as error:  # parts that load but do not work together fail anywhere, with any exception
        raise GenerationError(
            f"{path} loads but cannot make its own native video: {first_line(error)}", "warm_up"
        ) from error
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


def _nothing(*_: object) -> None:
    pass
