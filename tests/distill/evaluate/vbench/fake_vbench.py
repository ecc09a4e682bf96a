"""Stands in for the vbench package: the same calls and files, scores that follow from the names of the videos.

The environment variable VBENCH_FAULT makes it fail as the real one can: nan, crash, drop (an undecodable video left
out), skip (no object found), other (a mean that is not that of the videos).
"""

import importlib
import json
import os
from pathlib import Path

FAULT = os.environ.get("VBENCH_FAULT", "")


class VBench:
    def __init__(self, device, full_info_dir, output_path):
        self.device, self.full_info_dir, self.output_path = device, full_info_dir, output_path

    def build_full_info_json(self, *args, **kwargs):
        raise AssertionError("looks for files that are named by their prompt")

    def evaluate(self, videos_path, name, dimension_list, **kwargs):
        assert kwargs == {"imaging_quality_preprocessing_mode": "longer"} and self.device == "cpu"
        (dimension,) = dimension_list
        if FAULT == "crash":
            raise RuntimeError("no such weights")
        entries = json.loads(Path(self.build_full_info_json(videos_path, name, dimension_list)).read_text())
        videos = []
        for entry in entries:
            assert entry["dimension"] == [dimension] and isinstance(entry["prompt_en"], str)
            for path in entry["video_list"]:
                if dimension == "human_action":
                    assert importlib.import_module("vbench.human_action").load_video(path)
                    assert "person is running" in path
                else:
                    assert Path(path).is_file(), path
                sample = int(Path(path).stem.rpartition("-")[2])
                videos.append({"video_path": path, "video_results": score_of(dimension, sample)})
        if FAULT in ("drop", "skip"):
            del videos[0]
        scores = [video["video_results"] for video in videos]
        mean = sum(scores) / len(scores) / (100 if dimension == "imaging_quality" else 1)
        if FAULT == "nan":
            mean = float("nan")
        path = Path(self.output_path) / f"{name}_eval_results.json"
        path.write_text(json.dumps({dimension: [mean, videos]}))


def score_of(dimension, sample):
    if dimension == "human_action":
        return sample == 0
    value = 0.9 if sample == 0 else 0.5
    return 100 * value if dimension == "imaging_quality" else value
