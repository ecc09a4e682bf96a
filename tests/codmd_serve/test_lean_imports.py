"""What a serving process imports: not the model zoos of its libraries, and the same video all the same."""

import hashlib
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from codmd_serve.config import GenerateParams
from codmd_serve.loading import load_engine

PARAMS = GenerateParams(prompt="a red circle moves right", seed=7, height=32, width=48, num_frames=9, fps=16, crf=18)
# Hundreds of modules each, that nothing in serving calls.
NEVER = (
    "torch._dynamo.eval_frame",
    "torch._inductor.compile_fx",
    "scipy",
    "sklearn",
    "diffusers.schedulers",
    "diffusers.models.unets.unet_2d",
    "diffusers.models.transformers.transformer_flux",
    "diffusers.pipelines",
    "transformers.generation.utils",
    "transformers.loss.loss_for_object_detection",
    "gradio",
    "matplotlib",
)
MAKE_A_VIDEO = """
import hashlib, sys
from pathlib import Path
from codmd_serve.lean_imports import import_lean
load_engine = import_lean("codmd_serve.loading").load_engine
from codmd_serve.config import GenerateParams
engine = load_engine(Path(sys.argv[1]), "cpu", threads=1)
engine.generate(GenerateParams(**{params}), Path(sys.argv[2]))
print(*sorted(name for name in {never} if name in sys.modules))
"""
LATER = """
from codmd_serve.lean_imports import import_lean
import_lean("codmd_serve.loading")
from diffusers import FluxTransformer2DModel, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers import WanTransformer3DModel as again
from transformers import GenerationMixin
import torch._dynamo
assert again is WanTransformer3DModel and WanPipeline and FluxTransformer2DModel and GenerationMixin.generate
assert torch._dynamo.eval_frame and torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
"""
BROKEN = """
import codmd_serve.lean_imports as lean
lean.STAND_INS["transformers.modeling_utils"] = {}
assert lean.import_lean("codmd_serve.loading").load_engine
from transformers import PreTrainedModel
assert PreTrainedModel.from_pretrained
"""


def run(code: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip() + done.stderr


def test_a_serving_process_imports_no_zoo_and_makes_the_same_video(tiny_bundle: Path, tmp_path: Path) -> None:
    code = MAKE_A_VIDEO.format(params=asdict(PARAMS), never=NEVER)
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_bundle), str(tmp_path / "lean.mp4")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "" and "imports=full" not in done.stderr
    load_engine(tiny_bundle, "cpu", threads=1).generate(PARAMS, tmp_path / "full.mp4")
    lean, full = (hashlib.sha256((tmp_path / f"{name}.mp4").read_bytes()).hexdigest() for name in ("lean", "full"))
    assert lean == full


@pytest.mark.parametrize("code", [LATER])
def test_what_is_imported_later_is_the_real_thing(code: str) -> None:
    assert "imports=full" not in run(code)


def test_a_library_that_does_not_allow_it_is_imported_as_usual() -> None:
    assert "imports=full" in run("import logging; logging.basicConfig()\n" + BROKEN)
