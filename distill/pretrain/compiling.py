"""torch.compile of the transformer's blocks without waiting for it: a child process fills the compile cache first.

Compiling forward and backward of a block takes a minute on a GPU machine, as long as the VAE trains. The child does it
meanwhile, on random weights of the same shapes; the training process then compiles from the cache in seconds. Until
the child is done blocks run eager, and for ever if it fails.
"""

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from codmd_serve.errors import ConfigError
from codmd_serve.files import first_line
from distill.networks.build import compile_blocks
from distill.pretrain.config import TransformerConfig

POLL_EVERY_CALLS = 20
COMPILER_EXIT_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileJob:
    """What a child compiles.

    Attributes:
        config: of the transformer.
        latent_shape: (B, C, F, H, W).
        prompt_shape: (B, L, D).
        precision: fp32 or bf16.
        device: on which it will train.
    """

    config: TransformerConfig
    latent_shape: tuple[int, ...]
    prompt_shape: tuple[int, ...]
    precision: str
    device: str


class BlockCompiler:
    """Compiles blocks at their first call, or when a child process has filled the cache; falls back to eager.

    Attributes:
        state: "waiting" for the child, "ready" to compile, "compiled" or "eager".
    """

    def __init__(self, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.child, self.calls, self.start = child, 0, time.monotonic()
        self.state = "ready" if child is None else "waiting"

    def call(self, transformer: WanTransformer3DModel, predict: Callable[[], Tensor]) -> Tensor:
        """Return predict(), which calls `transformer`; compile its blocks before when they can be."""
        self._poll()
        self.calls += 1
        if self.state != "ready":
            return predict()
        start = time.monotonic()
        try:
            compile_blocks(transformer)
            output = predict()
        except ConfigError:
            raise
        except Exception as error:  # inductor, Triton and the C++ compiler each raise their own kinds
            for block in transformer.blocks:
                block._compiled_call_impl = None
            self.state = "eager"
            logger.warning("blocks run eager: they could not be compiled: %s", first_line(error))
            return predict()
        self.state = "compiled"
        logger.info("blocks compiled at call=%d in=%.1f s", self.calls, time.monotonic() - start)
        return output

    def _poll(self) -> None:
        if self.state != "waiting" or self.child is None or self.calls % POLL_EVERY_CALLS:
            return
        code = self.child.poll()
        if code is None:
            return
        self.state = "ready" if code == 0 else "eager"
        taken_s = time.monotonic() - self.start
        if code == 0:
            logger.info("compile cache filled within=%.0f s", taken_s)
        else:
            logger.warning("blocks run eager: the process that compiles ahead ended with code %d", code)


@contextmanager
def compile_ahead(job: CompileJob) -> Iterator[BlockCompiler]:
    """Yield a compiler whose cache a child process is filling; leaving ends the child."""
    command = [sys.executable, "-m", "distill.pretrain.compiling", json.dumps(asdict(job))]
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        yield BlockCompiler(child)
    finally:
        if child.poll() is None:
            child.terminate()
            try:
                child.wait(COMPILER_EXIT_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                child.kill()
        child.wait()


def fill_cache(job: CompileJob) -> None:
    """Compile forward and backward of one block: all blocks share its code."""
    from distill.networks.build import denoiser
    from distill.pretrain.teacher import build_transformer, prepare_transformer

    device = torch.device(job.device)
    width = job.prompt_shape[2]
    one_block = TransformerConfig(**{**asdict(job.config), "num_layers": 1})
    transformer = build_transformer(one_block, job.latent_shape[1], width)
    prepare_transformer(transformer, job.precision, device).train()
    compile_blocks(transformer)
    latents = torch.randn(job.latent_shape, device=device)
    timestep = torch.full((job.latent_shape[0],), 500.0, device=device)
    embeds = torch.randn(job.prompt_shape, device=device)
    flow = denoiser(transformer, job.precision)(latents, timestep, embeds)
    flow.float().square().mean().backward()  # type: ignore[no-untyped-call]
    if device.type == "cuda":
        torch.cuda.synchronize()


def main(argv: list[str]) -> int:
    """Fill the cache for the job in argv[0]."""
    fields = json.loads(argv[0])
    fields["config"] = TransformerConfig(**fields["config"])
    for name in ("latent_shape", "prompt_shape"):
        fields[name] = tuple(fields[name])
    torch.set_num_threads(1)
    fill_cache(CompileJob(**fields))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
