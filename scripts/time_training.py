"""Times training iterations of a recipe, full size or scaled down, with random weights; prints seconds and memory.

    python scripts/time_training.py --recipe wan_1_3b --batch-size 1
    torchrun --nproc-per-node 8 scripts/time_training.py --recipe wan_14b --batch-size 8

Nothing is downloaded: the transformer has the recipe's published architecture, or one that --scale gives, and random
weights, which take as long as trained ones. The networks are built, sharded and trained by the code of
`codmd-distill train`; prompts are random embeddings, VAE and text encoder are not needed. Prints one line of JSON.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from codmd_serve.device import choose_device
from distill.config import RECIPES, DistillConfig, with_overrides
from distill.data.prompts import PromptData, prompts_in_memory
from distill.methods.registry import recipe_config
from distill.networks.base import latent_grid, open_base
from distill.networks.build import build_networks
from distill.networks.precision import resolve_precision
from distill.parallel.processes import Processes, process_group
from distill.plan.architecture import PUBLISHED, PUBLISHED_VAE_SCALES
from distill.run.trainer import Trainer

PROMPT_TOKENS = 120
NUM_PROMPTS = 64
GIB = 1024**3


def write_random_base(folder: Path, architecture: Mapping[str, Any]) -> None:
    """Write the transformer part of a pipeline folder with random bfloat16 weights."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel.from_config(dict(architecture))
    transformer.to(torch.bfloat16).save_pretrained(folder / "transformer")


def random_prompts(width: int) -> PromptData:
    """Make embeddings of prompts of a usual length, and of the negative prompt."""
    rng = torch.Generator().manual_seed(0)
    offsets = torch.arange(NUM_PROMPTS + 2) * PROMPT_TOKENS
    return prompts_in_memory(torch.randn(int(offsets[-1]), width, generator=rng), offsets)


def scaled(architecture: Mapping[str, Any], scale: int) -> dict[str, Any]:
    """Divide layers, heads, feed-forward and text widths by `scale`; every layer stays of its kind."""
    changed = dict(architecture)
    for name in ("num_layers", "num_attention_heads", "ffn_dim", "text_dim"):
        changed[name] = max(architecture[name] // scale, 1)
    return changed


def measure(trainer: Trainer, iterations: int) -> dict[str, Any]:
    """Run iterations, the first of which also warms up, and return their seconds and the memory at its peak."""
    device, seconds, losses = trainer.device, [], []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for _ in range(iterations):
        start = time.perf_counter()
        metrics = trainer.iterate()
        losses.append({name: float(value) for name, value in metrics.items() if name.endswith("_loss")})
        seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    else:
        peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with_student = [value for value, turn in zip(seconds, losses, strict=True) if "student_loss" in turn]
    critic_only = [value for value, turn in zip(seconds, losses, strict=True) if "student_loss" not in turn]
    return {
        "first_iteration_s": round(seconds[0], 4),
        "student_and_critic_s": [round(value, 4) for value in with_student[1:] or with_student],
        "critic_only_s": [round(value, 4) for value in critic_only],
        "peak_memory_gib": round(peak / GIB, 3),
        "updates": dict(trainer.updates),
        "num_skipped": trainer.num_skipped,
    }


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time training iterations with random weights.")
    parser.add_argument("--recipe", choices=[name for name in RECIPES if name.startswith("wan")], default="wan_1_3b")
    parser.add_argument("--batch-size", type=int, default=1, help="samples of one update, over all processes")
    parser.add_argument("--iterations", type=int, default=6, help="from the first, which trains the student too")
    parser.add_argument("--scale", type=int, default=1, help="divide the sizes of the network by this")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", dest="settings", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    return parser


def run(args: argparse.Namespace, config: DistillConfig, processes: Processes, folder: Path) -> dict[str, Any]:
    architecture = scaled(PUBLISHED[config.base], args.scale)
    processes.on_rank0(lambda: write_random_base(folder, architecture))
    config = with_overrides(config, [f"base={folder}"])
    patch = tuple(architecture["patch_size"])
    shape = latent_grid(config.native, architecture["in_channels"], patch, *PUBLISHED_VAE_SCALES)
    networks = build_networks(config, open_base(config.base), processes.device, processes)
    data = random_prompts(architecture["text_dim"])
    trainer = Trainer(config, networks, data, shape, processes.device, processes=processes)
    on_cuda = processes.device.type == "cuda"
    about = {
        "recipe": config.recipe,
        "method": config.method,
        "device": torch.cuda.get_device_name(processes.device) if on_cuda else "cpu",
        "torch": torch.__version__,
        "processes": processes.world_size,
        "parameters": sum(item.numel() for item in networks.student.parameters()),
        "latents": list(shape),
        "batch_size": config.batch_size,
        "precision": config.precision,
    }
    return about | measure(trainer, args.iterations)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    device = choose_device(args.device)
    # Other than in the recipe, whatever the batch: a batch of one has no relations between samples.
    small = ["copula.weight_batch=0"] if args.batch_size < 3 else []
    config = with_overrides(recipe_config(args.recipe), [f"batch_size={args.batch_size}", *small, *args.settings])
    config = with_overrides(config, [f"precision={resolve_precision(config.precision, device)}"])
    with process_group(device, config) as processes, tempfile.TemporaryDirectory() as own:
        folders = [own]
        if processes.world_size > 1:
            torch.distributed.broadcast_object_list(folders, src=0)
        result = run(args, config, processes, Path(folders[0]))
        if processes.is_rank0:
            print(json.dumps(result))


if __name__ == "__main__":
    main()
