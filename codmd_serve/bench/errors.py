"""Writes how far reduced precision and other threads are off: `python -m codmd_serve.bench.errors --out docs/results`.

Needs no GPU. float16 convolutions are emulated on a CPU as tensor cores have them: float16 in and out, float32 sums.
fp8 products multiply the rounded factors in float32, which is exact. Errors are |difference| / |reference|.

Legend: L latents, N tokens.
"""

import argparse
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from codmd_serve.bench.lossy import capped_psnr_db, outputs, some
from codmd_serve.bench.repeat import repeated, thread_table
from codmd_serve.bench.weights import PROMPTS
from codmd_serve.config import DEFAULT_CRF, GenerateParams, default_bundle_path
from codmd_serve.engine import Engine
from codmd_serve.files import write_text
from codmd_serve.loading import load_engine
from codmd_serve.wan import vae as vae_module
from codmd_serve.wan.fp8 import LAYERS, Float8Linear, quantize_blocks
from codmd_serve.wan.fused import Sum
from codmd_serve.wan.transformer import FewStepTransformer, sdpa
from codmd_serve.wan.vae import StreamingDecoder

WAN_WIDTHS = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "text_dim": 512, "freq_dim": 256}
NUM_RANDOM_LAYERS = 2
RANDOM_LATENTS = (1, 16, 2, 16, 16)
NO_WORK = ("empty", "_unsafe_view")  # operators that touch no numbers
COMMAND = "python -m codmd_serve.bench.errors --out docs/results"
PREFACE = f"""\
# Errors of reduced precision

Written by `{COMMAND}`; made on a CPU, where float16 convolutions and fp8 products are emulated with float32 sums.
Errors are |difference| / |reference| against float32, PSNR is that of the uint8 frames, the worst of the requests.
What this page says of digests holds for one kind of processor, one version of torch and one ffmpeg.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write precision.md; return 0."""
    parser = argparse.ArgumentParser(prog="codmd_serve.bench.errors", description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="docs/results", metavar="FOLDER")
    parser.add_argument("--bundle", default=str(default_bundle_path()), metavar="FOLDER")
    parser.add_argument("--requests", default=2, type=int, metavar="N", help="that errors are measured on, at most 4")
    options = parser.parse_args(arguments)
    engine = load_engine(Path(options.bundle), "cpu", "float32", vae_dtype="float32", lossy="fp8-emulated")
    params = native_params(engine)
    asked = some(params, PROMPTS)[: options.requests]
    wanted = [outputs(engine, given) for given in asked]
    parts = [
        PREFACE,
        vae_table(engine, [latents for latents, _ in wanted]),
        layer_table(engine.bundle.vae, wanted[0][0]),
        traffic_table(engine, wanted[0][0]),
        fp8_table(engine, wanted, asked),
        thread_table(repeated(Path(options.bundle), asked[0])),
    ]
    Path(options.out).mkdir(parents=True, exist_ok=True)
    write_text(Path(options.out) / "precision.md", "\n".join(parts))
    return 0


def native_params(engine: Engine) -> GenerateParams:
    """Return a request of the native shape."""
    facts = engine.facts
    return GenerateParams(
        prompt=PROMPTS[0],
        seed=0,
        height=facts.height,
        width=facts.width,
        num_frames=facts.num_frames,
        fps=facts.fps,
        crf=DEFAULT_CRF,
    )


@contextlib.contextmanager
def emulated_half() -> Iterator[None]:
    """Let convolutions of a CPU take float16, with float32 sums."""
    convolve = vae_module.convolve

    def emulated(hidden: Tensor, weight: Tensor, bias: Tensor | None, padding: list[int]) -> Tensor:
        if hidden.dtype != torch.float16:
            return convolve(hidden, weight, bias, padding)
        wide = None if bias is None else bias.float()
        return convolve(hidden.float(), weight.float(), wide, padding).half()

    vae_module.convolve = emulated
    try:
        yield
    finally:
        vae_module.convolve = convolve


def decoded(vae: Any, latents: Tensor, dtype: torch.dtype) -> Tensor:
    """Return all frames that a decoder in `dtype` makes, (T, H, W, 3) uint8."""
    with emulated_half():
        return torch.cat([chunk[0] for chunk in decoder_of(vae, dtype).frames(latents)])


def decoder_of(vae: Any, dtype: torch.dtype) -> StreamingDecoder:
    """Return a decoder of its own weights in `dtype`."""
    decoder = StreamingDecoder(copy.deepcopy(vae))
    decoder.set_dtype(dtype)
    return decoder


def vae_table(engine: Engine, latents: Sequence[Tensor]) -> str:
    """PSNR of the VAE per dtype, from the same latents."""
    lines = ["## VAE, embedded", "", "| dtype | PSNR, worst of the requests |", "|---|---|"]
    vae = engine.bundle.vae
    wanted = [decoded(vae, given, torch.float32) for given in latents]
    for dtype in (torch.float16, torch.bfloat16):
        pairs = zip(latents, wanted, strict=True)
        psnr_db = min(capped_psnr_db(decoded(vae, given, dtype), want) for given, want in pairs)
        name = str(dtype).removeprefix("torch.")
        kept = ", last convolution in float32" if dtype == torch.bfloat16 else ""
        lines.append(f"| {name}{kept} | {psnr_db:.1f} dB |")
    return "\n".join(lines) + "\n"


