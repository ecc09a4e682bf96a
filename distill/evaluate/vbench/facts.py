"""What VBench and MLPerf fix: dimensions, constants, weights, presets, and published totals; standard library only.

Raw scores are in [0, 1] here; totals are in percent, as leaderboards print them.

Sources: Vchitect/VBench at 45e79ec, `scripts/constant.py` and `scripts/cal_final_score.py` (Min, Max, weights, sets);
`vbench/VBench_full_info.json` of the wheel 0.1.5 (prompts per dimension); mlcommons/inference,
`text_to_video/wan2.2-t2v-14b/run_evaluation.py` and `README.md` (the six dimensions and the reference).
"""

from __future__ import annotations

from dataclasses import dataclass

VBENCH_VERSION = "0.1.5"
SUITE_SHA256 = "5dd2de80ee43cda750b2b72ea7023657c0b90d3702041c7e4608c65dbe50dccd"
SAMPLES = 5
FLICKER = "temporal_flickering"
FLICKER_SAMPLES = 25  # prompts/README.md of VBench; five of them that are static are scored
QUALITY, SEMANTIC = "quality", "semantic"
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0


@dataclass(frozen=True, slots=True)
class Dimension:
    """One of VBench's 16 dimensions.

    Attributes:
        name: as the keys of VBench's result files.
        group: quality or semantic.
        low, high: raw scores that are normalised to 0 and 1; nothing is clipped.
        weight: within its group.
        num_prompts: in the official suite.
        model: what its evaluator downloads; empty when nothing.
    """

    name: str
    group: str
    low: float
    high: float
    weight: float
    num_prompts: int
    model: str

    def normalise(self, raw: float) -> float:
        """Return the normalised score of a raw score in [0, 1]; it may leave [0, 1]."""
        return (raw - self.low) / (self.high - self.low)


DIMENSIONS: dict[str, Dimension] = {
    dimension.name: dimension
    for dimension in (
        Dimension("subject_consistency", QUALITY, 0.1462, 1.0, 1.0, 72, "DINO ViT-B/16"),
        Dimension("background_consistency", QUALITY, 0.2615, 1.0, 1.0, 86, "CLIP ViT-B/32"),
        Dimension(FLICKER, QUALITY, 0.6293, 1.0, 1.0, 75, ""),
        Dimension("motion_smoothness", QUALITY, 0.7060, 0.9975, 1.0, 72, "AMT-S"),
        Dimension("dynamic_degree", QUALITY, 0.0, 1.0, 0.5, 72, "RAFT"),
        Dimension("aesthetic_quality", QUALITY, 0.0, 1.0, 1.0, 93, "CLIP ViT-L/14, LAION head"),
        Dimension("imaging_quality", QUALITY, 0.0, 1.0, 1.0, 93, "MUSIQ-SPAQ"),
        Dimension("object_class", SEMANTIC, 0.0, 1.0, 1.0, 79, "GRiT, detectron2"),
        Dimension("multiple_objects", SEMANTIC, 0.0, 1.0, 1.0, 82, "GRiT, detectron2"),
        Dimension("human_action", SEMANTIC, 0.0, 1.0, 1.0, 100, "UMT-L/16"),
        Dimension("color", SEMANTIC, 0.0, 1.0, 1.0, 85, "GRiT, detectron2"),
        Dimension("spatial_relationship", SEMANTIC, 0.0, 1.0, 1.0, 84, "GRiT, detectron2"),
        Dimension("scene", SEMANTIC, 0.0, 0.8222, 1.0, 86, "Tag2Text"),
        Dimension("appearance_style", SEMANTIC, 0.0009, 0.2855, 1.0, 90, "CLIP ViT-B/32"),
        Dimension("temporal_style", SEMANTIC, 0.0, 0.3640, 1.0, 100, "ViCLIP"),
        Dimension("overall_consistency", SEMANTIC, 0.0, 0.3640, 1.0, 93, "ViCLIP"),
    )
}
SKIPS_VIDEOS = ("color",)
"""VBench leaves videos out of these means where it finds no object: part of the protocol, not a failure."""
PER_VIDEO_PERCENT = ("imaging_quality",)
"""VBench writes these scores of single videos in 0..100, and their mean in 0..1."""


