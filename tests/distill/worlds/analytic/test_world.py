"""The exact flow against a posterior computed the long way, and the law against samples of the flow."""

import dataclasses

import pytest
import torch

from codmd_serve.errors import ConfigError
from distill.worlds.analytic.makers import WORLDS, make_world
from distill.worlds.analytic.metrics import Judge, copying
from distill.worlds.analytic.network import AnalyticNetwork
from distill.worlds.analytic.sampling import law_samples, teacher_samples
from distill.worlds.analytic.world import ExactTeacher, GaussianWorld


@pytest.mark.parametrize("name", sorted(WORLDS))
def test_the_flow_is_the_posterior_mean_of_noise_minus_x0(name: str) -> None:
    """By Bayes' rule in float64, component by component, with inverses instead of eigenvectors."""
    world = make_world(name)
    rng = torch.Generator().manual_seed(3)
    captions = torch.tensor([0, 1, world.num_captions])
    x0 = world.sample(captions.clamp_max(world.num_captions - 1), rng)
    for sigma in (0.02, 0.4, 0.9, 1.0):
        latents = (1 - sigma) * x0 + sigma * torch.randn(x0.shape, generator=rng)
        got = world.flow(latents, torch.full((3,), sigma), world.embeds(captions))
        clean, means = 1 - sigma, world.means.double()
        total = clean**2 * world.covariance + sigma**2 * torch.eye(128, dtype=torch.float64)
        inverse = torch.linalg.inv(total)
        prior = torch.cat([world.prior, world.prior.mean(0, keepdim=True)])[captions]
        gaps = latents.flatten(1).double()[:, None] - clean * means  # (B, K, N)
        logits = prior.log() - 0.5 * torch.einsum("bkn,nm,bkm->bk", gaps, inverse, gaps)
        weights = logits.softmax(1)
        solved_gaps = torch.einsum("bk,bkn,nm->bm", weights, gaps, inverse)
        expected_x0 = weights @ means + clean * solved_gaps @ world.covariance
        expected_noise = sigma * solved_gaps
        want = (expected_noise - expected_x0).float().reshape(got.shape)
        torch.testing.assert_close(got, want, atol=2e-3, rtol=2e-3)


def test_fifty_euler_steps_reproduce_the_law_and_four_do_not() -> None:
    world = make_world("ties")
    judge = Judge(world, law_samples(world, 512, 1))
    floor = judge.score(law_samples(world, 512, 2))
    assert floor.tau_err < 0.012 and floor.w1 < 0.09 and abs(floor.energy) < 0.004 and floor.mode_miss == 0.0
    assert floor.kept == pytest.approx(1.0, abs=0.02) and floor.sd_ratio == pytest.approx(1.0, abs=0.02)
    noise = torch.randn((8, 512, *world.shape), generator=torch.Generator().manual_seed(4))
    many, few = (judge.score(teacher_samples(world, noise, 1.0, num_steps)[-1]) for num_steps in (50, 4))
    assert many.tau_err < 0.03 and many.energy < 0.004 and many.sd_ratio == pytest.approx(0.95, abs=0.02)
    # Findings: .140, .345 and .576 for four steps.
    assert few.frame_rho == pytest.approx(0.14, abs=0.03) and few.w1 > 3 * many.w1 and few.sd_ratio < 0.7


def test_factors_have_the_ties_of_the_law() -> None:
    world = make_world("ties")
    score = Judge(world, law_samples(world, 512, 1)).score(law_samples(world, 512, 2))
    growth_fade, *others = score.taus
    # 2 / pi asin(.8) = .59 without the noise on top of the factors.
    assert -0.5 < growth_fade < -0.3 and all(0.5 < tau < 0.62 for tau in others)


# Which scores must see a fault, as against the law itself with other samples; all others must not.
FAULTS = {
    "shuffled frames": {"tau_err", "frame_rho", "kept", "energy", "mode_tv"},
    "shuffled channels": {"tau_err", "kept", "energy", "mode_tv"},
    "overstated ties": {"tau_err", "kept", "energy"},
    "wide": {"w1", "sd_ratio", "energy"},
    "shifted": {"w1", "energy"},
    "mode lost": {"w1", "energy", "mode_tv", "mode_miss"},
}
LEAST = {
    "tau_err": 0.03,
    "frame_rho": 0.03,
    "kept": 0.05,
    "w1": 0.035,
    "sd_ratio": 0.05,
    "energy": 0.02,
    "mode_tv": 0.05,
    "mode_miss": 0.05,
}


