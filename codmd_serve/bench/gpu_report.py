"""Measures a CUDA device in a few minutes: `python -m codmd_serve.bench.gpu_report`.

Needs torch, diffusers and transformers, but none of the server's packages, no network and no disk space: weights are
random. Every number is written as soon as it is measured. A part that fails becomes a line with its error, and the next
part runs. The table in the docs is made from the JSON.

    {"versions": {...}, "device": name, "numbers": [{"at_s": seconds, "name": name, ...}, ...]}
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import platform
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from codmd_serve import __version__
from codmd_serve.bench.floor import measure_ceilings, transformer_work, vae_work
from codmd_serve.bench.weights import PROMPTS, Preset, built, preset, random_tokenizer
from codmd_serve.chunk_graphs import warm_chunks
from codmd_serve.config import GenerateParams, ModelFacts
from codmd_serve.denoise import DenoiseLoop
from codmd_serve.engine import Engine
from codmd_serve.files import first_line, write_json
from codmd_serve.wan import rows
from codmd_serve.wan.checkpoint import Bundle, NativeShape, StudentSpec
from codmd_serve.wan.fp8 import quantize_blocks
from codmd_serve.wan.kernels import MATH, AttentionShape, choose_attention, installed_kernels, measure_kernels
from codmd_serve.wan.precision import psnr
from codmd_serve.wan.transformer import FewStepTransformer
from codmd_serve.wan.vae import StreamingDecoder, latent_shape
from codmd_serve.warm import measured_convolutions

LIMIT_S = 420.0
NUM_TIMED_POSITIONS = 128  # of the prompts that are timed


class GpuReport:
    """Measurements in order; the JSON is written after each of them.

    Args:
        path: of the JSON.
        device: that is measured.
        limit_s: no part is begun that is expected to end later.
    """

    def __init__(self, path: Path, device: torch.device, limit_s: float) -> None:
        self.device = device
        self._path, self._limit_s, self._start_s = path, limit_s, time.monotonic()
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        versions = {
            "codmd-serve": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "CUDA": torch.version.cuda or "",
        }
        self._content: dict[str, Any] = {"versions": versions, "device": name, "numbers": []}

    def tell(self, name: str, **values: Any) -> None:
        """Record a measurement and write the file."""
        entry = {"at_s": round(time.monotonic() - self._start_s, 1), "name": name, **values}
        print(json.dumps(entry), flush=True)
        self._content["numbers"].append(entry)
        write_json(self._path, self._content)

    @contextlib.contextmanager
    def part(self, name: str, expected_s: float) -> Iterator[bool]:
        """Yield whether there is time for a part; turn its exception into a line of the report."""
        left_s = self._limit_s - (time.monotonic() - self._start_s)
        if left_s < expected_s:
            self.tell(name, skipped=f"{left_s:.0f} s left, {expected_s:.0f} s expected")
            yield False
            return
        try:
            yield True
        except Exception as error:  # a part that fails must not take the next ones along
            traceback.print_exc()
            self.tell(name, error=first_line(error))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def milliseconds(self, run: Callable[[], object], num_runs: int = 3, num_warm: int = 1) -> float:
        """Return the median time of a function on the device, after warm-up runs."""
        for _ in range(num_warm):
            run()
        times_ms = []
        for _ in range(num_runs):
            self.synchronize()
            start_s = time.perf_counter()
            run()
            self.synchronize()
            times_ms.append(1000 * (time.perf_counter() - start_s))
        return statistics.median(times_ms)

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclasses.dataclass(slots=True)
class Models:
    """Modules that earlier parts leave for later ones; None where a part did not run."""

    plan: Preset
    latents: Tensor
    transformer: FewStepTransformer | None = None
    vae: Any = None
    engine: Engine | None = None


def main(words: Sequence[str] | None = None) -> int:
    """Run the report; return 0."""
    parser = argparse.ArgumentParser(prog="python -m codmd_serve.bench.gpu_report", description=__doc__)
    parser.add_argument("--out", default="gpu-report.json", help="the JSON")
    parser.add_argument("--preset", default="wan-1.3b", help="wan-1.3b, wan-14b or tiny")
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="seconds for everything")
    options = parser.parse_args(words)
    measure_device(Path(options.out), options.preset, torch.device(options.device), options.limit_s)
    return 0


@torch.no_grad()
def measure_device(path: Path, name: str, device: torch.device, limit_s: float = LIMIT_S) -> None:
    """Run every part that fits in the time limit.

    Args:
        path: of the JSON; its folder exists.
        name: of a preset of random weights.
        device: CUDA; a CPU for the tests.
        limit_s: no part is begun that is expected to end later.
    """
    report, plan = GpuReport(path, device, limit_s), preset(name)
    torch.manual_seed(0)
    native = plan.native
    with torch.device("meta"):
        shape = latent_shape(AutoencoderKLWan(**plan.vae), native.height, native.width, native.num_frames)
    models = Models(plan, torch.randn(1, *shape, device=device))
    for part, expected_s in PARTS.items():
        with report.part(part.__name__.strip("_"), expected_s) as goes:
            if goes:
                part(report, models)
    report.tell("end")


def _vae(report: GpuReport, models: Models) -> None:
    """Decode in half precision, then in float32; report milliseconds, memory and the PSNR between them."""
    device, plan = report.device, models.plan
    models.vae = built(AutoencoderKLWan, plan.vae, device, torch.float32).eval().requires_grad_(False)
    models.vae.decoder.conv_out.weight.mul_(0.1)
    half = torch.float16 if device.type == "cuda" else torch.bfloat16
    work = vae_work(models.vae.config, tuple(models.latents.shape[1:]), half)
    frames = {}
    for dtype in (half, torch.float32):
        decoder = StreamingDecoder(copy.deepcopy(models.vae))
        decoder.set_dtype(dtype)

        def decode(decoder: StreamingDecoder = decoder) -> Tensor:
            return torch.cat(list(decoder.frames(models.latents)), dim=1)

        start_s = time.perf_counter()
        with measured_convolutions():
            frames[dtype] = decode()
        first_s = time.perf_counter() - start_s
        _reset_peak(device)
        took_ms = report.milliseconds(decode, 2, 0)
        report.tell(
            "decode",
            dtype=str(dtype),
            ms=took_ms,
            first_s=first_s,
            tflops=work.flop / took_ms / 1e9,
            peak_gib=_peak_gib(device),
            problem=decoder.problem,
        )
        if dtype == half:
            _chunk_graphs(report, decoder, models.latents, decode())
    report.tell("decode-psnr", db=psnr(frames[half], frames[torch.float32]))


def _chunk_graphs(report: GpuReport, decoder: StreamingDecoder, latents: Tensor, want: Tensor) -> None:
    """Decode by CUDA graphs of the chunks; report milliseconds, memory that they keep, and whether frames are equal."""
    device = report.device

    def record() -> tuple[str, str]:
        return warm_chunks(decoder, latents, "graph")

    before_bytes, start_s = _reserved_bytes(device), time.perf_counter()
    name, fallback = record()
    record_s = time.perf_counter() - start_s
    kept_gib = (_reserved_bytes(device) - before_bytes) / 2**30

    def decode() -> Tensor:
        return torch.cat(list(decoder.frames(latents)), dim=1)

    is_equal = torch.equal(decode(), want)
    took_ms = report.milliseconds(decode, 2, 0)
    report.tell(
        "decode-graph",
        ms=took_ms,
        execution=name,
        fallback=fallback,
        record_s=record_s,
        kept_gib=kept_gib,
        equal=is_equal,
    )
    decoder.replays = None


def _transformer(report: GpuReport, models: Models) -> None:
    """Time one step and the whole loop, fused and plain, and report their difference."""
    device, plan = report.device, models.plan
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    start_s = time.perf_counter()
    network = FewStepTransformer(built(WanTransformer3DModel, plan.transformer, device, dtype), plan.grid.timesteps)
    models.transformer = network
    report.synchronize()
    report.tell("build", s=time.perf_counter() - start_s, is_fused=network.rows.is_fused, problem=network.problem)
    shape = _attention_shape(models)
    network_attention = choose_attention("auto", shape, device, dtype)
    report.tell("attention-chosen", kernel=network_attention.name)
    for block in network.blocks:
        block.attend = network_attention.attend
    prompt = network.encode_prompt(torch.randn(1, NUM_TIMED_POSITIONS, network.config.text_dim))
    work = transformer_work(network.config, tuple(models.latents.shape[1:]), dtype)
    took_ms = report.milliseconds(lambda: network(models.latents, 1, prompt))
    report.tell("step", ms=took_ms, tflops=work.flop / took_ms / 1e9)
    got, chosen = network(models.latents, 1, prompt), network.rows
    network.rows = rows.PLAIN
    want = network(models.latents, 1, prompt)
    plain_ms = report.milliseconds(lambda: network(models.latents, 1, prompt), 2, 0)
    error = float((got.float() - want.float()).norm() / want.float().norm())
    report.tell("step-plain", ms=plain_ms, relative_difference=error)
    network.rows = chosen
    loop = DenoiseLoop(network, _random_spec(plan))
    noise = torch.randn(len(plan.grid.timesteps), *models.latents.shape, device=device)
    loop_ms = report.milliseconds(lambda: loop(noise, prompt), 2, 0)
    report.tell("loop", ms=loop_ms, tflops=len(noise) * work.flop / loop_ms / 1e9)


def _end_to_end(report: GpuReport, models: Models) -> None:
    """Time text to mp4 through the engine, prompt by prompt."""
    if models.transformer is None or models.vae is None:
        raise RuntimeError("needs the parts before it")
    device, plan = report.device, models.plan
    native, dtype = plan.native, models.transformer.dtype
    encoder = built(UMT5EncoderModel, {"config": UMT5Config(**plan.text_encoder)}, device, dtype)
    bundle = Bundle(
        path=Path("random"),
        spec=_random_spec(plan),
        tokenizer=random_tokenizer(),
        text_encoder=encoder.eval().requires_grad_(False),
        transformer=None,
        vae=models.vae,
    )
    engine = Engine(bundle, models.transformer, _model_facts(report, models))
    engine.start_overlap()  # the thread that decodes is warmed here
    engine.overlaps = False
    if device.type == "cuda":
        engine.decoder.set_dtype(torch.float16)
    with tempfile.TemporaryDirectory(prefix="codmd-report-") as folder, measured_convolutions():
        for seed, prompt in enumerate(PROMPTS[:4]):
            video = Path(folder) / "report.mp4"
            params = _params(native, prompt, seed)
            start_s = time.perf_counter()
            result = engine.generate(params, video)
            total_ms = 1000 * (time.perf_counter() - start_s)
            # The first one of a shape lets cuDNN measure its kernels.
            report.tell(
                "text-to-mp4",
                run=seed,
                ms=total_ms,
                stages_ms=result.timings_ms,
                mp4_bytes=video.stat().st_size,
                peak_memory_mb=result.peak_memory_mb,
            )
    models.engine = engine


def _overlap(report: GpuReport, models: Models) -> None:
    """Time three requests back to back, each decoded before the next is denoised and while the next is denoised."""
    engine = models.engine
    if engine is None:
        raise RuntimeError("needs the end-to-end part")
    asked = [_params(models.plan.native, prompt, seed) for seed, prompt in enumerate(PROMPTS[:3])]
    with tempfile.TemporaryDirectory(prefix="codmd-report-") as folder:
        for overlaps in (False, True, False, True):
            engine.overlaps = overlaps
            _reset_peak(report.device)
            start_s = time.perf_counter()
            videos = [engine.begin(params, Path(folder) / f"{params.seed}.mp4") for params in asked]
            results = [video.result() for video in videos]
            total_ms = 1000 * (time.perf_counter() - start_s)
            report.tell(
                "requests",
                overlap=overlaps,
                number=len(asked),
                ms=total_ms,
                stages_ms=[result.timings_ms for result in results],
                peak_gib=_peak_gib(report.device),
            )


def _params(native: NativeShape, prompt: str, seed: int) -> GenerateParams:
    return GenerateParams(
        prompt=prompt,
        seed=seed,
        height=native.height,
        width=native.width,
        num_frames=native.num_frames,
        fps=native.fps,
        crf=18,
    )


def _ceilings(report: GpuReport, _models: Models) -> None:
    """Measure the rates of a large matrix product and a large copy."""
    for dtype in (torch.bfloat16, torch.float32):
        ceilings = measure_ceilings(report.device, dtype)
        report.tell(
            "ceilings", dtype=str(dtype), tflops=ceilings.flop_per_s / 1e12, gb_per_s=ceilings.bytes_per_s / 1e9
        )


def _attention(report: GpuReport, models: Models) -> None:
    """Time every installed attention kernel on the shape of the network."""
    shape = _attention_shape(models)
    dtype = torch.bfloat16 if report.device.type == "cuda" else torch.float32
    flop = 4 * shape.num_tokens**2 * shape.num_heads * shape.head_width
    for name in (name for name in installed_kernels(report.device) if name != MATH):
        (entry,) = measure_kernels([name], shape, report.device, dtype)
        tflops = flop / entry.self_ms / 1e9 if entry.self_ms else None
        report.tell(
            "attention",
            kernel=entry.name,
            self_ms=entry.self_ms,
            prompt_ms=entry.prompt_ms,
            problem=entry.problem,
            tflops=tflops,
        )


def _diffusers(report: GpuReport, models: Models) -> None:
    """Time one forward pass and one decode of the stock modules."""
    device, plan = report.device, models.plan
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    stock = built(WanTransformer3DModel, plan.transformer, device, dtype).eval()
    latents = models.latents.to(dtype)
    embeds = torch.randn(1, 512, plan.transformer["text_dim"], device=device, dtype=dtype)
    timestep = torch.tensor([900.0], device=device)

    def step() -> object:
        return stock(latents, timestep, embeds, return_dict=False)

    report.tell("diffusers-step", ms=report.milliseconds(step, 2))
    vae = built(AutoencoderKLWan, plan.vae, device, torch.float32).eval()
    report.tell("diffusers-decode", ms=report.milliseconds(lambda: vae.decode(models.latents, return_dict=False), 1))


def _fp8(report: GpuReport, models: Models) -> None:
    """Time a step with fp8 products, eager and compiled, and report its error; last, because it changes the network."""
    network, device = models.transformer, report.device
    if network is None:
        raise RuntimeError("needs the transformer")
    prompt = network.encode_prompt(torch.randn(1, NUM_TIMED_POSITIONS, network.config.text_dim))
    want = network(models.latents, 1, prompt).float()
    quantize_blocks(network)
    for name, is_compiled in (("step-fp8", False), ("step-fp8-compiled", True)):
        if is_compiled:
            # A CPU is there to rehearse this: its compiler takes minutes.
            network.compile_blocks("inductor" if device.type == "cuda" else "eager")

        def step(is_compiled: bool = is_compiled) -> Tensor:
            flow_pred: Tensor = network(models.latents, 1, prompt, is_compiled)
            return flow_pred

        start_s = time.perf_counter()
        got = step().float()
        first_s = time.perf_counter() - start_s
        took_ms = report.milliseconds(step, 2, 0)
        error = float((got - want).norm() / want.norm())
        report.tell(name, ms=took_ms, first_s=first_s, relative_difference=error, problem=network.problem)


# Most valuable first; the seconds that an H200 is expected to need.
PARTS: dict[Callable[[GpuReport, Models], None], float] = {
    _vae: 35.0,
    _transformer: 25.0,
    _end_to_end: 20.0,
    _overlap: 20.0,
    _ceilings: 5.0,
    _attention: 15.0,
    _diffusers: 20.0,
    _fp8: 40.0,
}


def _attention_shape(models: Models) -> AttentionShape:
    config = models.plan.transformer
    _, _, frames, height, width = models.latents.shape
    patch = config.get("patch_size", (1, 2, 2))
    return AttentionShape(
        num_tokens=(frames // patch[0]) * (height // patch[1]) * (width // patch[2]),
        num_heads=config["num_attention_heads"],
        head_width=config["attention_head_dim"],
    )


def _random_spec(plan: Preset) -> StudentSpec:
    return StudentSpec(
        base="random",
        sigmas=plan.grid.sigmas,
        timesteps=plan.grid.timesteps,
        sampler="sde",
        native=plan.native,
        method="random",
        base_model="random",
        step=0,
        ema=False,
        config_sha256="",
        package_version=__version__,
    )


def _model_facts(report: GpuReport, models: Models) -> ModelFacts:
    native = models.plan.native
    return ModelFacts(
        name="random",
        device=report.device.type,
        dtype="",
        attention="",
        execution="eager",
        num_steps=len(models.plan.grid.timesteps),
        height=native.height,
        width=native.width,
        num_frames=native.num_frames,
        fps=native.fps,
        size_multiple=16,
        max_side_px=2**14,
        frame_multiple=4,
        max_num_frames=2**12 + 1,
        service_s=0.0,
        load_s=0.0,
    )


def _reserved_bytes(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


if __name__ == "__main__":
    raise SystemExit(main())