@dataclass(frozen=True, slots=True)
class Preset:
    """Which dimensions and samples a plan takes, and how they are averaged.

    Attributes:
        name: on the command line.
        dimensions: in order.
        samples: videos of each prompt.
        flicker_samples: videos of each prompt of temporal flickering, before its static filter.
        has_totals: Quality, Semantic and Total are defined; else the plain mean of the raw scores is.
        note: one sentence for the report.
    """

    name: str
    dimensions: tuple[str, ...]
    samples: int
    flicker_samples: int
    has_totals: bool
    note: str


PRESETS: dict[str, Preset] = {
    "vbench": Preset("vbench", tuple(DIMENSIONS), SAMPLES, FLICKER_SAMPLES, True, ""),
    # subject_consistency has 72 prompts, scene 86, appearance_style 90: MLPerf's 248 prompts.
    "mlperf": Preset(
        "mlperf",
        (
            "subject_consistency",
            "background_consistency",
            "motion_smoothness",
            "dynamic_degree",
            "appearance_style",
            "scene",
        ),
        1,
        1,
        False,
        "MLPerf Inference v6.0: mean of six raw scores; its reference for Wan2.2-T2V-A14B at 1280x720, 81 frames and "
        "20 steps is 70.48, of which 99% is 69.78",
    ),
}
VBENCH2_NEEDS = (
    "VBench-2.0 is not driven: its 18 dimensions need LLaVA-Video-7B, Qwen2.5-7B, YOLO-World, ArcFace and VGG19 on a "
    "GPU, 1,013 other prompts with 3 videos each and 20 for its diversity; a preset would need its prompt list and "
    "result files, and the plain mean of its five categories as total"
)


@dataclass(frozen=True, slots=True)
class Cited:
    """A published total, never ours.

    Attributes:
        what: model or method.
        size: of the Wan2.1 base.
        total: in percent.
        source: who published it.
    """

    what: str
    size: str
    total: float
    source: str


TEACHER, CLAIMANT = "teacher, 50 steps", "CoDMD"
CITED = (
    Cited(CLAIMANT, "1.3B", 84.46, "CoDMD, abstract"),
    Cited("DMD", "1.3B", 83.38, "CoDMD, abstract"),
    Cited("rCM", "1.3B", 82.81, "CoDMD, abstract"),
    Cited("rCM", "1.3B", 84.43, "rCM, own paper"),
    Cited("DMD", "1.3B", 82.78, "Salt, README"),
    Cited("rCM", "1.3B", 82.73, "Salt, README"),
    Cited(CLAIMANT, "14B", 84.87, "CoDMD, abstract"),
    Cited("DMD", "14B", 83.81, "CoDMD, abstract"),
    Cited("rCM", "14B", 84.05, "CoDMD, abstract"),
    Cited("rCM", "14B", 84.92, "rCM, own paper"),
    Cited(TEACHER, "1.3B", 83.02, "rCM, own paper"),
    Cited(TEACHER, "1.3B", 83.31, "VBench leaderboard"),
    Cited(TEACHER, "1.3B", 83.69, "CoDMD, paper, by a reader's notes"),
    Cited(TEACHER, "1.3B", 84.26, "Self-Forcing, paper"),
    Cited(TEACHER, "14B", 83.58, "rCM, own paper"),
    Cited(TEACHER, "14B", 83.69, "VBench leaderboard"),
)
SPREAD_NOTE = (
    "One teacher (Wan2.1 1.3B) is published at 83.02, 83.31, 83.69 and 84.26: a spread of 1.24, wider than the 1.08 "
    "between CoDMD and DMD. Totals of different pipelines cannot be compared; only pairs of one pipeline count."
)
MISPRINTS = {
    ("FlashVideo-8fps", SEMANTIC): "its own dimensions give 82.20",
    ("FlashVideo-8fps", "total"): "made of the misprinted semantic score",
}
"""Published values that contradict the dimensions of their own row."""


def missing_dimensions(have: set[str], wanted: tuple[str, ...]) -> list[str]:
    """Return the wanted dimensions that are not there, in VBench's order."""
    return [name for name in wanted if name not in have]
