"""The command line: flags and variables, one sentence and exit code 2 for what the user can mend, and the videos."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from codmd_serve import __version__, cli
from codmd_serve.commands import listening_socket
from codmd_serve.config import GenerateParams, ServeConfig
from codmd_serve.engine import Engine
from codmd_serve.errors import ConfigError, GenerationError

PROMPT = "a red circle moves right quickly on a black background"


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    for name in list(os.environ):
        if name.startswith("CODMD_"):
            monkeypatch.delenv(name)
    # Where a user's jobs would be.
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("home")))


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that cannot work; its one line."""
    assert cli.main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("codmd-serve: ")
    return line


# serve


def options_of(*words: str) -> Any:
    return cli._parser().parse_args(words)


def test_every_setting_of_the_server_is_a_flag_with_its_default() -> None:
    options, config = options_of("serve"), ServeConfig()
    for field in fields(ServeConfig):
        assert getattr(options, field.name) == getattr(config, field.name)


def test_flags_are_variables_too_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODMD_PORT", "9001")
    monkeypatch.setenv("CODMD_PAGE", "no")
    monkeypatch.setenv("CODMD_HOST", "")
    options = options_of("serve")
    assert (options.port, options.page, options.host) == (9001, False, "127.0.0.1")
    assert options_of("serve", "--port", "9002", "--page").port == 9002
    assert options_of("serve", "--page").page is True


@pytest.mark.parametrize(("name", "text", "wanted"), [("PORT", "many", "a whole number"), ("PAGE", "maybe", "1 or 0")])
def test_a_variable_that_makes_no_sense_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, text: str, wanted: str
) -> None:
    monkeypatch.setenv(f"CODMD_{name}", text)
    assert refusal(capsys, "serve") == f"codmd-serve: $CODMD_{name} must be {wanted}, got {text!r}"


