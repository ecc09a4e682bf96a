"""`codmd-serve convert`: what it prints, and one sentence with exit code 2 for what cannot be converted."""

from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file

from codmd_serve import cli
from codmd_serve.wan.checkpoint import load_bundle, read_spec
from codmd_serve.wan.families import FAMILIES, markdown_table, table_rows


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


def test_help_and_the_how_to_show_the_same_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Both are made of FAMILIES; after a change of it, paste `markdown_table()` into docs/how-to/import.md."""
    with pytest.raises(SystemExit):
        cli.main(["convert", "--help"])
    shown = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "import.md").read_text(encoding="utf-8")
    assert markdown_table() in page
    heading, *rows = table_rows()
    assert heading[0] in shown and len(rows) == len(FAMILIES)
    for row in rows:
        assert all(cell in shown for cell in row), row


def test_convert_takes_strength_and_key(tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = "transformer.blocks.0.attn1.to_q"
    pair = {f"{prefix}.lora_A.weight": torch.ones(2, 24), f"{prefix}.lora_B.weight": torch.ones(24, 2)}
    torch.save({"a": pair, "b": {name: 2 * tensor for name, tensor in pair.items()}}, tmp_path / "lora.pt")
    words = ["convert", str(tmp_path / "lora.pt"), "--base", str(tiny_base), "-o", str(tmp_path / "bundle")]
    assert cli.main(words) == 2
    assert "holds 2 networks: 'a.transformer', 'b.transformer'; say which with --key" in capsys.readouterr().err
    assert cli.main([*words, "--key", "a", "--lora-scale", "0.25"]) == 0
    said = capsys.readouterr().out
    assert "  taken from 'a.transformer' of the file (--key)\n  left out: 'b'\n" in said
    assert "  update of 1 modules at scale 0.25 (--lora-scale)\n" in said and "lora_scale" not in said.replace("--", "")
    weights = "transformer/diffusion_pytorch_model.safetensors"
    change = load_file(tmp_path / "bundle" / weights)["blocks.0.attn1.to_q.weight"]
    torch.testing.assert_close(
        change - load_file(tiny_base / weights)["blocks.0.attn1.to_q.weight"], torch.full((24, 24), 0.5)
    )


@pytest.mark.parametrize("scale", ["0", "nan", "101"])
def test_convert_refuses_a_senseless_strength(
    source: Path, tiny_base: Path, capsys: pytest.CaptureFixture[str], scale: str
) -> None:
    output = source.parent / "bundle"
    words = ["convert", str(source), "--base", str(tiny_base), "-o", str(output), "--lora-scale", scale]
    assert cli.main(words) == 2 and "lora_scale must be a number other than 0" in capsys.readouterr().err
