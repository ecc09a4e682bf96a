"""What a pipeline folder says about its steps: the published contract, its older spellings, our own scheduler."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.stated import Sampling, dmd2_config, read_sampling

FASTGEN = {
    "num_inference_steps": 4,
    "denoising_timesteps": [999, 937, 833, 624],
    "solver": "ode",
    "guidance_scale": 1.0,
}


def write(folder: Path, index: Any, scheduler: Any = None) -> Path:
    (folder / "model_index.json").write_text(json.dumps(index))
    if scheduler is not None:
        (folder / "scheduler").mkdir(exist_ok=True)
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    return folder


@pytest.mark.parametrize(
    ("index", "timesteps", "sampler"),
    [
        ({"dmd2_config": FASTGEN}, (999.0, 937.0, 833.0, 624.0), "ode"),
        ({"dmd2_config": {**FASTGEN, "solver": "SDE"}}, (999.0, 937.0, 833.0, 624.0), "sde"),
        ({"dmd2_config": {"denoising_timesteps": [1000, 757.5, 0]}}, (1000.0, 757.5), None),
        ({"dmd2_denoising_timesteps": [999, 500], "dmd2_num_inference_steps": 2}, (999.0, 500.0), None),
        ({"dmd_denoising_steps": [1000, 757, 522]}, (1000.0, 757.0, 522.0), None),
        ({"_class_name": "WanPipeline"}, None, None),
    ],
)
def test_steps_of_model_index_are_read(
    tmp_path: Path, index: dict[str, Any], timesteps: tuple[float, ...] | None, sampler: str | None
) -> None:
    write(tmp_path, index)
    (tmp_path / "transformer").mkdir()
    for source in (tmp_path, tmp_path / "transformer"):
        sampling = read_sampling(source)
        assert (sampling.timesteps, sampling.sampler) == (timesteps, sampler)


def test_a_folder_without_model_index_says_nothing(tmp_path: Path) -> None:
    assert read_sampling(tmp_path) == read_sampling(tmp_path / "a.safetensors") == Sampling()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"guidance_scale": 4.5}, "guidance_scale is 4.5, so its student is sampled with guidance"),
        (
            {"num_inference_steps": 8},
            "says two things about its steps: num_inference_steps 8, but 4 denoising_timesteps",
        ),
        ({"num_inference_steps": "4"}, "num_inference_steps must be a count, got '4'"),
        ({"solver": "heun"}, "solver must be one of sde, ode, got 'heun'"),
        ({"denoising_timesteps": [1, 0.9, 0.8, 0.6]}, "denoising_timesteps must be descending numbers in"),
        ({"denoising_timesteps": [500, 600, 1, 0]}, "must be descending"),
        ({"denoising_timesteps": [10**400, 3, 2, 1]}, "must be descending"),
        ({"denoising_timesteps": "999"}, "must be descending"),
        ({"denoising_timesteps": []}, "must be descending"),
    ],
)
def test_steps_that_cannot_be_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    write(tmp_path, {"dmd2_config": {**FASTGEN, **change}})
    with pytest.raises(CheckpointError, match=message):
        read_sampling(tmp_path)


def test_an_entry_that_is_no_object_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"dmd2_config must be an object, got \[1\]"):
        read_sampling(write(tmp_path, {"dmd2_config": [1]}))


STUDENT = {"_class_name": "StudentScheduler", "sigmas": [1.0, 0.9, 0.0], "timesteps": [1000, 937.5], "sampler": "sde"}


def test_our_own_scheduler_gives_levels_too(tmp_path: Path) -> None:
    sampling = read_sampling(write(tmp_path, {"dmd2_config": dmd2_config([1000.0, 937.5], "sde")}, STUDENT))
    assert sampling.sigmas == (1.0, 0.9, 0.0) and sampling.timesteps == (1000.0, 937.5) and sampling.sampler == "sde"


@pytest.mark.parametrize(
    ("index", "scheduler", "message"),
    [
        (
            dmd2_config([1000.0, 500.0], "sde"),
            STUDENT,
            "says two things about its timesteps: .*say which with --timest",
        ),
        (dmd2_config([1000.0, 937.5], "ode"), STUDENT, "says two things about its sampler: 'ode' in dmd2_config of"),
        (None, {**STUDENT, "sigmas": "x"}, "sigmas must be a list of numbers"),
        (None, {**STUDENT, "sampler": "x"}, "sampler must be one of"),
    ],
)
def test_files_that_contradict_are_refused(tmp_path: Path, index: Any, scheduler: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_sampling(write(tmp_path, {"dmd2_config": index}, scheduler))


def test_whole_timesteps_are_written_as_whole_numbers() -> None:
    assert json.dumps(dmd2_config([1000.0, 937.5], "ode")) == (
        '{"num_inference_steps": 2, "denoising_timesteps": [1000, 937.5], "solver": "ode", "guidance_scale": 1.0}'
    )


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.floats(), max_size=4)
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(
    index=st.dictionaries(
        st.sampled_from(["dmd2_config", "dmd_timesteps", "dmd2_guidance_scale"]),
        VALUES | st.dictionaries(st.sampled_from([*FASTGEN]), VALUES),
    ),
    scheduler=st.dictionaries(st.sampled_from([*STUDENT]), VALUES | st.just("StudentScheduler")),
)
def test_any_folder_says_steps_or_is_refused_in_one_sentence(tmp_path: Path, index: Any, scheduler: Any) -> None:
    try:
        sampling = read_sampling(write(tmp_path, index, scheduler))
    except CheckpointError:
        return
    assert sampling.sampler in (None, "sde", "ode")
    assert sampling.timesteps is None or sampling.num_steps == len(sampling.timesteps)
