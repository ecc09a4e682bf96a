"""A command of the user's scores videos; whatever it does wrong is one sentence, and nothing of it stays behind."""

import os
import shlex
import sys
import time
from pathlib import Path

import pytest
from processes import until

from codmd_serve.errors import CodmdError, ConfigError
from distill.config import DistillConfig, with_overrides
from distill.networks.base import open_base
from distill.validate.command import CommandSuite, command_suite, parse_metrics, run_command
from distill.validate.suites import Samples


def python(code: str, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-S", "-c", code, *words)


def suite_of(*command: str, timeout_s: float = 60.0) -> CommandSuite:
    return CommandSuite(command=command, timeout_s=timeout_s, texts=("a red ring",))


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    (tmp_path / "prompts.json").write_text('[{"file": "00000.mp4", "prompt": "a red ring", "seed": 0}]')
    (tmp_path / "00000.mp4").touch()
    return Samples(videos=tmp_path)


def test_the_command_gets_videos_and_prompts_and_prints_numbers(samples: Samples) -> None:
    code = (
        "import json, os, sys; print('scoring'); entries = json.load(open(sys.argv[2]));"
        "print(json.dumps({'total': 0.5, 'videos': sum(os.path.exists(sys.argv[1] + '/' + e['file']) for e in entries),"
        "'name': 'x', 'broken': float('nan')}))"
    )
    assert suite_of(*python(code)).score(samples) == {"total": 0.5, "videos": 1.0}


def test_the_command_names_where_its_arguments_stand_and_may_write_a_file(samples: Samples) -> None:
    code = "import sys; open(sys.argv[1], 'w').write('{\"total\": %d}' % len(sys.argv)); print('{\"total\": 9}')"
    suite = suite_of(*python(code, "{metrics}", "--in={videos}"))
    assert suite.score(samples) == {"total": 3.0}
    # A file of the validation before is not taken for this one's.
    silent = suite_of(*python("import sys", "{metrics}"))
    with pytest.raises(CodmdError, match="printed no JSON object"):
        silent.score(samples)


def test_the_command_does_not_take_itself_for_a_rank(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID", "SLURM_PROCID"):
        monkeypatch.setenv(name, "1")
    code = (
        "import os, json; names = 'RANK WORLD_SIZE MASTER_ADDR TORCHELASTIC_RUN_ID SLURM_PROCID PATH'.split();"
        "print(json.dumps({'set': sum(n in os.environ for n in names)}))"
    )
    assert suite_of(*python(code)).score(samples) == {"set": 1.0}


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('ValueError: no such model')", "ended with 1: ValueError: no such model"),
        ("import os; os.kill(os.getpid(), 9)", "ended with -9"),
        ("print('scores: 5, 6')", "printed no JSON object of numbers, but 'scores: 5, 6'"),
        ("print('[1, 2]')", "printed no JSON object of numbers"),
        ('print(\'{"total": "high"}\')', "printed no JSON object of numbers"),
        ("import sys; sys.stdout.buffer.write(b'\\xff\\x00' * 4_000_000)", "printed no JSON object of numbers"),
    ],
)
def test_a_command_that_goes_wrong_is_one_sentence(samples: Samples, code: str, message: str) -> None:
    with pytest.raises(CodmdError) as told:
        suite_of(*python(code)).score(samples)
    assert message in str(told.value) and "\n" not in str(told.value)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    # A zombie whose parent has not yet asked is gone all the same.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


CHILD = (
    "import os, subprocess, sys, signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
    "child = subprocess.Popen(['sleep', '600']);"
    "open(sys.argv[1], 'w').write(str(child.pid));"
)


@pytest.mark.parametrize("end", ["timeout", "signal", "background"])
def test_the_whole_process_group_is_killed(tmp_path: Path, end: str) -> None:
    pid_file = tmp_path / "pid"

    def is_started() -> bool:
        return pid_file.is_file() and bool(pid_file.read_text())

    code = CHILD + ("print(1)" if end == "background" else "child.wait()")
    start = time.monotonic()

    def is_stopping() -> bool:
        return end == "signal" and is_started()

    words = list(python(code, str(pid_file)))
    if end == "background":
        assert run_command(words, tmp_path / "log", 60.0, is_stopping) == "1\n"
    else:
        # On a busy machine an interpreter takes seconds to start.
        timeout_s = 5.0 if end == "timeout" else 500.0
        wanted = r"took longer than validate\.timeout_s=5 and was killed" if end == "timeout" else "the run is ending"
        with pytest.raises(CodmdError, match=wanted):
            run_command(words, tmp_path / "log", timeout_s, is_stopping)
        assert time.monotonic() - start < 300
    if is_started():
        until(lambda: not is_alive(int(pid_file.read_text())), seconds=60)


def test_a_command_that_cannot_be_started_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(CodmdError, match="cannot be run"):
        run_command([str(tmp_path)], tmp_path / "log", 1.0, lambda: False)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ('{"a": 1}', {"a": 1.0}),
        ('{\n "a": 1,\n "b": true,\n "c": null, "d": 1e999, "e": [2]\n}\n', {"a": 1.0}),
        ('progress\n{"a": -2.5}\n\n', {"a": -2.5}),
        ('{"a": 1%s}\n{"b": 2}' % ("0" * 400), {"b": 2.0}),
    ],
)
def test_numbers_are_read_from_the_whole_text_or_its_last_line(text: str, values: dict[str, float]) -> None:
    assert parse_metrics(text) == values


@pytest.mark.parametrize("text", ["", "\n", "[" * 100_000, '{"a": NaN}', '{"a": 1%s}' % ("0" * 400)])
def test_text_without_numbers_is_refused(text: str) -> None:
    with pytest.raises(CodmdError, match="no JSON object of numbers"):
        parse_metrics(text)


def test_held_out_prompts_are_those_that_the_run_does_not_train_on(tiny_config: DistillConfig, tmp_path: Path) -> None:
    trained = Path(tiny_config.prompts).read_text(encoding="utf-8").splitlines()
    path = tmp_path / "held_out.txt"
    path.write_text("\n".join([trained[0], "a new one", "a new one", "another"]))
    command = f"validate.command={shlex.join(python('1'))}"
    config = with_overrides(tiny_config, [command, f"validate.prompts={path}"])
    base = open_base(config.base)
    assert command_suite(config, base).texts == ("a new one", "another")
    path.write_text(trained[0])
    with pytest.raises(ConfigError, match="holds no prompt that the run does not train on"):
        command_suite(config, base)
    captions = command_suite(with_overrides(tiny_config, [command, "validate.num_prompts=3"]), base).texts
    assert len(captions) == 3 and not set(captions) & set(trained)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([], r"validate\.command is not set"),
        (["validate.command=no-such-program-anywhere x"], "there is no program 'no-such-program-anywhere'"),
        (["validate.command=python 'x"], r"validate\.command cannot be read: No closing quotation"),
        (["validate.command=env", "recipe=wan_1_3b"], r"validate\.prompts is not set: recipe wan_1_3b needs"),
        (["validate.command=env", "validate.prompts=none.txt"], r"none\.txt cannot be read"),
    ],
)
def test_settings_that_cannot_work_are_refused(tiny_config: DistillConfig, settings: list[str], message: str) -> None:
    config = with_overrides(tiny_config, settings)
    with pytest.raises(ConfigError, match=message):
        command_suite(config, open_base(config.base))
