"""Regression: states of the teacher's paths at the student's levels, and a student that learns where they end."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from runs import with_method

from codmd_serve.schedule import flow_to_x0
from distill.config import DistillConfig, with_overrides
from distill.data.prompts import cached_prompt_data
from distill.data.teacher_latents import cached_teacher_latents
from distill.methods.registry import METHODS, recipe_config
from distill.methods.regression import RegressionDraws, regression_settings, regression_step, start_of
from distill.networks.base import open_base
from distill.networks.build import Networks, denoiser, guided_teacher_flow
from distill.run.trainer import Trainer

CPU = torch.device("cpu")
SHAPE = (4, 3, 4, 4)


@pytest.fixture
def config(tiny_config: DistillConfig) -> DistillConfig:
    settings = ["regression.paths=7", "regression.teacher_steps=5", "optimizer.student_lr=1e-3"]
    return with_overrides(with_method(tiny_config, "regression"), settings)


def trainer(config: DistillConfig, networks: Networks, cache: Path) -> Trainer:
    base = open_base(config.base)
    data = cached_prompt_data(config, base, cache, CPU)
    sampling = METHODS[config.method].teacher_sampling(config)
    assert sampling is not None
    latents = cached_teacher_latents(config, sampling, base, networks, data, SHAPE, cache, CPU)
    return Trainer(config, networks, data, SHAPE, CPU, latents)


def test_the_path_is_that_of_the_guided_teacher_and_its_states_lie_at_the_students_levels(
    config: DistillConfig, tiny_networks: Networks, tmp_path: Path
) -> None:
    own = trainer(config, tiny_networks, tmp_path)
    assert own.latents is not None and own.latents.num_samples == 7
    sampling = METHODS[config.method].teacher_sampling(config)
    assert sampling is not None
    sigmas, grid = sampling.sigmas(), config.grid()
    assert len(sigmas) == 5 + 1 + 3 and set(grid.sigmas) <= set(sigmas)
    index = 6  # the second path of the second of five prompts
    batch = own.data.batch([index % own.data.num_prompts], CPU)
    states, x0 = own.latents.states([index], CPU)[0], own.latents.batch([index], CPU)[0]
    assert states.shape == (4, *SHAPE)
    latents = states[:1]  # at sigma 1: the noise itself, as float16 holds it
    for sigma, lower in pairwise(sigmas):
        if sigma in grid.sigmas:
            kept = states[grid.sigmas.index(sigma)]
            torch.testing.assert_close(latents[0], kept, atol=5e-3, rtol=5e-3)
        with torch.no_grad():
            flow = guided_teacher_flow(
                denoiser(tiny_networks.teacher, "fp32"),
                latents,
                torch.full((1,), 1000 * sigma),
                batch.prompt_embeds,
                batch.negative_prompt_embeds,
                config.guidance_scale,
            )
        latents = latents + (lower - sigma) * flow
    torch.testing.assert_close(latents[0], x0, atol=5e-3, rtol=5e-3)


def test_each_sample_is_trained_at_its_own_level(
    config: DistillConfig, tiny_networks: Networks, tmp_path: Path
) -> None:
    own = trainer(config, tiny_networks, tmp_path)
    batch = own._turn("student").load(range(3))
    assert batch.x0 is not None and batch.states is not None
    draws = METHODS["regression"].draw(config, "student", 0, (3, *SHAPE), CPU)
    levels, grid = draws.levels.tolist(), config.grid()  # type: ignore[attr-defined]
    assert len(set(levels)) > 1
    with torch.no_grad():
        got = regression_step(tiny_networks, batch, draws, config).loss  # type: ignore[arg-type]
        squares = []
        for row, level in enumerate(levels):
            latents = batch.states[row : row + 1, level]
            flow = denoiser(tiny_networks.student, "fp32")(
                latents, torch.tensor([grid.timesteps[level]]), batch.prompt_embeds[row : row + 1]
            )
            squares.append((flow_to_x0(latents, flow, grid.sigmas[level]) - batch.x0[row]).square().mean())
    torch.testing.assert_close(got, torch.stack(squares).mean())


def test_levels_are_a_function_of_seed_and_iteration_and_a_rank_draws_its_share(config: DistillConfig) -> None:
    method, shape = METHODS["regression"], (64, *SHAPE)
    whole = method.draw(config, "student", 5, shape, CPU).levels  # type: ignore[attr-defined]
    part = method.draw(config, "student", 5, shape, CPU, range(16, 32)).levels  # type: ignore[attr-defined]
    assert torch.equal(part, whole[16:32]) and set(whole.tolist()) == {0, 1, 2, 3}
    other = method.draw(config, "student", 6, shape, CPU).levels  # type: ignore[attr-defined]
    assert not torch.equal(whole, other)


def test_the_student_learns_where_the_paths_end(config: DistillConfig, tiny_networks: Networks, tmp_path: Path) -> None:
    own = trainer(config, tiny_networks, tmp_path)
    assert own.latents is not None
    everything = replace(
        own.data.batch([index % 5 for index in range(7)], CPU),
        x0=own.latents.batch(list(range(7)), CPU),
        states=own.latents.states(list(range(7)), CPU),
    )

    def error() -> float:
        with torch.no_grad():
            levels = [RegressionDraws(levels=torch.full((7,), level)) for level in range(4)]
            return sum(float(regression_step(tiny_networks, everything, draws, config).loss) for draws in levels)

    before = error()
    for _ in range(120):
        own.iterate()
    assert error() < 0.2 * before
    assert own.updates == {"student": 120, "critic": 0}


def test_a_start_takes_the_steps_of_the_run_that_it_precedes(tiny_config: DistillConfig) -> None:
    assert start_of(tiny_config) is None
    for method in ("codmd", "dmd", "dp-dmd", "rcm"):
        run = with_overrides(
            with_method(tiny_config, method), ["start.updates=9", "start.paths=5", "start.student_lr=1e-3"]
        )
        start = start_of(run)
        assert start is not None and start.grid() == run.grid()
        assert (start.method, start.max_iterations, start.optimizer.student_lr) == ("regression", 9, 1e-3)
        assert regression_settings(start).paths == 5
        assert start_of(start) is None
        assert replace(start.optimizer, student_lr=run.optimizer.student_lr) == run.optimizer


def test_levels_of_published_recipes_are_kept_exactly() -> None:
    start = start_of(with_overrides(recipe_config("wan_1_3b", "codmd"), ["start.updates=1"]))
    assert start is not None
    sampling = METHODS[start.method].teacher_sampling(start)
    assert sampling is not None and sampling.kept_sigmas == (1.0, 0.9, 0.757, 0.522)
    assert len(sampling.sigmas()) == 51 + 3