def shuffled(samples: torch.Tensor, dim: int, rng: torch.Generator) -> torch.Tensor:
    """Every slice keeps its margin: samples are put in another order for each."""
    count = samples.shape[1]
    parts = [part[:, torch.randperm(count, generator=rng)] for part in samples.unbind(dim)]
    return torch.stack(parts, dim)


def overstated(world: GaussianWorld, samples: torch.Tensor) -> torch.Tensor:
    """The second factor of each tie takes its own values in the order of the first, or against it."""
    changed = samples.clone()
    for caption, own in enumerate(samples):
        factors = world.factors(own)
        for first, second in world.ties:
            values = factors[:, second].sort().values
            is_against = torch.corrcoef(factors[:, [first, second]].T)[0, 1] < 0
            ordered = torch.empty_like(values)
            ordered[factors[:, first].argsort()] = values.flip(0) if is_against else values
            moved = (ordered - factors[:, second])[:, None] * world.patterns[second]
            changed[caption] += moved.reshape(own.shape)
    return changed


@pytest.fixture(scope="module")
def judged() -> tuple[GaussianWorld, Judge, torch.Tensor, dict[str, float]]:
    world = make_world("ties")
    judge, samples = Judge(world, law_samples(world, 512, 1)), law_samples(world, 512, 2)
    return world, judge, samples, dataclasses.asdict(judge.score(samples))


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_each_planted_fault_is_seen_by_its_scores_and_by_no_other(
    fault: str, judged: tuple[GaussianWorld, Judge, torch.Tensor, dict[str, float]]
) -> None:
    world, judge, samples, right = judged
    rng, middle = torch.Generator().manual_seed(5), samples.mean(1, keepdim=True)
    if fault == "mode lost":
        kept = [(world.modes(own, caption) != 7).nonzero()[:, 0] for caption, own in enumerate(samples)]
        wrong = torch.stack([own[rows[torch.arange(512) % len(rows)]] for own, rows in zip(samples, kept, strict=True)])
    else:
        wrong = {
            "shuffled frames": lambda: shuffled(samples, 3, rng),
            "shuffled channels": lambda: shuffled(samples, 2, rng),
            "overstated ties": lambda: overstated(world, samples),
            "wide": lambda: middle + 1.3 * (samples - middle),
            "shifted": lambda: samples + 0.3,
        }[fault]()
    found = dataclasses.asdict(judge.score(wrong))
    assert {name for name, least in LEAST.items() if abs(found[name] - right[name]) > least} == FAULTS[fault]
    # Its sign says which way dependence went.
    if "kept" in FAULTS[fault]:
        signs = {name: found[name] > 1.0 for name in ("kept", "tau_kept")}
        assert signs == dict.fromkeys(signs, fault == "overstated ties")


def test_copying_tells_the_teachers_pairing_from_a_free_one() -> None:
    world = make_world("ties")
    noise = torch.randn((8, 128, *world.shape), generator=torch.Generator().manual_seed(4))
    teacher = teacher_samples(world, noise, 1.0, 20)[-1]
    assert copying(teacher, teacher) == pytest.approx(1.0)
    assert abs(copying(teacher.roll(1, dims=1), teacher)) < 0.1
    assert copying(torch.zeros_like(teacher), teacher) == 0.0


def test_teacher_and_network_answer_as_a_wan_transformer_does() -> None:
    world = make_world("orbit")
    latents = torch.randn((2, *world.shape), generator=torch.Generator().manual_seed(0))
    timestep, embeds = torch.tensor([900.0, 20.0]), world.embeds(torch.tensor([1, 6]))
    (exact,) = ExactTeacher(world)(latents, timestep, embeds, return_dict=False)
    assert torch.equal(exact, world.flow(latents, timestep / 1000, embeds))
    network = AnalyticNetwork(128, world.num_captions + 1)
    (flow,) = network(latents, timestep, embeds, return_dict=False)
    # Before training it is the flow of a unit Gaussian.
    sigma = (timestep / 1000)[:, None, None, None, None]
    torch.testing.assert_close(flow, (2 * sigma - 1) / ((1 - sigma) ** 2 + sigma**2) * latents)
    assert 190_000 < sum(parameter.numel() for parameter in network.parameters()) < 200_000


def test_an_unknown_world_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="one of ties, orbit, switch, got 'moon'"):
        make_world("moon")
