"""Fixtures of the distiller's tests: the tiny pipeline of tests/conftest.py as a run's base."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel

from distill.config import DistillConfig, with_overrides
from distill.methods.registry import recipe_config
from distill.networks.base import open_base
from distill.networks.build import Networks, build_networks

CAPTIONS = [
    "a red circle moves right quickly on a black background",
    "a blue ring stays still on a black background",
    "a white triangle moves right on a black background and a red ring",
    "a red ring",
    "a blue circle moves right quickly on a white background",
]


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "captions.txt"
    path.write_text("\n".join(CAPTIONS) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def tiny_config(tiny_base: Path, prompt_file: Path) -> DistillConfig:
    """A run of seconds: 32x32, 9 frames, so latents of (4, 3, 4, 4), batches of 3."""
    return with_overrides(
        recipe_config(),
        [
            f"base={tiny_base}",
            f"prompts={prompt_file}",
            'native={"height":32,"width":32,"num_frames":9,"fps":16}',
            "batch_size=3",
            "max_iterations=6",
            "student_every_iterations=2",
            "save_every_iterations=2",
            "log_every_iterations=2",
            "precision=fp32",
            "bundle_dtype=fp32",
            "copula.weight_batch=1",
            "optimizer.student_lr=1e-3",
            "optimizer.critic_lr=1e-3",
        ],
    )


@pytest.fixture
def tiny_networks(tiny_config: DistillConfig) -> Networks:
    return build_networks(tiny_config, open_base(tiny_config.base), torch.device("cpu"))


@pytest.fixture(scope="session")
def big_teacher(tiny_pipeline: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline whose transformer is wider, deeper and of more heads than tiny_base's, all other parts the same."""
    own = dict(tiny_pipeline.transformer.config)
    torch.manual_seed(5)
    transformer = WanTransformer3DModel.from_config(own | {"num_attention_heads": 4, "num_layers": 3, "ffn_dim": 80})
    parts = {
        name: part for name, part in tiny_pipeline.components.items() if name not in ("transformer", "transformer_2")
    }
    folder = tmp_path_factory.mktemp("teachers") / "big"
    WanPipeline(**parts, transformer=transformer.eval()).save_pretrained(folder)
    return folder
