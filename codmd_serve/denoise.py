"""The four steps of one student on one device: eager, with compiled blocks, or as one CUDA graph per shape.

Knows neither text nor pixels. The mode is chosen at load by timing one step. A graph removes the time the device waits
for the host: nothing on large videos, most of the time on small ones. Compiled blocks are tried only where our own
kernels do not already fuse the elementwise parts: without Triton, and in fp8.

Legend: S steps, B batch, C channels, F latent frames, H and W latent rows and columns, L prompt positions.
"""

import contextlib
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from codmd_serve.config import EXECUTIONS
from codmd_serve.cuda_graph import MAX_WARNED_SHAPES, CudaRecorder, GraphKey, Graphs, Record
from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from codmd_serve.sampler import OnStep, rollout
from codmd_serve.verdicts import Verdicts
from codmd_serve.wan.checkpoint import StudentSpec
from codmd_serve.wan.text import fingerprint
from codmd_serve.wan.transformer import FewStepTransformer, PromptCache

# Prompts are padded up to one of these, so that three graphs serve every prompt. Longer ones cost next to nothing:
# a video has 32,760 tokens.
PROMPT_SIZES = (32, 128, 512)
MAX_TIME_RATIO = 0.98  # of the time without it; a graph or compiled block slower than this is not worth its memory
NUM_TIMED = 3

logger = logging.getLogger(__name__)


def choose_execution(name: str, device: torch.device) -> str:
    """Resolve an execution mode for `device`.

    Raises:
        ConfigError: not one of the names.
    """
    if name not in EXECUTIONS:
        raise ConfigError(f"execution must be one of {', '.join(EXECUTIONS)}, got {name!r}")
    # On a CPU nothing waits for the host, and compiling takes longer than most videos.
    return "eager" if name == "auto" and device.type == "cpu" else name


