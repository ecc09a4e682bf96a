"""Runs one student on one device: GenerateParams in, an mp4 out, stage by stage; knows nothing of queues or HTTP.

Where the teacher is loaded too, both share text encoder, VAE and everything around the denoising loop.

Legend: B batch (1 here), C channels, F latent frames, H and W latent rows and columns, L prompt positions, D width.
"""

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from codmd_serve.config import GenerateParams, ModelFacts
from codmd_serve.denoise import DenoiseLoop
from codmd_serve.errors import CancelledError, GenerationError
from codmd_serve.overlap import DecodeThread, OverlapBudget
from codmd_serve.stages import HostCopy, Span, StageClock, begin_memory_peak, device_errors, peak_memory_mb
from codmd_serve.threads import BoundedQueue, LruCache
from codmd_serve.verdicts import Verdicts
from codmd_serve.video import write_video
from codmd_serve.wan.attention import pad_prompt_embeds
from codmd_serve.wan.checkpoint import Bundle
from codmd_serve.wan.precision import joined
from codmd_serve.wan.preview import animate, preview_frames
from codmd_serve.wan.teacher import GuidedPrompt, Teacher
from codmd_serve.wan.text import PromptEmbedder, prompt_warnings
from codmd_serve.wan.transformer import FewStepTransformer, PromptCache
from codmd_serve.wan.vae import StreamingDecoder, latent_shape

ResultT = TypeVar("ResultT")

NUM_PROMPTS_READY = 8  # keys and values of one prompt are up to 94 MB at the size of Wan 1.3B

# (stage, done, total): text 1 of 1, denoise k of num_steps, decode and then encode frames of num_frames. May raise
# CancelledError. Called again with the same numbers while the encoder is waited for, and from another thread then.
OnProgress = Callable[[str, int, int], None]
# A WebP animation of x0_pred after a denoising step, before the progress of that step.
OnPreview = Callable[[bytes], None]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateResult:
    """Timings, warnings and peak memory of a finished video.

    Attributes:
        timings_ms: milliseconds that the request spent in text, denoise, decode and encode. Encoding runs beside
            decoding in a process of its own, so `encode` is only what was waited for; a prompt that was prepared
            ahead costs no time in `text`.
        warnings: one sentence each, about what the model could not take as asked.
        spans: when the stages were really at work, one for each decoded chunk; that of a text lies before the request
            when the prompt was known already.
        peak_memory_mb: allocated on the device while it was at work, also for an overlapped video; or resident in this
            process on a CPU.
    """

    timings_ms: dict[str, float]
    warnings: list[str]
    spans: list[Span] = field(default_factory=list)
    peak_memory_mb: float = 0.0


@dataclass(frozen=True, slots=True)
class _Text:
    prompt: PromptCache | GuidedPrompt
    warnings: list[str]
    span: Span


@dataclass(frozen=True, slots=True)
class _Video:
    """A denoised video on its way to a file."""

    params: GenerateParams
    path: Path
    x0_pred: Tensor
    clock: StageClock
    report: OnProgress
    warnings: list[str]


Tail = BoundedQueue[HostCopy, GenerateResult]


