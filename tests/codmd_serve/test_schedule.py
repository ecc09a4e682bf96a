"""The flow algebra: identities, dtypes, broadcasting."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from codmd_serve.schedule import add_noise, expand_sigma, flow_to_x0, shift_sigma


def latents(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(3, 4, 2, 6, 5, generator=torch.Generator().manual_seed(seed)).to(dtype)


@given(u=st.floats(0, 1), shift=st.floats(1, 20))
def test_shift_sigma_keeps_the_unit_interval_and_inverts(u: float, shift: float) -> None:
    shifted = shift_sigma(u, shift)
    assert u - 1e-12 <= shifted <= 1 + 1e-12
    assert shift_sigma(shifted, 1 / shift) == pytest.approx(u, abs=1e-9)


def test_shift_sigma_of_a_tensor_equals_that_of_its_floats() -> None:
    u = torch.linspace(0, 1, 5, dtype=torch.float64)
    assert shift_sigma(u, 5.0).tolist() == [shift_sigma(value, 5.0) for value in u.tolist()]


@pytest.mark.parametrize("sigma", [0.3, torch.tensor(0.3), torch.tensor([0.02, 0.5, 0.98])])
def test_flow_to_x0_inverts_add_noise(sigma: float | torch.Tensor) -> None:
    x0, noise = latents(0), latents(1)
    noisy = add_noise(x0, noise, sigma)
    torch.testing.assert_close(flow_to_x0(noisy, noise - x0, sigma), x0, rtol=0, atol=1e-6)


def test_add_noise_ends_are_exact() -> None:
    x0, noise = latents(0), latents(1)
    assert torch.equal(add_noise(x0, noise, 0.0), x0)
    assert torch.equal(add_noise(x0, noise, 1.0), noise)


def test_per_sample_sigma_equals_one_sample_at_a_time() -> None:
    x0, noise, sigma = latents(0), latents(1), torch.tensor([0.1, 0.5, 0.9])
    one_by_one = torch.cat([add_noise(x0[i : i + 1], noise[i : i + 1], float(sigma[i])) for i in range(3)])
    torch.testing.assert_close(add_noise(x0, noise, sigma), one_by_one)


@pytest.mark.parametrize(
    ("given_dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)],
)
def test_results_are_float32_or_wider(given_dtype: torch.dtype, expected: torch.dtype) -> None:
    x0, noise = latents(0, given_dtype), latents(1, given_dtype)
    assert add_noise(x0, noise, 0.5).dtype == expected
    assert flow_to_x0(x0, noise, torch.tensor([0.1, 0.2, 0.3])).dtype == expected


def test_flow_to_x0_subtracts_in_float32_not_in_the_given_precision() -> None:
    noisy, flow = latents(0, torch.bfloat16), latents(1, torch.bfloat16)
    assert torch.equal(flow_to_x0(noisy, flow, 0.02), noisy.float() - 0.02 * flow.float())


@pytest.mark.parametrize("sigma", [torch.zeros(2), torch.zeros(3, 1)])
def test_expand_sigma_refuses_a_shape_that_is_not_one_per_sample(sigma: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="sigma must be a scalar or of shape"):
        expand_sigma(sigma, latents(0))


@pytest.mark.parametrize("sigma", [0.1, 0.899851, 1 / 3, 1.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_expand_sigma_rounds_a_number_as_a_tensor_of_it_would_be(sigma: float, dtype: torch.dtype) -> None:
    like = latents(0).to(dtype)
    want = torch.as_tensor(sigma, dtype=torch.promote_types(dtype, torch.float32))
    assert torch.equal(expand_sigma(sigma, like), want)
    assert torch.equal(expand_sigma(torch.tensor(sigma, dtype=torch.float64), like), want)
