"""`codmd-distill plan`: what it prints, what it returns, what it refuses."""

import dataclasses
import json
from pathlib import Path

import pytest

from distill.cli import main
from distill.config import RECIPES
from distill.methods.registry import METHODS
from distill.plan.command import PLAN_HELP
from distill.plan.options import PlanOptions


def test_plan_of_the_embedded_world_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--gpu-gib", "16"]) == 0
    out = capsys.readouterr().out
    assert "plan of shapeworld by codmd on 1 x 16 GiB" in out
    for words in ("student weights", "activations", "FITS", "rollout", "recomputation", "h per 1000 iterations"):
        assert words in out


def test_14b_on_eight_gpus_says_what_fits_and_why_the_authors_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "wan_14b", "--gpus", "8", "--gpu-gib", "80"]) == 0
    out = capsys.readouterr().out
    assert "DOES NOT FIT" in out and "It fits, with" in out
    command = next(line.split() for line in out.splitlines() if line.startswith("  codmd-distill plan"))
    assert "does not fit" in out and "Why:" in out
    # The command that it names fits, as it says.
    assert main(command[1:]) == 0
    assert "\nFITS" in capsys.readouterr().out


def test_json_and_settings_and_a_local_base(tiny_base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native = '{"height":32,"width":32,"num_frames":9,"fps":16}'
    arguments = ["--set", f"base={tiny_base}", f"native={native}", "batch_size=8", "--no-activation-checkpointing"]
    assert main(["plan", "--json", "--gpus", "2", *arguments]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["latents"] == [4, 3, 4, 4]
    assert data["samples_at_once"] == 4
    assert data["options"]["activation_checkpointing"] is False
    assert data["flops_per_iteration"]["recomputation"] == 0
    assert data["fits"] is True and data["suggestion"] is None and data["reference"] is None


@pytest.mark.parametrize("method", ["rcm", "dp-dmd"])
def test_method_brings_its_settings_and_its_loop(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    flops = {}
    for name in ("codmd", method):
        assert main(["plan", "--json", "--method", name]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["method"] == name
        flops[name] = data["flops_per_iteration"]
    assert flops[method]["teacher"] != flops["codmd"]["teacher"]
    assert (flops[method]["derivative"] > 0) == (method == "rcm")
    assert main(["plan", "--method", method]) == 0
    assert f"plan of shapeworld by {method} on" in capsys.readouterr().out


def test_every_option_has_help() -> None:
    assert set(PLAN_HELP) == {field.name for field in dataclasses.fields(PlanOptions)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--recipe", "wan_2"], f"--recipe must be one of {', '.join(RECIPES)}, got 'wan_2'"),
        (["--method", "nonsense"], f"--method must be one of {', '.join(METHODS)}, got 'nonsense'"),
        (["--set", "method=rcm"], "use --method rcm"),
        (["--method", "rcm", "--gpus", "4", "--context-parallel", "2"], "context_parallel must be 1 for method rcm"),
        (["--gpus", "0"], "--gpus must be"),
        (["--gpus", "8", "--context-parallel", "5"], "--context-parallel must divide the 8 GPUs, got 5"),
        (["--set", "optimizer.momentum=1"], "unknown setting 'optimizer.momentum'"),
        (["--set", "native.height=100"], "native.height must be a multiple of 16"),
        (["--recipe", "wan_14b", "--set", "base=nowhere"], "no pipeline at nowhere"),
    ],
)
def test_bad_input_is_one_line_and_code_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("codmd-distill: ") and words in shown.err
    assert len(shown.err.splitlines()) == 1
