"""The table of published few-step Wan students: where each lies, how it is sampled, and where that is stated.

Every fact is as its source states it; nothing here was checked against the weights. Imports nothing heavy.
"""

import difflib
from dataclasses import dataclass

from codmd_serve.wan.families import BASE_1_3B, BASE_14B, METHOD_SAMPLING, WIDTH_1_3B, WIDTH_14B

UNKNOWN = "unknown"
APACHE = "Apache-2.0"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where facts of a student are stated.

    Attributes:
        facts: which, in words.
        where: a repository's file with its commit, an issue, or a page.
    """

    facts: str
    where: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Student:
    """A published student.

    Attributes:
        name: what `--bundle` takes.
        repository: hub id.
        file: path in the repository; empty for the whole of it.
        base: hub id of the diffusers pipeline that it was distilled from.
        method: one of METHOD_SAMPLING.
        licence: of the weights; UNKNOWN where no source states one.
        is_bidirectional: whether that has to be said when it is converted.
        refused: why it cannot be served; empty when it can.
        sources: of all this.
    """

    name: str
    repository: str
    file: str
    base: str
    method: str
    sources: tuple[Source, ...]
    licence: str = UNKNOWN
    is_bidirectional: bool = False
    refused: str = ""

    @property
    def place(self) -> str:
        """Return repository and file as `--bundle` takes them."""
        return f"{self.repository}:{self.file}" if self.file else self.repository

    @property
    def timesteps(self) -> tuple[float, ...]:
        """Return what the network is fed, one number a denoising step."""
        width = WIDTH_14B if self.base == BASE_14B else WIDTH_1_3B
        return METHOD_SAMPLING[self.method].grid(width).timesteps

    @property
    def sampling(self) -> str:
        """Return its sampler: sde or ode."""
        return METHOD_SAMPLING[self.method].sampler


_CODMD = (
    Source(facts="repository, files", where="https://huggingface.co/wzhangek/CoDMD"),
    Source(
        facts="steps, sampler",
        where="JIA-Lab-research/CoDMD@aef0ec0 configs/wan_dmd_tar.yaml, configs/wan_dmd_tar_14b.yaml, "
        "copula_dmd/models/wan/bidirectional_inference.py, copula_dmd/models/wan/wan_wrapper.py",
    ),
    Source(facts="licence", where="its code is Apache-2.0 (README.md@0fd73b1); none is stated for the weights"),
)
_RCM = (
    Source(facts="repository", where="NVlabs/rcm README.md, Inference: an unofficial reproduction with Wan"),
    Source(facts="files", where="NVlabs/rcm README.md@18b1c09 and Wan.md@ada796f"),
    Source(facts="steps, sampler", where="NVlabs/rcm@5b41aa9 rcm/inference/wan2pt1_t2v_rcm_infer.py"),
)
_LIGHTX2V_SAMPLING = Source(
    facts="steps, sampler",
    where="ModelTC/LightX2V docs/EN/source/method_tutorials/step_distill.md@0eca726 (1000, 750, 500, 250 at shift 5), "
    "lightx2v/models/schedulers/wan/step_distill/scheduler.py@21ef47a (noise is added again)",
)
_FASTWAN = (
    Source(facts="repository", where="hao-ai-lab/FastVideo docs/inference/support_matrix.md@031123d"),
    Source(facts="steps, sparse attention", where="https://hao-ai-lab.github.io/FastVideo/distillation/dmd.html"),
    Source(facts="licence", where="https://hao-ai-lab.github.io/blogs/fastvideo_post_training"),
)
_VSA = "it was trained with VSA, a sparse attention; with full attention it is another model"
_TABLE = (
    Student(
        name="codmd-wan2.1-1.3b",
        repository="wzhangek/CoDMD",
        file="CoDMD_wan2.1_T2V_1.3B.pt",
        base=BASE_1_3B,
        method="codmd",
        sources=_CODMD,
    ),
    Student(
        name="codmd-wan2.1-14b",
        repository="wzhangek/CoDMD",
        file="CoDMD_wan2.1_T2V_14B.pt",
        base=BASE_14B,
        method="codmd",
        sources=_CODMD,
    ),
    Student(
        name="rcm-wan2.1-1.3b",
        repository="worstcoder/rcm-Wan",
        file="rCM_Wan2.1_T2V_1.3B_480p.pt",
        base=BASE_1_3B,
        method="rcm",
        sources=_RCM,
    ),
    Student(
        name="rcm-wan2.1-14b",
        repository="worstcoder/rcm-Wan",
        file="rCM_Wan2.1_T2V_14B_480p.pt",
        base=BASE_14B,
        method="rcm",
        sources=_RCM,
    ),
    Student(
        name="causvid-wan2.1-1.3b",
        repository="tianweiy/CausVid",
        file="bidirectional_checkpoint2/model.pt",
        base=BASE_1_3B,
        method="causvid",
        sources=(
            Source(facts="repository, folder", where="https://github.com/tianweiy/CausVid/issues/45"),
            Source(
                facts="base, steps", where="tianweiy/CausVid@ca21150 configs/wan_bidirectional_dmd_from_scratch.yaml"
            ),
        ),
    ),
    Student(
        name="lightx2v-wan2.1-14b",
        repository="lightx2v/Wan2.1-Distill-Models",
        file="wan2.1_t2v_14b_lightx2v_4step.safetensors",
        base=BASE_14B,
        method="lightx2v",
        sources=(
            Source(
                facts="repository, file",
                where="ModelTC/LightX2V docs/EN/source/getting_started/model_structure.md@29c8504",
            ),
            _LIGHTX2V_SAMPLING,
        ),
    ),
    Student(
        name="self-forcing-plus-wan2.1-14b",
        repository="lightx2v/Wan2.1-T2V-14B-StepDistill-CfgDistill",
        file="distill_model.pt",
        base=BASE_14B,
        method="self-forcing",
        is_bidirectional=True,
        sources=(
            Source(facts="repository", where="GoatWu/Self-Forcing-Plus README.md@65d1189"),
            Source(facts="file", where="ModelTC/LightX2V lightx2v/models/networks/wan/distill_model.py"),
            _LIGHTX2V_SAMPLING,
        ),
    ),
    Student(
        name="fastwan-wan2.1-1.3b",
        repository="FastVideo/FastWan2.1-T2V-1.3B-Diffusers",
        file="",
        base=BASE_1_3B,
        method="fastwan",
        licence=APACHE,
        refused=_VSA,
        sources=_FASTWAN,
    ),
    Student(
        name="fastwan-wan2.1-14b",
        repository="FastVideo/FastWan2.1-T2V-14B-480P-Diffusers",
        file="",
        base=BASE_14B,
        method="fastwan",
        licence=APACHE,
        refused=_VSA,
        sources=_FASTWAN,
    ),
)
STUDENTS = {student.name: student for student in _TABLE}


def nearest_name(name: str) -> str:
    """Return the name of the table that is most like `name`."""
    # Not get_close_matches: it has a bound below which it knows none.
    return max(STUDENTS, key=lambda known: difflib.SequenceMatcher(None, name.lower(), known).ratio())


def plain_table() -> str:
    """Return the table for a terminal: a paragraph for each student."""
    return "\n".join(_paragraph(student) for student in STUDENTS.values())


def _paragraph(student: Student) -> str:
    lines = [student.name, f"    {student.place}", f"    base     {student.base}"]
    lines.append(f"    steps    {_steps(student)}, {student.sampling} ({student.method})")
    lines.append(f"    licence  {student.licence}")
    if student.refused:
        lines.append(f"    refused  {student.refused}")
    lines += [f"    source   {source.facts}: {source.where}" for source in student.sources]
    return "\n".join(lines) + "\n"


def markdown_table() -> str:
    """Return the table of docs/how-to/published-students.md."""
    heading = ("`--bundle`", "repository : file", "base", "steps", "sampler", "licence of the weights", "served")
    rows = [heading, ("---",) * len(heading)]
    for student in STUDENTS.values():
        place = f"{student.repository} : {student.file}" if student.file else student.repository
        served = f"no: {student.refused}" if student.refused else "yes"
        rows.append(
            (f"`{student.name}`", place, student.base, _steps(student), student.sampling, student.licence, served)
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def markdown_sources() -> str:
    """Return the list of sources of docs/how-to/published-students.md."""
    lines = []
    for student in STUDENTS.values():
        lines.append(f"- `{student.name}`")
        lines += [f"  - {source.facts}: {source.where}" for source in student.sources]
    return "\n".join(lines) + "\n"


def _steps(student: Student) -> str:
    return f"{len(student.timesteps)}: {' '.join(f'{timestep:.4g}' for timestep in student.timesteps)}"
