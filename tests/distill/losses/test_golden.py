"""Values and gradients of the losses equal those of the CoDMD authors' code on recorded inputs."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from distill.losses.copula import copula_terms
from distill.losses.dmd import dmd_direction, dmd_loss, guided_flow

GOLDEN = Path(__file__).parents[2] / "golden"
SIGMA = 0.7


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    tensors = load_file(GOLDEN / "losses.safetensors")
    return {name: tensor.transpose(1, 2).double() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def scalars() -> dict[str, float]:
    return {k: v for k, v in json.loads((GOLDEN / "losses.json").read_text()).items() if isinstance(v, float)}


def relative_error(got: Tensor, want: Tensor) -> float:
    return float(((got.double() - want).norm() / want.norm()).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "use_batch", "use_frame"), [("both", 1, 1), ("frame", 0, 1), ("batch", 1, 0)])
def test_copula_equals_reference(
    golden: dict[str, Tensor],
    scalars: dict[str, float],
    name: str,
    use_batch: int,
    use_frame: int,
    dtype: torch.dtype,
) -> None:
    student = golden["student_x0_BFCHW"].to(dtype, copy=True).requires_grad_()
    terms = copula_terms(
        student,
        golden["teacher_x0_BFCHW"].to(dtype),
        golden["critic_x0_BFCHW"].to(dtype),
        use_frame=bool(use_frame),
        use_batch=bool(use_batch),
        temperature=0.1,
        reference_compat=True,
    )
    loss = terms.frame + terms.batch
    loss.backward()
    assert student.grad is not None
    assert float(loss.detach()) == pytest.approx(scalars[f"copula_{name}_loss"], rel=1e-5)
    assert relative_error(student.grad, golden[f"copula_{name}_grad"]) < 1e-5


def test_dmd_equals_reference_at_guidance_scale_4_5(golden: dict[str, Tensor], scalars: dict[str, float]) -> None:
    student = golden["student_x0_BFCHW"].clone().requires_grad_()
    latents = golden["student_x0_BFCHW"]
    flows = {name: (latents - golden[f"{name}_x0_BFCHW"]) / SIGMA for name in ("teacher", "teacher_uncond", "critic")}
    teacher_flow = guided_flow(flows["teacher"], flows["teacher_uncond"], scalars["dmd_standard_guidance_scale"])
    direction = dmd_direction(student, latents, teacher_flow, flows["critic"], SIGMA)
    loss = dmd_loss(student, direction)
    loss.backward()
    assert student.grad is not None
    assert relative_error(direction, golden["dmd_direction"]) < 1e-5
    assert float(loss.detach()) == pytest.approx(scalars["dmd_loss"], rel=1e-5)
    assert relative_error(student.grad, golden["dmd_loss_grad"]) < 1e-5


def test_guidance_scale_is_the_reference_scale_plus_one(scalars: dict[str, float]) -> None:
    cond, uncond = torch.randn(2, 1, 2, 3, 4, 4, dtype=torch.float64)
    theirs = cond + scalars["dmd_reference_scale"] * (cond - uncond)
    ours = guided_flow(cond, uncond, scalars["dmd_standard_guidance_scale"])
    torch.testing.assert_close(ours, theirs)
