"""AIPerf's video endpoint and LiteLLM's video calls, unchanged, against a real server of the embedded student.

`make clients` runs it. Each client has an environment of its own: AIPerf alone brings 1.2 GB. What they wrote goes to
docs/results/clients.md, without the paths of this machine.
"""

import argparse
import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from processes import ServerProcess  # noqa: E402

MODEL = "shapeworld-dmd"
REPORT = ROOT / "docs" / "results" / "clients.md"
TOKENIZER = ROOT / "weights" / "shapeworld" / "tokenizer"  # AIPerf counts tokens of prompts; its own comes from afar
NUM_REQUESTS = 6
LIMIT_S = 300
PROMPT = "a red circle moves right quickly on a black background"
BEGIN, END = "<!-- written by make clients -->", "<!-- end -->"


def main() -> int:
    """Run both clients; 0 when they did what they are for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--environments", type=Path, required=True, help="folder of the folders litellm and aiperf")
    options = parser.parse_args()
    folder = options.environments.resolve()
    with tempfile.TemporaryDirectory() as temporary, _served(Path(temporary)) as server:
        address = str(server.client.base_url)
        logs = [("LiteLLM", run_litellm(folder / "litellm", address))]
        logs.append(("AIPerf", run_aiperf(folder / "aiperf", address, Path(temporary) / "aiperf")))
    blocks = [f"### {title}\n\n```\n{text}\n```\n" for title, text in logs]
    print("\n".join(blocks))
    before, _, rest = REPORT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    REPORT.write_text(before + BEGIN + "\n\n" + "\n".join(blocks) + "\n" + END + after, encoding="utf-8")
    return 0


@contextlib.contextmanager
def _served(folder: Path) -> Iterator[ServerProcess]:
    server = ServerProcess(folder, folder / "data", "--no-spare-worker", is_fake=False, PYTHONPATH=str(ROOT))
    try:
        server.start(is_ready=True)
        yield server
    finally:
        server.end()


def run_litellm(environment: Path, address: str) -> str:
    """Return what litellm_calls.py printed."""
    script = Path(__file__).with_name("litellm_calls.py")
    # Prices come with the package; without this word it would fetch newer ones.
    done = _run([_python(environment), str(script), address, MODEL], LITELLM_LOCAL_MODEL_COST_MAP="True")
    return f"litellm {_version(environment, 'litellm')}\n{done.strip()}"


def run_aiperf(environment: Path, address: str, folder: Path) -> str:
    """Profile the server; return the table of what AIPerf measured.

    Raises:
        AssertionError: a request failed, or AIPerf did not find the two fields that only it reads.
    """
    folder.mkdir()
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"text": PROMPT}) + "\n" for _ in range(NUM_REQUESTS)))
    words = ["profile", "--model", MODEL, "--url", address, "--endpoint-type", "video-generation"]
    words += ["--input-file", str(prompts), "--custom-dataset-type", "single-turn", "--tokenizer", str(TOKENIZER)]
    words += ["--request-count", str(NUM_REQUESTS), "--concurrency", "2", "--extra-inputs", "size:96x96"]
    words += ["--download-video-content", "--ui", "none"]
    program = str(environment / "bin" / "aiperf")
    _run([program, *words, "--output-artifact-dir", str(folder)], AIPERF_HTTP_VIDEO_POLL_INTERVAL="0.2")
    measured = json.loads((folder / "profile_export_aiperf.json").read_text())
    assert measured["request_count"]["avg"] == NUM_REQUESTS, measured["request_count"]
    assert measured.get("error_request_count", {"avg": 0})["avg"] == 0, measured["error_request_count"]
    assert measured["video_inference_time"]["min"] > 0 and measured["video_peak_memory"]["min"] > 0
    table = (folder / "profile_export_console.txt").read_text()
    shown = [
        line for line in table.splitlines() if re.search(r"Request (Latency|Count|Error|Thr)|Video (Inf|Peak)", line)
    ]
    heading = "\n".join(["aiperf " + " ".join(words), f"aiperf {_version(environment, 'aiperf')}"])
    return _clean("\n".join([heading, *shown]), folder)


def _clean(text: str, folder: Path) -> str:
    for path, name in ((str(folder), "."), (str(ROOT), ".")):
        text = text.replace(path, name)
    return re.sub(r"http://127\.0\.0\.1:\d+", "http://127.0.0.1:8000", text)


def _python(environment: Path) -> str:
    return str(environment / "bin" / "python")


def _version(environment: Path, package: str) -> str:
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return _run([_python(environment), "-c", code]).strip()


def _run(command: list[str], **environment: str) -> str:
    # Not our own packages: the clients are to find theirs.
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command, env={**clean, **environment}, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )
    assert done.returncode == 0, f"{command[0]} failed\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
