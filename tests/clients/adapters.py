"""The exported adapters of a LoRA student, read by diffusers' own `load_lora_weights`, that is by PEFT.

`make clients` runs it with PEFT beside our packages. It trains a few updates on the embedded world, exports adapters
and bundle, and compares what both predict.
"""

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from diffusers import WanPipeline, WanTransformer3DModel

from codmd_serve.wan.checkpoint import load_module

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = (
    "batch_size=1 lora_student_rank=4 lora_critic_rank=4 student_every_iterations=1 optimizer.student_lr=0.01 "
    "ema.decay=0 num_captions=8 bundle_dtype=fp32"
)
MOST_SHARE = 1e-4


def main() -> int:
    """Return 0 where the adapters change the teacher as the merged bundle does."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        distill = [str(Path(sys.executable).with_name("codmd-distill"))]
        train = ["train", "--recipe", "shapeworld", "--method", "dmd", "--out", "run", "--seed", "0"]
        train += ["--max-iterations", "4", "--preview-every", "0", "--set", *SETTINGS.split()]
        subprocess.run([*distill, *train], cwd=folder, check=True, timeout=300)
        export = ["export", "--run", "run", "--format", "lora", "--out", "adapters"]
        subprocess.run([*distill, *export], cwd=folder, check=True, timeout=300)
        pipeline = WanPipeline.from_pretrained(ROOT / "weights" / "shapeworld", torch_dtype=torch.float32)
        teacher = _flow(pipeline.transformer)
        pipeline.load_lora_weights(folder / "adapters")
        adapted = _flow(pipeline.transformer)
        merged = _flow(load_module(WanTransformer3DModel, folder / "run" / "bundle", "transformer").float())
    change, error = float((adapted - teacher).abs().max()), float((adapted - merged).abs().max())
    versions = " ".join(f"{name} {importlib.metadata.version(name)}" for name in ("diffusers", "peft"))
    print(f"{versions}: the adapters move the flow by up to {change:.3g}; from our merged bundle {error:.1e}")
    return 0 if error < MOST_SHARE * change else 1


@torch.no_grad()
def _flow(transformer: WanTransformer3DModel) -> torch.Tensor:
    rng, config = torch.Generator().manual_seed(0), transformer.config
    latents = torch.randn(1, config.in_channels, 7, 6, 6, generator=rng)
    prompt = torch.randn(1, 9, config.text_dim, generator=rng)
    flow: torch.Tensor = transformer(latents, torch.tensor([900.0]), prompt, return_dict=False)[0]
    return flow


if __name__ == "__main__":
    sys.exit(main())
