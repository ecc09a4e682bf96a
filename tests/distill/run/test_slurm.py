"""deploy/slurm/train.sbatch, run as SLURM would: fake `srun` and `scontrol` start real processes that train."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from servers import free_port

from distill.config import DistillConfig, config_to_dict
from distill.run.checkpoint import list_checkpoints, load_checkpoint

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"
NUM_TASKS = 2
# Starts what srun would on two machines, with the variables of SLURM 23.11; FAKE_EXIT stands for tasks that end so.
FAKE_SRUN = """#!{python}
import os, subprocess, sys
words = sys.argv[1:]
assert words[0] == "--kill-on-bad-exit=1", words
if "FAKE_EXIT" in os.environ:
    print(*words[1:])
    sys.exit(int(os.environ["FAKE_EXIT"]))
tasks = []
for rank in range({tasks}):
    own = {{"SLURM_PROCID": str(rank), "SLURM_LOCALID": "0", "SLURM_NODEID": str(rank), "SLURM_STEP_ID": "0"}}
    own |= {{"SLURM_STEP_NUM_TASKS": "{tasks}", "SLURM_STEP_NUM_NODES": "{tasks}"}}
    tasks.append(subprocess.Popen(words[1:], env=os.environ | own))
sys.exit(max(task.wait() for task in tasks))
"""
FAKE_SCONTROL = """#!{python}
import os, sys
words = sys.argv[1:]
if words[:2] == ["show", "hostnames"]:
    assert words[2:] == ["node[7-8]"], words
    print("127.0.0.1", "node8", sep=chr(10))
else:
    with open(os.environ["FAKE_REQUEUED"], "a") as file:
        print(*words, file=file)
"""
FAKE_COMMAND = """#!{python}
import sys
from distill.cli import main
sys.exit(main())
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A shell inside a SLURM job, with the fake programs first on its path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", FAKE_SRUN), ("scontrol", FAKE_SCONTROL), ("codmd-distill", FAKE_COMMAND)):
        (programs / name).write_text(text.format(python=sys.executable, tasks=NUM_TASKS))
        (programs / name).chmod(0o755)
    job = {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_CPUS_PER_TASK": "1",
        # A batch shell has these too; they must not be taken for those of a task.
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": str(NUM_TASKS),
    }
    own = {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "CODMD_DISTILL": str(programs / "codmd-distill"),
        "MASTER_PORT": str(free_port()),
        "FAKE_REQUEUED": str(tmp_path / "requeued"),
    }
    return os.environ | job | own


def sbatch(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_a_job_trains_in_all_its_processes_and_goes_on_when_it_is_sent_again(
    tiny_config: DistillConfig, environment: dict[str, str], tmp_path: Path
) -> None:
    data, out = config_to_dict(tiny_config), tmp_path / "run"
    keys = ("base", "prompts", "native", "student_every_iterations", "precision")
    settings = [f"{key}={data[key] if isinstance(data[key], str) else json.dumps(data[key])}" for key in keys]
    common = ["--out", str(out), "--device", "cpu", "--threads", "1", "--preview-every", "0"]
    common += ["--set", *settings, "batch_size=4"]
    done = sbatch(environment, *common, "--max-iterations", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 iterations") == 1, "rank 0 alone tells"
    (newest,) = list_checkpoints(out)
    assert load_checkpoint(newest).values["iteration"] == 2
    assert len(list(newest.glob("shard-*.safetensors"))) == NUM_TASKS
    assert not (tmp_path / "requeued").exists()
    for given in (["--out", str(out)], [f"--out={out}"], ["--out", str(tmp_path / "other")]):
        again = sbatch(environment | {"FAKE_EXIT": "0"}, *given, "--set", "batch_size=4")
        assert again.returncode == 0, again.stderr
        _, *words = again.stdout.split()
        resumed = ["--resume"] if str(out) in given[-1] else []
        assert words == ["train", *given, "--set", "batch_size=4", *resumed]


def test_an_interrupted_job_is_queued_again_and_a_failed_one_is_not(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert sbatch(environment | {"FAKE_EXIT": "2"}, "--out", "x").returncode == 2
    assert not (tmp_path / "requeued").exists()
    assert sbatch(environment | {"FAKE_EXIT": "143"}, "--out", "x").returncode == 143
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"


def test_the_job_asks_for_a_gpu_per_process_and_a_signal_before_its_end() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    # To the processes, not to the shell alone ("B:"), which could not make them save.
    assert re.fullmatch(r"TERM@\d+", asked["signal"])