class DenoiseLoop:
    """The denoising loop of a student: noise and a prompt in, predicted clean latents out.

    Args:
        transformer: built for the timesteps of `spec`.
        spec: how to sample it.
        execution: eager, graph, compiled, compiled+graph, or auto for what is fastest.
        record: records graphs; tests have one of their own.
        verdicts: of earlier loads, for auto; None remembers nothing.

    Attributes `execution` and `fallback` say, after `warm`, what the warmed shapes run and why it is not what was
    asked for; both are fit for /health.
    """

    def __init__(
        self,
        transformer: FewStepTransformer,
        spec: StudentSpec,
        *,
        execution: str = "eager",
        record: Record | None = None,
        verdicts: Verdicts | None = None,
    ) -> None:
        self.transformer, self.spec = transformer, spec
        self.execution, self.fallback = "eager", ""
        self._asked = execution
        identity = "" if execution == "eager" else fingerprint(transformer)
        self._verdicts = verdicts or Verdicts(None)
        self._record = record or CudaRecorder(transformer.device)
        self._graphs = Graphs(self._record, identity=identity)
        self._compiled: set[GraphKey] = set()
        self._warned: set[GraphKey] = set()

    @property
    def prompt_sizes(self) -> tuple[int, ...]:
        """Return the lengths that prompts are padded to before encoding; empty when any length works."""
        return () if self._asked == "eager" else PROMPT_SIZES

    def __call__(self, noise: Tensor, prompt: PromptCache, on_step: OnStep | None = None) -> Tensor:
        """Denoise.

        Args:
            noise: (S, B, C, F, H, W) float32 on the device.
            prompt: of the same B prompts.
            on_step: as in `rollout`; with a graph it is called once, after the last step.

        Returns:
            x0_pred, (B, C, F, H, W) float32.
        """
        tensors = _tensors(prompt)
        if len(self._graphs):
            x0_pred = self._graphs.replay(noise, *tensors)
            if x0_pred is not None:
                if on_step is not None:
                    on_step(len(self.spec.timesteps) - 1, x0_pred)
                return x0_pred
        return self._run(noise, prompt, on_step, self._is_compiled(noise, tensors))

    def _is_compiled(self, noise: Tensor, tensors: tuple[Tensor, ...]) -> bool:
        """Return whether blocks were compiled for these shapes; if only others were, warn once per shape."""
        if not self._compiled:
            return False
        key = self._graphs.key(noise, *tensors)
        is_compiled = key in self._compiled
        # Graphs, where there are some, have said it already.
        if (
            not is_compiled
            and not len(self._graphs)
            and key not in self._warned
            and len(self._warned) < MAX_WARNED_SHAPES
        ):
            self._warned.add(key)
            logger.warning("execution=eager reason=not_warmed shape=%s", "x".join(map(str, noise.shape)))
        return is_compiled

    def _run(self, noise: Tensor, prompt: PromptCache, on_step: OnStep | None, is_compiled: bool) -> Tensor:
        # The rollout calls once per step, in order; what a timestep does to the network was computed at load.
        step_indices = iter(range(len(self.spec.timesteps)))

        def denoise(latents: Tensor, _timestep_B: Tensor, _prompt_embeds: Tensor) -> Tensor:
            flow_pred: Tensor = self.transformer(latents, next(step_indices), prompt, is_compiled)
            return flow_pred

        spec = self.spec
        return rollout(
            denoise,
            noise,
            noise.new_empty(0),
            spec.sigmas,
            spec.timesteps,
            sampler=spec.sampler,
            on_step=on_step,
        )

    @torch.inference_mode()
    def warm(self, noise: Tensor, prompts: Sequence[PromptCache]) -> None:
        """Compile and record for the shape of `noise` and each prompt length, where requested and faster.

        Args:
            noise: (S, B, C, F, H, W), any values.
            prompts: one of every length that is served.
        """
        # The longest first: in the pool of its graph the shorter ones find room.
        ordered = sorted(prompts, key=lambda prompt: prompt.keys_values[0][0].shape[1], reverse=True)
        plan = self._asked if self._asked != "auto" else self._known_plan() or self._race(noise, ordered[0])
        if plan.startswith("compiled"):
            self._warm_compiled(noise, ordered)
        if plan.endswith("graph"):
            self._warm_graphs(noise, ordered)
        names = ("compiled" if self._compiled else "", "graph" if len(self._graphs) else "")
        self.execution = "+".join(filter(None, names)) or "eager"
        if self._asked == "auto" and not self.fallback:
            self._verdicts.put("execution", self.execution)
        logger.info("execution=%s asked=%s fallback=%r", self.execution, self._asked, self.fallback)

    def _known_plan(self) -> str | None:
        return self._verdicts.get("execution", EXECUTIONS[1:])

    def _race(self, noise: Tensor, prompt: PromptCache) -> str:
        """Time one step eager, compiled (where inductor fuses what our kernels do not) and as a graph."""
        latents, transformer = noise[0], self.transformer
        least_s = self._timed(lambda: transformer(latents, 0, prompt, False))
        names = []
        if not transformer.rows.is_fused or transformer.prefers_compiled:
            compiled_s = self._compiled_step_s(latents, prompt)
            if compiled_s <= MAX_TIME_RATIO * least_s:
                names.append("compiled")
                least_s = compiled_s
        graphs = Graphs(self._record)
        keeps = transformer.rotary_table(noise.shape[1:])
        is_compiled = bool(names)

        def one_step(latents: Tensor, *tensors: Tensor) -> Tensor:
            flow_pred: Tensor = transformer(latents, 0, _prompt_cache(tensors), is_compiled)
            return flow_pred

        tensors = _tensors(prompt)
        if graphs.record(one_step, latents, *tensors, keeps=keeps):
            if self._timed(lambda: graphs.replay(latents, *tensors)) <= MAX_TIME_RATIO * least_s:
                names.append("graph")
        else:
            self.fallback = graphs.failure
        return "+".join(names) or "eager"

    def _compiled_step_s(self, latents: Tensor, prompt: PromptCache) -> float:
        """Return the seconds of a compiled step; infinite, with the reason in `fallback`, where compiling fails."""
        try:
            with _compiler_notices():
                self.transformer.compile_blocks()
                return self._timed(lambda: self.transformer(latents, 0, prompt, True))
        except Exception as error:  # without a compiler, or where it does not know an operator, eager execution is left
            self._refuse_compiled(error)
            return float("inf")

    def _refuse_compiled(self, error: Exception) -> None:
        # The first line of a failed backend names the backend; the cause is in the error that it wraps.
        cause = getattr(error, "inner_exception", None)
        self.fallback = f"blocks not compiled: {first_line(cause if isinstance(cause, Exception) else error)}"
        logger.warning("execution=eager reason=%r", self.fallback)

    def _warm_compiled(self, noise: Tensor, prompts: Sequence[PromptCache]) -> None:
        try:
            with _compiler_notices():
                self.transformer.compile_blocks()
                for prompt in prompts:
                    # Modulations are tensors: what one step compiles, all steps run.
                    self.transformer(noise[0], 0, prompt, True)
        except Exception as error:
            self._refuse_compiled(error)
            return
        self._compiled |= {self._graphs.key(noise, *_tensors(prompt)) for prompt in prompts}

    def _warm_graphs(self, noise: Tensor, prompts: Sequence[PromptCache]) -> None:
        is_compiled = bool(self._compiled)

        def loop(noise: Tensor, *tensors: Tensor) -> Tensor:
            return self._run(noise, _prompt_cache(tensors), None, is_compiled)

        keeps = self.transformer.rotary_table(noise.shape[1:])
        for prompt in prompts:
            if not self._graphs.record(loop, noise, *_tensors(prompt), keeps=keeps):
                self.fallback = self._graphs.failure
                return

    def _timed(self, run: Callable[[], object]) -> float:
        """Return the median seconds of a run, after one warm-up run."""
        is_cuda = self.transformer.device.type == "cuda"
        times_s = []
        for _ in range(NUM_TIMED + 1):
            start_s = time.perf_counter()
            run()
            if is_cuda:
                torch.cuda.synchronize(self.transformer.device)
            times_s.append(time.perf_counter() - start_s)
        return statistics.median(times_s[1:])


@contextlib.contextmanager
def _compiler_notices() -> Iterator[None]:
    """Ignore inductor's notices: float32 products could use TF32, but are float32 on purpose; it uses torch.jit."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores")
        warnings.filterwarnings("ignore", message="`torch.jit.script", category=DeprecationWarning)
        yield


def _tensors(prompt: PromptCache) -> tuple[Tensor, ...]:
    """Flatten a prompt cache into tensors, as inputs of a graph."""
    flat = tuple(tensor for pair in prompt.keys_values for tensor in pair)
    return flat if prompt.logit_bias is None else (*flat, prompt.logit_bias)


def _prompt_cache(tensors: Sequence[Tensor]) -> PromptCache:
    """Invert `_tensors`: keys and values come in pairs, so an odd last tensor is the bias."""
    num_paired = len(tensors) // 2 * 2
    pairs = tuple(zip(tensors[:num_paired:2], tensors[1:num_paired:2], strict=True))
    return PromptCache(pairs, tensors[-1] if len(tensors) % 2 else None)