@pytest.mark.parametrize("words", [(), ("--port", "8001"), ("--no-page",)])
def test_without_a_command_it_serves(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    seen: list[Any] = []

    def serve(options: Any) -> int:
        seen.append(options)
        return 0

    monkeypatch.setattr(cli, "serve", serve)
    assert cli.main(words) == 0
    assert seen[0].command == "serve"


def test_help_states_defaults_and_variables(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["serve", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert caught.value.code == 0
    assert "--port N port to listen on (default: 8000; also $CODMD_PORT)" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"codmd-serve {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("serve", "--port", "x"), "invalid int value: 'x'; see codmd-serve serve --help"),
        (("serve", "--port", "0"), "port must be in 1..65535, got 0"),
        (("serve", "--nope"), "unrecognized arguments: --nope"),
        (("serve", "--host", "0.0.0.0"), "refusing to listen on 0.0.0.0"),
        (("serve", "--host", "203.0.113.7", "--allow-remote-without-auth"), "cannot listen on 203.0.113.7:8000"),
        (("serve", "--dtype", "int8"), "dtype must be one of"),
        (("paint",), "invalid choice: 'paint'"),
        (("generate",), "the following arguments are required: prompt"),
    ],
)
def test_commands_that_make_no_sense_are_refused(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in refusal(capsys, *words)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def test_a_port_in_use_is_refused(capsys: pytest.CaptureFixture[str], taken_port: int) -> None:
    line = refusal(capsys, "serve", "--port", str(taken_port))
    assert line == (
        f"codmd-serve: cannot listen on 127.0.0.1:{taken_port}: Address already in use; choose another with --port"
    )


def test_a_port_that_was_taken_is_taken_at_once(taken_port: int) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with listening_socket("127.0.0.1", port), pytest.raises(ConfigError, match="Address already in use"):
        listening_socket("127.0.0.1", port)


@pytest.mark.parametrize("command", [("serve",), ("generate", PROMPT)])
def test_no_ffmpeg_is_refused(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tiny_bundle: Path,
    tmp_path: Path,
    command: tuple[str, ...],
) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    monkeypatch.chdir(tmp_path)
    assert "no ffmpeg at /nowhere/ffmpeg" in refusal(capsys, *command, "--bundle", str(tiny_bundle))
    assert not list(tmp_path.iterdir())


# generate


@pytest.fixture
def generate(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, ...]]:
    """Words of a generate command with the tiny bundle, in an empty working directory."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def words(*more: str, prompt: str = PROMPT) -> tuple[str, ...]:
        return ("generate", prompt, "--bundle", str(tiny_bundle), *more)

    return words


def test_generate_writes_the_video_and_prints_where_the_time_went(
    generate: Any, capsys: pytest.CaptureFixture[str], read_video: Any
) -> None:
    assert cli.main(generate("-o", "a.mp4", "--seed", "7", "--num-frames", "5", "--fps", "8")) == 0
    said = capsys.readouterr()
    assert said.out.startswith("a.mp4: seed 7, ") and said.out.count("\n") == 1
    for stage in ("text", "denoise", "decode", "encode"):
        assert f"{stage} " in said.out
    assert "note: trained at 32x32 with 9 frames, asked for 32x32 with 5" in said.err
    frames, fps, _ = read_video(Path("a.mp4"))
    assert frames.shape == (5, 32, 32, 3) and fps == 8
    assert [path.name for path in Path().iterdir()] == ["a.mp4"]


def test_generate_gives_the_same_bytes_for_the_same_seed(generate: Any) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert cli.main(generate("--output", f"{name}.mp4", "--seed", str(seed))) == 0
    first, again, other = (Path(f"{name}.mp4").read_bytes() for name in "abc")
    assert first == again != other


def test_generate_draws_a_seed_and_tells_it(generate: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(generate(prompt="a red dragon")) == 0
    said = capsys.readouterr()
    assert 0 <= int(said.out.split("seed ")[1].split(",")[0]) < 2**32
    assert "note: words outside the vocabulary of this model: dragon" in said.err
    assert Path("out.mp4").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--height", "33"), "height must be a multiple of 16 up to 16384, got 33; 32 would be accepted"),
        (("--num-frames", "1000000000"), "num_frames must be 4k + 1, and at 32x32 up to 4093, got 1000000000"),
        (("--num-frames", "-3"), "num_frames: Input should be greater than or equal to 1"),
        (("--seed", "-1"), "seed: Input should be greater than or equal to 0"),
        (("--seed", str(2**63)), "seed: Input should be less than or equal to"),
        (("--crf", "0"), "crf: Input should be greater than or equal to 1"),
        (("--dtype", "int8"), "dtype must be one of auto, float32"),
        (("--execution", "fast"), "execution must be one of auto, eager, graph, compiled, compiled+graph, got 'fast'"),
        (("--quantization", "int4"), "quantization must be one of none, fp8, fp8-emulated, got 'int4'"),
        (
            ("--quantization", "fp8"),
            "quantization fp8 needs a CUDA device of compute capability 8.9 or higher, got cpu",
        ),
        (("--attention", "sage"), "attention 'sage' is not installed for cpu; known: auto, native, _native_cudnn"),
        (("--attention", "flashy"), "attention 'flashy' is unknown for cpu; known: auto, native, _native_cudnn"),
        (("--device", "tpu"), "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (("--bundle", "nowhere"), "no student bundle at nowhere: name a folder that holds student.json"),
        (("-o", "nowhere/a.mp4"), "there is no folder nowhere to write a.mp4 to"),
        (("-o", "out.webm"), "out.webm has the suffix .webm: only mp4, gif and webp are written; name it"),
        (("-o", "x" * 256), "has 256 bytes, and names have at most 255 there: choose a shorter one"),
        (("-o", "."), ". is a folder: name a file, for example out.mp4"),
        (("-o", "/dev/null"), "/dev/null is not a file that could be replaced"),
    ],
)
def test_generate_refuses_what_cannot_work(
    generate: Any, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert message in refusal(capsys, *generate(*more))
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    ("name", "magic"), [("x.gif", b"GIF89a"), ("x.WEBP", b"RIFF"), ("x.m4v", b"\0\0\0 ftyp"), ("x", b"\0\0\0 ftyp")]
)
def test_generate_writes_what_the_suffix_says(generate: Any, name: str, magic: bytes) -> None:
    assert cli.main(generate("-o", name)) == 0
    assert Path(name).read_bytes().startswith(magic)


@pytest.mark.parametrize(("prompt", "message"), [("  ", "must not be blank"), ("x" * 5000, "at most 4000 characters")])
def test_generate_refuses_prompts(generate: Any, capsys: pytest.CaptureFixture[str], prompt: str, message: str) -> None:
    assert f"codmd-serve: prompt: {message}" in refusal(capsys, *generate(prompt=prompt)).replace(
        "String should have ", ""
    )


def test_generate_that_fails_says_why_and_leaves_the_old_video(
    generate: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("out.mp4").write_bytes(b"old")
    decoded = Engine._decoded

    def failing(*arguments: Any) -> Iterator[memoryview]:
        chunks = decoded(*arguments)
        yield next(chunks)
        if Path("warm").exists():
            raise GenerationError("out of memory at this shape", "out_of_memory")
        yield from chunks

    monkeypatch.setattr(Engine, "_decoded", failing)

    def without_bar(engine: Engine, params: GenerateParams, output: Path) -> Any:
        Path("warm").touch()
        return engine.generate(params, output)

    monkeypatch.setattr(cli, "_generate_with_bar", without_bar)
    assert cli.main(generate()) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "codmd-serve: out of memory at this shape"
    assert Path("out.mp4").read_bytes() == b"old"
    assert sorted(path.name for path in Path().iterdir()) == ["out.mp4", "warm"]


def test_sigterm_unwinds_the_stack_and_the_old_handler_comes_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, cli._ended_by_sigterm():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


# doctor


def test_doctor_says_what_would_be_used(capsys: pytest.CaptureFixture[str], tiny_bundle: Path) -> None:
    assert cli.main(["doctor", "--bundle", str(tiny_bundle), "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "tiny-codmd: codmd student of tiny, 4 steps, 32x32, 9 frames at 16 per second" in said.out
    assert "attention  native, at 12 tokens, 2 heads of 12:" in said.out and "_native_flash" in said.out
    assert "cpu in torch.float32" in said.out and "ffmpeg" in said.out and said.err == ""


def test_doctor_names_every_problem(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/nowhere/ffmpeg")
    assert cli.main(["doctor", "--bundle", "/nowhere/bundle"]) == 2
    said = capsys.readouterr()
    assert said.out.count("MISSING") == 3
    first, second = said.err.splitlines()
    assert "no ffmpeg at /nowhere/ffmpeg" in first and "no student bundle at /nowhere/bundle" in second


# the whole process


def test_a_truncated_bundle_ends_the_server_with_one_sentence(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "transformer").mkdir(parents=True)
    for name in ("student.json", "transformer/config.json"):
        (bundle / name).write_text(
            (tiny_bundle / name).read_text().replace("../tiny", str(tiny_bundle.parent / "tiny"))
        )
    weights = "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(tiny_bundle / weights)
    tensors.popitem()
    save_file(tensors, bundle / weights, metadata={"format": "pt"})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "codmd_serve.cli", "--bundle", str(bundle), "--port", str(port), "--no-page"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"codmd-serve: transformer of {bundle} has 1 missing keys, the first is ")
