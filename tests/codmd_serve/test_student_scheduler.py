"""The diffusers scheduler takes the sampler's steps, with noise from where it says."""

from pathlib import Path

import pytest
import torch

from codmd_serve.errors import ConfigError
from codmd_serve.sampler import rollout
from codmd_serve.student_scheduler import StudentScheduler

SIGMAS, TIMESTEPS = (1.0, 0.9, 0.757, 0.522, 0.0), (1000.0, 900.0, 757.0, 522.0)
# A multiple of 16 numbers: torch draws them in groups of 16, so one draw of 4 equals 4 draws of one.
SHAPE = (1, 4, 2, 4, 4)


def flow(latents: torch.Tensor, timestep_B: torch.Tensor, _embeds: torch.Tensor) -> torch.Tensor:
    """Something that depends on state and timestep, rounded as a bf16 network's output is."""
    return (latents.sin() + timestep_B.reshape(-1, 1, 1, 1, 1) / 1000).bfloat16()


def walk(scheduler: StudentScheduler, latents: torch.Tensor) -> torch.Tensor:
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(0)
    for timestep in scheduler.timesteps:
        flow_pred = flow(latents, timestep.expand(len(latents)), latents)
        latents = scheduler.step(flow_pred, timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("sampler", ["sde", "ode"])
@pytest.mark.parametrize("source", ["attribute", "global"])
def test_steps_equal_the_samplers_bit_for_bit(sampler: str, source: str) -> None:
    noise = torch.randn((4, *SHAPE), generator=torch.Generator().manual_seed(5))
    wanted = rollout(flow, noise, noise[0], SIGMAS, TIMESTEPS, sampler=sampler)
    scheduler = StudentScheduler(SIGMAS, TIMESTEPS, sampler)
    if source == "attribute":
        scheduler.generator = torch.Generator().manual_seed(5)
    else:
        torch.manual_seed(5)
    start = torch.randn(SHAPE, generator=scheduler.generator)
    assert torch.equal(start, noise[0])
    got = walk(scheduler, start)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


def test_a_generator_given_to_step_wins() -> None:
    scheduler = StudentScheduler(SIGMAS, TIMESTEPS)
    scheduler.generator = torch.Generator().manual_seed(1)
    latents = torch.zeros(SHAPE)
    given = scheduler.step(latents, 900.0, latents, generator=torch.Generator().manual_seed(2)).prev_sample
    wanted = 0.757 * torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    assert torch.equal(given, wanted)


def test_without_a_pipeline_the_step_is_found_by_its_timestep() -> None:
    scheduler = StudentScheduler(SIGMAS, TIMESTEPS, "ode")
    latents = torch.ones(SHAPE)
    assert torch.allclose(scheduler.step(latents, 522.0, latents).prev_sample, torch.tensor(0.478))
    assert scheduler.step_index == 4
    scheduler.set_timesteps(4)
    with pytest.raises(ConfigError, match="one of"):
        scheduler.step(latents, 500.0, latents)


def test_another_number_of_steps_is_refused() -> None:
    scheduler = StudentScheduler(SIGMAS, TIMESTEPS)
    with pytest.raises(ConfigError, match="num_inference_steps=4"):
        scheduler.set_timesteps(50)
    with pytest.raises(ConfigError, match="descend"):
        StudentScheduler((1.0, 1.0, 0.0), (1000.0, 900.0))


def test_config_survives_saving(tmp_path: Path) -> None:
    StudentScheduler(SIGMAS, TIMESTEPS, "ode").save_pretrained(tmp_path)
    again = StudentScheduler.from_pretrained(tmp_path)
    assert (tuple(again.config.sigmas), tuple(again.config.timesteps)) == (SIGMAS, TIMESTEPS)
    assert again.config.sampler == "ode"
    assert again.timesteps.tolist() == list(TIMESTEPS)
