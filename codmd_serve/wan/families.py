"""The published families of few-step Wan students: how to recognise their files and how to sample them.

The one table behind `convert`, its --help and docs/how-to/import.md. Imports nothing heavy.
"""

from collections.abc import Callable
from dataclasses import dataclass

from codmd_serve.grid import StepGrid, causvid_grid, codmd_14b_grid, rcm_grid, wan_1_3b_grid, wan_14b_grid

WIDTH_1_3B, WIDTH_14B = 1536, 5120
BASE_1_3B, BASE_14B = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-14B-Diffusers"
# What a student of this width was most likely distilled from, where nobody says it.
BASES = {WIDTH_1_3B: BASE_1_3B, WIDTH_14B: BASE_14B}


@dataclass(frozen=True, kw_only=True, slots=True)
class MethodSampling:
    """How the students of a published method are sampled; `grid` takes the width of the network."""

    sampler: str
    grid: Callable[[int], StepGrid]


# Sampler and step grid by method; all of them re-noise the predicted x0. For LightX2V that is the scheduler it serves
# its Wan2.1 students with, lightx2v/models/schedulers/wan/step_distill/scheduler.py@21ef47a: WanStepDistillScheduler
# adds fresh noise in step_post. Only its Wan22StepDistillScheduler steps along the flow, as LightX2V-train samples.
METHOD_SAMPLING = {
    "codmd": MethodSampling(
        sampler="sde", grid=lambda width: codmd_14b_grid() if width >= WIDTH_14B else wan_1_3b_grid()
    ),
    "causvid": MethodSampling(sampler="sde", grid=lambda _: causvid_grid()),
    "self-forcing": MethodSampling(sampler="sde", grid=lambda _: wan_14b_grid()),
    "rcm": MethodSampling(sampler="sde", grid=lambda _: rcm_grid()),
    "fastwan": MethodSampling(sampler="sde", grid=lambda _: causvid_grid()),
    "lightx2v": MethodSampling(sampler="sde", grid=lambda _: wan_14b_grid()),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """A kind of file.

    Attributes:
        looks: what it is, in words.
        files: published files of this kind.
        keys: what its tensors are called, which is how it is recognised.
        method: who most likely made it.
        ema: whether the weights are most likely a moving average.
        needs: what has to be said on the command line; empty for nothing.
    """

    looks: str
    files: str
    keys: str
    method: str
    ema: bool
    needs: str = ""


FAMILIES = {
    "generator": Family(
        looks="a training checkpoint of CoDMD or CausVid (generator)",
        files="CoDMD .pt, CausVid bidirectional .pt",
        keys="generator: model.blocks.*",
        method="codmd",
        ema=False,
    ),
    "generator_ema": Family(
        looks="a training checkpoint of Self-Forcing (generator_ema)",
        files="Self-Forcing-Plus .pt",
        keys="generator_ema: model.blocks.*",
        method="self-forcing",
        ema=True,
        needs="--bidirectional",
    ),
    "rcm": Family(
        looks="rCM weights (linear patch embedding)",
        files="rCM .pt",
        keys="net.blocks.*, patch_embedding as a matrix",
        method="rcm",
        ema=True,
    ),
    "original": Family(
        looks="weights in Wan's own names, as LightX2V publishes",
        files="LightX2V .safetensors, ComfyUI .safetensors",
        keys="blocks.*.self_attn.q, head.modulation",
        method="lightx2v",
        ema=False,
    ),
    "diffusers": Family(
        looks="weights in diffusers' names, as FastWan publishes",
        files="FastWan FullAttn folder, FastGen folder with dmd2_config, codmd-distill export --format pipeline",
        keys="blocks.*.attn1.to_q, condition_embedder.*",
        method="fastwan",
        ema=False,
    ),
    "lora": Family(
        looks="a LoRA, merged into the base",
        files="LightX2V LoRA, musubi, PEFT and diffusers adapters",
        keys="*.lora_A, *.lora_down, *.diff, lora_unet_*",
        method="lightx2v",
        ema=False,
    ),
}


def table_rows() -> list[tuple[str, ...]]:
    """Return the table of `convert --help` and docs/how-to/import.md, its heading first."""
    rows: list[tuple[str, ...]] = [
        ("published files", "recognised by", "taken as", "sampler", "steps", "has to be said")
    ]
    for family in FAMILIES.values():
        sampling = METHOD_SAMPLING[family.method]
        grids = {_steps(sampling.grid(width)): size for width, size in ((WIDTH_1_3B, "1.3B"), (WIDTH_14B, "14B"))}
        steps = "; ".join(f"{size}: {grid}" for grid, size in grids.items()) if len(grids) > 1 else next(iter(grids))
        rows.append((family.files, family.keys, family.method, sampling.sampler, steps, family.needs))
    return rows


def markdown_table() -> str:
    """Return `table_rows` in Markdown."""
    heading, *rows = table_rows()
    lines = [heading, ("---",) * len(heading), *(tuple(cell.replace("*", r"\*") for cell in row) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def plain_table() -> str:
    """Return `table_rows` for a terminal: a paragraph for each kind of file."""
    heading, *rows = table_rows()
    paragraphs = []
    for files, keys, method, sampler, steps, needs in rows:
        said = f"; needs {needs}" if needs else ""
        paragraphs.append(f"  {files}\n      {keys}\n      {method}, {sampler}, timesteps {steps}{said}")
    return f"{heading[0]}, {heading[1]}, {heading[2]}:\n" + "\n".join(paragraphs)


def _steps(grid: StepGrid) -> str:
    return " ".join(f"{timestep:.4g}" for timestep in grid.timesteps)
