"""Runs one dimension of the `vbench` package; started by `run` with the Python of an environment that has it.

It imports nothing of this project, which is not installed there: `python runner.py REQUEST.json`. The request names
the dimension, the device, the list of prompts and videos, and the folder and name of the result.
"""

import importlib
import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any


def main(request_path: str) -> None:
    """Score one dimension as the request says; write <name>_eval_results.json and <name>_versions.json."""
    request = json.loads(Path(request_path).read_text(encoding="utf-8"))
    vbench: Any = importlib.import_module("vbench")
    info_path = request["info"]

    class Planned(vbench.VBench):  # type: ignore[misc]
        """VBench with our list of videos; its own is looked up by file names that are whole prompts."""

        def build_full_info_json(self, *_: Any, **__: Any) -> str:
            return str(info_path)

    if request["aliases"]:
        _read_by_alias(request["dimension"], request["aliases"])
    Planned(request["device"], info_path, request["output"]).evaluate(
        videos_path=request["output"],
        name=request["name"],
        dimension_list=[request["dimension"]],
        # What `vbench evaluate` passes unless it is told otherwise.
        imaging_quality_preprocessing_mode="longer",
    )
    names = ("vbench", "torch", "numpy", "opencv-python", "opencv-python-headless", "decord", "transformers", "timm")
    versions = {"python": platform.python_version(), **{name: _version(name) for name in names}}
    path = Path(request["output"]) / f"{request['name']}_versions.json"
    path.write_text(json.dumps({name: version for name, version in versions.items() if version}), encoding="utf-8")


def _read_by_alias(dimension: str, aliases: dict[str, str]) -> None:
    """Let an evaluator that reads a label from the name of a file read the file itself from elsewhere."""
    module: Any = importlib.import_module(f"vbench.{dimension}")
    load_video = module.load_video
    module.load_video = lambda name, *args, **kwargs: load_video(aliases[name], *args, **kwargs)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    main(sys.argv[1])