def layer_table(vae: Any, latents: Tensor) -> str:
    """Error of what enters every norm of the first chunk, in order of depth."""
    runs = {dtype: activations(vae, latents, dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    lines = [
        "## VAE, per layer, first chunk",
        "",
        "| norm | channels | largest | float16 | bfloat16 |",
        "|---|---|---|---|---|",
    ]
    for index, want in enumerate(runs[torch.float32]):
        errors = [relative(runs[dtype][index], want) for dtype in (torch.float16, torch.bfloat16)]
        cells = " | ".join(f"{error:.1e}" for error in errors)
        lines.append(f"| {index} | {want.shape[1]} | {float(want.abs().max()):.3g} | {cells} |")
    return "\n".join(lines) + "\n"


def activations(vae: Any, latents: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return what enters every norm of the first chunk, residuals added, in float32."""
    decoder, seen = decoder_of(vae, dtype), list[Tensor]()
    run = decoder.run_norm

    def watched(given: Sum, weight: Tensor | None, out: Tensor | None, keep_total: bool) -> Tensor | None:
        total = run(given, weight, out, True)
        assert total is not None
        seen.append(total.float().clone())
        return total if keep_total else None

    decoder.run_norm = watched
    with emulated_half():
        next(decoder.frames(latents))
    return seen


def relative(got: Tensor, want: Tensor) -> float:
    """Return |got - want| / |want|."""
    return float((got - want).norm() / want.norm())


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch gives it no types
    """Counts operators that compute or copy, and the bytes of their inputs and outputs; views are free."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = self.num_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [each for each in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(each, Tensor)]
        if not func.is_view and not any(name in str(func) for name in NO_WORK):
            self.calls += 1
            self.num_bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        return out


def traffic_of(run: Callable[[], object]) -> Traffic:
    """Count one run."""
    traffic = Traffic()
    with torch.no_grad(), traffic:
        run()
    return traffic


def traffic_table(engine: Engine, latents: Tensor) -> str:
    """Operators and bytes of a whole decode: diffusers' decoder, ours plain, ours in bfloat16."""
    vae = engine.bundle.vae
    runs: dict[str, Callable[[], object]] = {"diffusers, float32": lambda: vae.decode(latents)}
    for dtype in (torch.float32, torch.bfloat16):
        decoder = decoder_of(vae, dtype)
        runs[f"ours, {str(dtype).removeprefix('torch.')}"] = lambda decoder=decoder: list(decoder.frames(latents))  # type: ignore[misc]
    lines = [
        f"## VAE, operators and bytes of {latents.shape[2]} latent frames",
        "",
        "| decoder | operators that compute or copy | bytes in and out |",
        "|---|---|---|",
    ]
    for name, run in runs.items():
        counted = traffic_of(run)
        lines.append(f"| {name} | {counted.calls:,} | {counted.num_bytes / 2**20:,.0f} MiB |")
    return (
        "\n".join(lines) + "\n\nOn CUDA a norm with bias, residual and SiLU is one kernel; here it counts its parts.\n"
    )


@torch.inference_mode()
def fp8_table(engine: Engine, wanted: Sequence[tuple[Tensor, Tensor]], asked: Sequence[GenerateParams]) -> str:
    """Error of fp8 in one step at Wan's widths, and of whole requests of the embedded student."""
    lines = ["## fp8, lossy", "", "| network | scales | flow of one step | latents | PSNR |", "|---|---|---|---|---|"]
    random = random_network()
    latents = torch.randn(RANDOM_LATENTS, generator=torch.Generator().manual_seed(0))
    prompt = random.encode_prompt(
        torch.randn(1, 32, WAN_WIDTHS["text_dim"], generator=torch.Generator().manual_seed(1))
    )
    want = random(latents, 0, prompt)
    for per_tensor in (False, True):
        error = relative(quantized(random, per_tensor)(latents, 0, prompt), want)
        what = f"random weights, {NUM_RANDOM_LAYERS} layers of Wan 1.3B"
        lines.append(f"| {what} | {'tensor' if per_tensor else 'row'} | {error:.2g} | | |")
    exact = engine.loop
    for per_tensor in (False, True):
        engine.loop = copy.copy(exact)
        engine.loop.transformer = quantized(engine.transformer, per_tensor)
        got = [outputs(engine, given) for given in asked]
        latents_off = max(relative(ours[0], theirs[0]) for ours, theirs in zip(got, wanted, strict=True))
        psnr_db = min(capped_psnr_db(ours[1], theirs[1]) for ours, theirs in zip(got, wanted, strict=True))
        noise, text = torch.randn_like(wanted[0][0]), engine.embed(asked[0].prompt).prompt
        flow = relative(engine.loop.transformer(noise, 0, text), exact.transformer(noise, 0, text))
        scales = "tensor" if per_tensor else "row"
        lines.append(f"| embedded student, 4 steps | {scales} | {flow:.2g} | {latents_off:.2g} | {psnr_db:.1f} dB |")
    engine.loop = exact
    return "\n".join(lines) + "\n"


def random_network() -> FewStepTransformer:
    """Return a network of Wan 1.3B's widths with random weights and few layers."""
    torch.manual_seed(0)
    sizes = {**WAN_WIDTHS, "num_layers": NUM_RANDOM_LAYERS, "in_channels": 16, "out_channels": 16}
    return FewStepTransformer(WanTransformer3DModel(patch_size=(1, 2, 2), **sizes).eval(), [1000.0])


def quantized(network: FewStepTransformer, per_tensor: bool) -> FewStepTransformer:
    """Return a twin in fp8."""
    twin = network.twin(sdpa)
    if not per_tensor:
        quantize_blocks(twin)
        return twin
    for block in twin.blocks:
        for name in LAYERS:
            setattr(block, name, Float8Linear(getattr(block, name), per_tensor=True))
    return twin


if __name__ == "__main__":
    raise SystemExit(main())
