"""`train` asks the plan first: what cannot fit is refused in one sentence, the embedded world never is."""

import json
import shlex
from pathlib import Path

import pytest

from codmd_serve.errors import ConfigError
from distill.cli import main
from distill.config import DistillConfig, with_overrides
from distill.methods.registry import METHODS, recipe_config
from distill.parallel.processes import SINGLE_PROCESS
from distill.plan.fit import check_fit, host_memory_bytes, process_memory_bytes
from distill.plan.options import GIB

LAPTOP_BYTES = 8 * GIB


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_embedded_world_is_never_refused_on_a_laptop(method: str, num_processes: int) -> None:
    config = with_overrides(recipe_config("shapeworld", method), ["precision=fp32"])
    fit = check_fit(config, num_processes, LAPTOP_BYTES // num_processes, is_gpu=False)
    assert fit is not None and fit.fits and fit.changes == ()


def test_a_refusal_names_settings_that_fit() -> None:
    config = recipe_config("wan_14b")
    fit = check_fit(config, 8, 80 * GIB, is_gpu=True)
    assert fit is not None and not fit.fits
    said = fit.refusal()
    assert said.startswith("the run needs ") and "on each of 8 GPUs of 80.0 GiB, in its student" in said
    assert "it fits with --set " in said and said.endswith("; --anyway starts it as it is")
    settings = shlex.split(said.partition("--set ")[2].partition(";")[0])
    assert settings and list(fit.changes) == settings
    changed = check_fit(with_overrides(config, settings), 8, 80 * GIB, is_gpu=True)
    assert changed is not None and changed.fits


def test_where_nothing_fits_the_least_is_named() -> None:
    fit = check_fit(recipe_config("wan_14b"), 1, 24 * GIB, is_gpu=True)
    assert fit is not None and fit.changes == ()
    assert "no setting makes it fit, the least is " in fit.refusal() and "use more GPUs" in fit.refusal()
    assert "on the process of 24.0 GiB" in check_fit_on_host("wan_14b").refusal()


def check_fit_on_host(recipe: str):  # type: ignore[no-untyped-def]
    fit = check_fit(recipe_config(recipe), 1, 24 * GIB, is_gpu=False)
    assert fit is not None
    return fit


def test_a_small_card_keeps_a_tenth_free_and_a_large_one_four_gibibytes() -> None:
    config = with_overrides(recipe_config(), ["precision=fp32"])
    small, large, host = (
        check_fit(config, 1, size * GIB, is_gpu=is_gpu) for size, is_gpu in ((4, True), (80, True), (4, False))
    )
    assert small is not None and large is not None and host is not None
    assert [one.plan.options.reserve_gib for one in (small, large, host)] == pytest.approx([0.4, 4.0, 0.0])


def test_a_regressed_start_has_to_fit_too() -> None:
    # The method's own run keeps two graphs at once, so that the start needs less and changes nothing.
    config = with_overrides(recipe_config("shapeworld", "dp-dmd"), ["start.updates=5", "precision=fp32"])
    fit = check_fit(config, 1, LAPTOP_BYTES, is_gpu=False)
    assert fit is not None and fit.plan.subject.config.method == "dp-dmd"


def test_a_base_that_the_plan_does_not_know_is_not_refused() -> None:
    config = with_overrides(recipe_config("wan_14b"), ["base=somebody/some-wan"])
    assert check_fit(config, 1, GIB, is_gpu=True) is None


def test_host_memory_is_that_of_the_control_group_where_it_has_a_limit(tmp_path: Path) -> None:
    whole = host_memory_bytes(tmp_path)
    assert whole > GIB / 2
    (tmp_path / "memory.max").write_text("max\n")
    assert host_memory_bytes(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1000000\n")
    assert host_memory_bytes(tmp_path) == 1_000_000
    (tmp_path / "memory.max").unlink()
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory" / "memory.limit_in_bytes").write_text("2000000\n")
    assert host_memory_bytes(tmp_path) == 2_000_000
    assert process_memory_bytes(SINGLE_PROCESS) == host_memory_bytes()


@pytest.fixture
def settings(tiny_config: DistillConfig) -> list[str]:
    """A tiny network, and batches that no tenth of a gibibyte holds."""
    return [f"base={tiny_config.base}", f"prompts={tiny_config.prompts}", "batch_size=640"]


def test_train_refuses_and_starts_anyway(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    command = ["train", "--out", str(out), "--device", "cpu", "--threads", "1", "--gpu-gib", "0.1", "--set", *settings]
    assert main([*command, "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("codmd-distill: the run needs ") and error.count("\n") == 1
    assert "--anyway starts it as it is" in error
    assert main(command) == 2 and not out.exists()
    capsys.readouterr()
    assert main([*command, "--dry-run", "--anyway"]) == 0
    plan = json.loads(capsys.readouterr().out)["derived"]["plan"]
    assert plan["fits"] is False and plan["needed_gib"] > plan["memory_gib"] == 0.1
    assert main(["train", "--out", str(out), "--device", "cpu", "--gpu-gib", "0"]) == 2
    assert "--gpu-gib must be above 0" in capsys.readouterr().err


def test_a_dry_run_on_a_cpu_tells_and_does_not_refuse(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("distill.plan.fit.host_memory_bytes", lambda: GIB // 10)
    command = ["train", "--out", str(tmp_path / "run"), "--device", "cpu", "--threads", "1", "--set", *settings]
    assert main([*command, "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out)["derived"]["plan"]["fits"] is False
    assert main(command) == 2
    assert "on the process of 0.1 GiB" in capsys.readouterr().err


def test_errors_of_the_base_stay_what_they_are() -> None:
    with pytest.raises(ConfigError, match="multiple of 16"):
        check_fit(with_overrides(recipe_config(), ["native.height=100"]), 1, LAPTOP_BYTES, is_gpu=False)