class Engine:
    """A warm student on one device. One thread begins videos one after the other; only `prepare` is thread-safe.

    Args:
        bundle: its transformer is not used; its weights went into `transformer`.
        transformer: built for the timesteps of the bundle.
        facts: as reported to clients.
        execution, verdicts: as `DenoiseLoop` takes them; take effect at warm-up.
        lossy: a twin of `transformer` with lossy layers or kernels, for requests that allow it; None is none.
        embedder: of the bundle's text encoder; None makes one without a disk cache.

    Attributes:
        teacher: for params that name its fingerprint; None, which it is at first, serves the student only.
        overlaps: whether `begin` returns when a video is denoised, and decodes it while the next one is denoised.
        budget: decides whether two videos fit; None, which it is at first, counts nothing.
    """

    def __init__(
        self,
        bundle: Bundle,
        transformer: FewStepTransformer,
        facts: ModelFacts,
        *,
        execution: str = "eager",
        verdicts: Verdicts | None = None,
        embedder: PromptEmbedder | None = None,
        lossy: FewStepTransformer | None = None,
    ) -> None:
        self.bundle = bundle
        self.transformer = transformer
        self.execution = execution
        self.loop = DenoiseLoop(transformer, bundle.spec, execution=execution, verdicts=verdicts)
        # Raced anew at every load: the verdicts are those of the exact engine.
        self.lossy_loop = None if lossy is None else DenoiseLoop(lossy, bundle.spec, execution=execution)
        self.decoder = StreamingDecoder(bundle.vae)
        self.facts = facts
        self.preview_map = bundle.spec.preview_map
        self.embedder = embedder or PromptEmbedder(bundle.tokenizer, bundle.text_encoder)
        self.teacher: Teacher | None = None
        # Embedding and warnings together: a fast tokenizer keeps its padding in itself, so it is for one thread.
        self._texts = LruCache(self._embed_uncached, size=NUM_PROMPTS_READY)
        self._tail: Tail | None = None
        # Noise is drawn beside the text encoder: 26 to 44 ms on a CPU for 480 x 832 x 81.
        self._drawing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="codmd-noise")
        device = transformer.device
        self.overlaps = False
        self.budget: OverlapBudget | None = None
        self._decode_thread: DecodeThread | None = None
        self._decoding: Future[None] | None = None
        self._decoding_px = 0
        self._is_interrupted = False
        self._copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def embed(self, prompt: str, for_teacher: bool = False) -> _Text:
        """Return what the student's, or the teacher's, denoising loop needs of a prompt, from an LRU cache."""
        return self._texts((prompt, for_teacher))

    @torch.inference_mode()
    def _embed_uncached(self, key: tuple[str, bool]) -> _Text:
        prompt, for_teacher = key
        start_s = time.perf_counter()
        embeds_BLD = self.embedder(prompt)
        cache: PromptCache | GuidedPrompt
        if for_teacher:
            assert self.teacher is not None
            cache = self.teacher.encode(embeds_BLD, self.embedder(self.teacher.spec.negative_prompt))
        else:
            cache = self.transformer.encode_prompt(pad_prompt_embeds(embeds_BLD, self.loop.prompt_sizes))
        warnings = prompt_warnings(self.bundle.tokenizer, prompt, grammar=self.bundle.grammar)
        if warnings and self.bundle.spec.vocabulary_note:
            warnings.append(self.bundle.spec.vocabulary_note)
        return _Text(cache, warnings, Span("text", start_s, time.perf_counter()))

    def prepare(self, prompt: str) -> None:
        """Prefetch the prompt embeddings of a later request, from any thread, while another request runs.

        A text encoder that is lent to the device is left alone: the memory there is the running request's.
        """
        if self.embedder.lend_to is None:
            self.embed(prompt)

    def generate(self, params: GenerateParams, path: Path, on_progress: OnProgress | None = None) -> GenerateResult:
        """Make one video; the same params give the same bytes, whatever ran before or runs concurrently.

        Args:
            params: validated; sizes that fit the grid of the bundle.
            path: of the file, which appears whole or not at all.
            on_progress: called after the text, after each denoising step, after each decoded chunk, and while the
                encoder is waited for.

        Raises:
            CancelledError: when on_progress raises it; nothing is written.
            GenerationError: code out_of_memory, device_error, non_finite, wrong_vae, or one of `write_video`.
        """
        video = self.begin(params, path, on_progress)
        try:
            return video.result()
        except BaseException as error:  # also of Ctrl-C, which finds this thread waiting for the encoder
            self._is_interrupted = True
            if self._tail is not None:
                self._tail.abandon(error)
            self._finish_decoding()
            raise

    @torch.inference_mode()
    def begin(
        self,
        params: GenerateParams,
        path: Path,
        on_progress: OnProgress | None = None,
        on_preview: OnPreview | None = None,
    ) -> Future[GenerateResult]:
        """Run one video on the device and leave its encoding to a thread, so that the next one may begin.

        With `overlaps` its decoding is left to a thread too, where the memory suffices for both. Videos end in the
        order in which they began. At most one is left to decode or encode: a second one waits for it between its
        denoising and its decoding.

        Args:
            params, path, on_progress: as for `generate`.
            on_preview: is given a preview after each denoising step; with a whole-loop graph after the last one only.

        Returns:
            Ends when the mp4 is at `path`, with what `generate` returns or raises. Callbacks run in another thread.

        Raises:
            CancelledError, GenerationError: as `generate`, where what is not left to a thread fails.
        """
        report = on_progress or _nothing
        if not self._fits_beside(params):
            self._finish_decoding()
        clock = StageClock(self.transformer.device)
        begin_memory_peak(self.transformer.device)
        with device_errors(params):
            self._check_teacher(params)
            noise = self._drawing.submit(self.draw, params)
            text = self.embed(params.prompt, bool(params.teacher))
            clock.stop("text")
            clock.spans[:] = [text.span]
            report("text", 1, 1)
            x0_pred = self._denoise(params, noise.result(), text.prompt, report, on_preview)
            clock.stop("denoise")
            self._finish_decoding()
            if self._tail is not None:
                self._tail.join()
            clock.wait("encode")
            warnings = [*text.warnings, *self._shape_warnings(params)]
            video = _Video(params, path, x0_pred, clock, report, warnings)
            self._is_interrupted = False
            if self._decode_thread is None:
                return self._decode(video).result
        return self._decode_beside(video, self._decode_thread)

    def in_decode_thread(self, run: Callable[[], ResultT]) -> ResultT:
        """Run what prepares the decoder where it will decode: libraries remember their choices per thread."""
        if self._decode_thread is None:
            return run()
        return self._decode_thread.submit(run).result()

    def start_overlap(self) -> None:
        """Decode each video while the next one is denoised, from now on; before the decoder is warmed."""
        self.overlaps = True
        self._decode_thread = self._decode_thread or DecodeThread(self.transformer.device)

    def stop_overlap(self) -> None:
        """Decode each video before the next one is denoised, from now on."""
        self.overlaps = False
        if self._decode_thread is not None:
            self._decode_thread.leave_stream()

    def _fits_beside(self, params: GenerateParams) -> bool:
        """Return whether a video may be denoised while the one before it is decoded; a teacher takes its time alone."""
        if params.teacher:
            return False
        return self.budget is None or self.budget.fits(self._decoding_px, num_pixels(params))

    def _finish_decoding(self) -> None:
        """Wait until the device has decoded the video before; what became of it is told by its own future."""
        if self._decoding is not None:
            self._decoding.result()
            self._decoding = None

    def _decode_beside(self, video: _Video, thread: DecodeThread) -> Future[GenerateResult]:
        """Decode in the thread for it; wait for that where videos do not overlap."""
        outcome: Future[GenerateResult] = Future()

        def decode() -> None:
            try:
                with device_errors(video.params):
                    tail = self._decode(video)
            except BaseException as error:  # told like the failure of an encoder
                outcome.set_exception(error)
            else:
                tail.result.add_done_callback(lambda ended: _settle(outcome, ended))

        self._decoding_px = num_pixels(video.params)
        self._decoding = thread.submit(decode)
        if not self.overlaps:
            self._finish_decoding()
        return outcome

    def _decode(self, video: _Video) -> Tail:
        """Decode a video, in float32 if need be, and return the queue of its encoder, complete."""
        tail = self._decode_once(video)
        if self.decoder.has_overflowed():
            tail.abandon(GenerationError("the VAE left the range of float16", "non_finite"))
            self._widen_decoder()
            tail = self._decode_once(video)
        tail.complete()
        return tail

    def _decode_once(self, video: _Video) -> Tail:
        """Decode into the queue of a new encoder thread; the caller completes the queue."""
        tail: Tail = BoundedQueue(lambda frames: self._encoded(video, frames))
        self._tail = tail
        try:
            for host_copy in self._decoded(video):
                tail.put(host_copy)
                video.clock.wait("encode")
        except BaseException as error:
            tail.abandon(error)
            raise
        return tail

    def _widen_decoder(self) -> None:
        """Decode in float32 from now on. Its weights stay rounded to float16, which is 67 dB and cannot be seen."""
        said = "VAE in float32: the activations of a request left the range of float16"
        problem = joined(self.decoder.problem, said)
        self.decoder.set_dtype(torch.float32)
        self.decoder.problem = problem
        fallback = joined(self.facts.fallback, said)
        self.facts = replace(self.facts, vae_dtype="float32", vae_execution="eager", fallback=fallback)
        logger.warning("vae_dtype=float32 reason=overflow")

    def _encoded(self, video: _Video, frames: Tail) -> GenerateResult:
        """Encode the frames to an mp4; runs in the consumer thread of `frames`."""
        start_s = time.perf_counter()
        params, clock, num_frames = video.params, video.clock, video.params.num_frames

        def fed() -> Iterator[memoryview]:
            for num_chunks, host_copy in enumerate(frames):
                if frames.is_complete:  # before, decoding is what is reported
                    video.report("encode", num_frames * num_chunks // (num_chunks + 1), num_frames)
                yield host_copy.bytes()

        with device_errors(params):
            write_video(
                fed(),
                video.path,
                height=params.height,
                width=params.width,
                fps=params.fps,
                crf=params.crf,
                comment=json.dumps({"bundle": self.facts.name, **params.to_dict()}),
                format=params.format,
                on_start=frames.on_abandon,
                on_wait=lambda: video.report("encode", num_frames, num_frames),
            )
        clock.wait("encode")
        spans = [*clock.spans, Span("encode", start_s, time.perf_counter())]
        peak_mb = peak_memory_mb(self.transformer.device)
        return GenerateResult(
            timings_ms=clock.milliseconds, warnings=video.warnings, spans=spans, peak_memory_mb=peak_mb
        )

    def _check_teacher(self, params: GenerateParams) -> None:
        """Raise GenerationError, code no_teacher, when the params ask for a teacher that is not loaded."""
        if params.teacher and (self.teacher is None or self.teacher.fingerprint != params.teacher):
            raise GenerationError("the teacher that this job asked for is not served any more", "no_teacher")

    @torch.inference_mode()
    def denoised(self, params: GenerateParams) -> Tensor:
        """Return the predicted clean latents of one video, (B, C, F, H, W) float32 on the device.

        Raises:
            GenerationError: code out_of_memory, device_error or non_finite.
        """
        with device_errors(params):
            self._check_teacher(params)
            text = self.embed(params.prompt, bool(params.teacher))
            return self._denoise(params, self.draw(params), text.prompt, _nothing, None)

    def _denoise(
        self,
        params: GenerateParams,
        noise: Tensor,
        prompt: PromptCache | GuidedPrompt,
        report: OnProgress,
        on_preview: OnPreview | None,
    ) -> Tensor:
        num_steps = len(self.bundle.spec.timesteps)
        if self.teacher is not None and params.teacher:
            num_steps = self.teacher.spec.num_steps
        noise = noise.to(self.transformer.device, non_blocking=True)

        def on_step(step_index: int, x0_pred: Tensor) -> None:
            if on_preview is not None and self.preview_map:
                on_preview(animate(preview_frames(x0_pred, self.preview_map), params.num_frames / params.fps))
            elif x0_pred.is_cuda:
                # Kernels are queued: without this all steps would be reported at once, before the first has run.
                torch.cuda.current_stream(x0_pred.device).synchronize()
            report("denoise", step_index + 1, num_steps)

        if isinstance(prompt, GuidedPrompt):
            assert self.teacher is not None
            x0_pred = self.teacher(noise, prompt, on_step)
        else:
            loop = self.lossy_loop if params.may_be_lossy and self.lossy_loop is not None else self.loop
            x0_pred = loop(noise, prompt, on_step)
        if not bool(x0_pred.isfinite().all()):
            raise GenerationError("the network gave values that are not finite", "non_finite")
        return x0_pred

    def draw(self, params: GenerateParams) -> Tensor:
        """Draw the noise of a video, in pinned memory on CUDA so that the copy is asynchronous.

        The teacher needs its initial state only, which is the student's.
        """
        shape = latent_shape(self.bundle.vae, params.height, params.width, params.num_frames)
        num_draws = 1 if params.teacher else len(self.bundle.spec.timesteps)
        noise = draw_noise(params.seed, (num_draws, 1, *shape))
        return noise.pin_memory() if self.transformer.device.type == "cuda" else noise

    @torch.inference_mode()
    def warm_loop(self, params: GenerateParams) -> None:
        """Compile and record the denoising loops of one shape for every prompt length, where requested."""
        text_dim = self.transformer.config.text_dim
        empty = [torch.zeros(1, size, text_dim) for size in self.loop.prompt_sizes]
        if empty:
            noise = self.draw(params).to(self.transformer.device)
            prompts = [self.transformer.encode_prompt(embeds) for embeds in empty]
            for loop in filter(None, (self.loop, self.lossy_loop)):
                loop.warm(noise, prompts)

    def _decoded(self, video: _Video) -> Iterator[HostCopy]:
        params, num_done = video.params, 0
        for frames_BTHWC in self.decoder.frames(video.x0_pred):
            frames_THWC = frames_BTHWC[0]
            if frames_THWC.shape[1:] != (params.height, params.width, 3):
                made = "x".join(map(str, frames_THWC.shape[1:]))
                raise GenerationError(f"the VAE made frames of {made}, its config promises another size", "wrong_vae")
            host_copy = HostCopy(frames_THWC, self._copy_stream)
            num_done += len(frames_THWC)
            video.clock.stop("decode")
            if self._is_interrupted:
                raise CancelledError("the engine was interrupted")
            video.report("decode", num_done, params.num_frames)
            yield host_copy

    def _shape_warnings(self, params: GenerateParams) -> list[str]:
        native = self.bundle.spec.native
        asked = (params.height, params.width, params.num_frames)
        if asked == (native.height, native.width, native.num_frames):
            return []
        return [
            f"trained at {native.width}x{native.height} with {native.num_frames} frames, "
            f"asked for {params.width}x{params.height} with {params.num_frames}: expect less of it"
        ]


def draw_noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """Draw all noise of one video, float32 on the CPU, so that it depends on the seed and not on the device.

    Args:
        seed: 0..2^63-1. torch's CPU generator looks at the low 32 bits only; larger seeds are hashed into them, or
            7 and 7 + 2^32 would be the same video. Seeds below 2^32 are what torch.manual_seed makes of them.
        shape: of the result.
    """
    if seed >= 2**32:
        seed = int.from_bytes(hashlib.blake2b(seed.to_bytes(8, "little"), digest_size=4).digest(), "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def num_pixels(params: GenerateParams) -> int:
    """Return the pixels of all frames."""
    return params.height * params.width * params.num_frames


def _settle(video: Future[GenerateResult], ended: Future[GenerateResult]) -> None:
    """Give `video` the outcome of another future."""
    error = ended.exception()
    if error is None:
        video.set_result(ended.result())
    else:
        video.set_exception(error)


def _nothing(*_: object) -> None:
    pass
