"""`codmd-serve convert`: what it prints, and one sentence with exit code 2 for what cannot be converted."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file

from codmd_serve import cli
from codmd_serve.wan.checkpoint import load_bundle, read_spec


@pytest.fixture
def source(tiny_pipeline: WanPipeline, tmp_path: Path) -> Path:
    """The tiny network as a file in diffusers' names."""
    path = tmp_path / "student.safetensors"
    save_file({name: 0.5 * tensor for name, tensor in tiny_pipeline.transformer.state_dict().items()}, path)
    return path


def test_convert_writes_a_bundle_and_tells_what_it_assumed(
    source: Path, tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "bundle"
    words = ["convert", str(source), "--base", str(tiny_base), "-o", str(output), "--timesteps", "1000,750.5,250"]
    assert cli.main(words) == 0
    said = capsys.readouterr()
    first, second, *assumed, last = said.out.splitlines()
    assert said.err == ""
    assert first.startswith(f"{source}: weights in diffusers' names, as FastWan publishes, ")
    assert second == "assumed, because the file does not say it (kept in student.json):"
    assert last == f"{output}: ready; try codmd-serve generate PROMPT --bundle {output}"
    spec = load_bundle(output).spec
    assert [line.split()[0] for line in assumed] == list(spec.assumed)
    assert spec.timesteps == (1000.0, 750.5, 250.0) and spec.sigmas == (1.0, 0.7505, 0.25, 0.0)
    assert "  native     832x480, 81 frames at 16 per second (--width, --height, --num-frames, --fps)" in assumed
    assert "  method     fastwan (--method)" in assumed


def test_convert_takes_the_video_shape(source: Path, tiny_base: Path, tmp_path: Path) -> None:
    shape = ["--height", "32", "--width", "48", "--num-frames", "5", "--fps", "8", "--method", "codmd"]
    assert cli.main(["convert", str(source), "--base", str(tiny_base), "-o", str(tmp_path / "bundle"), *shape]) == 0
    spec = read_spec(tmp_path / "bundle")
    assert (spec.native.width, spec.native.num_frames, spec.method) == (48, 5, "codmd")
    assert "native" not in spec.assumed and "method" not in spec.assumed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--base", "gone"), "gone: expected the diffusers folder of a Wan pipeline"),
        (("-o", "."), ". exists already: name another folder"),
        (("-o", "nowhere/bundle"), "there is no folder "),
        (("--method", "magic"), "method must be one of codmd, causvid"),
        (("--sampler", "euler"), "invalid choice: 'euler'"),
        (("--timesteps", "4,many"), "--timesteps must be descending numbers in (0, 1000]"),
        (("--timesteps", "1000,1000"), "--timesteps must be descending"),
        (("--timesteps", "1001,500"), "--timesteps must be descending"),
        (("--timesteps", "500,0"), "--timesteps must be descending"),
        (("--timesteps", "nan"), "--timesteps must be descending"),
        (("--fps", "0"), "native.fps must be a positive whole number, got 0"),
        (("--height", "tall"), "argument --height: invalid int value: 'tall'"),
    ],
)
def test_convert_refuses_what_cannot_work(
    source: Path,
    tiny_base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(source.parent)
    assert cli.main(["convert", str(source), "--base", str(tiny_base), "-o", "bundle", *words]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("codmd-serve: ") and message in line and said.out == ""
    assert [path.name for path in source.parent.iterdir()] == [source.name]


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.zeros(1)}, "holds no Wan weights of a known family: expected a CoDMD"),
        ({"generator": {"model.blocks.0.to_gate_compress.weight": torch.zeros(1)}}, "trained with VSA"),
    ],
)
def test_convert_refuses_files_in_one_line(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], state: object, message: str
) -> None:
    torch.save(state, tmp_path / "a.pt")
    output = tmp_path / "bundle"
    assert cli.main(["convert", str(tmp_path / "a.pt"), "--base", str(tiny_base), "-o", str(output)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and not output.exists()
