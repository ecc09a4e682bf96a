"""Every Markdown page: commands parse, GPU commands fit by `plan`, links lead somewhere, code compiles."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

import pytest
from documented import MisprintError, judge, judge_flags
from mdpages import anchors, blocks, code_spans, commands, links, pages
from readme_tree import PAGE, replaced, tree

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = pages(ROOT)
SHELLS = ("bash", "sh", "shell", "console")


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@every_page
def test_commands_are_accepted_by_the_real_parsers(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in SHELLS:
            for words in commands(block.text):
                try:
                    judge(words)
                except MisprintError as error:
                    pytest.fail(f"{name_of(page)}:{block.line}: {error}")


@every_page
def test_inline_commands_have_the_flags_that_they_name(page: Path) -> None:
    for span in code_spans(page.read_text(encoding="utf-8")):
        if re.match(r"codmd-(serve|distill) [a-z-]", span):
            try:
                judge_flags(shlex.split(span))
            except MisprintError as error:
                pytest.fail(f"{name_of(page)}: {error}")


@every_page
def test_python_compiles_and_imports_what_there_is(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            missing = [name for name in names if importlib.util.find_spec(name) is None]
            assert missing == [], f"{name_of(page)}:{block.line}"


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page.read_text(encoding="utf-8")):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        there = (page.parent / path).resolve() if path else page
        assert there.exists(), f"{name_of(page)}: there is no {target}"
        if page.is_relative_to(DOCS):
            assert there.is_relative_to(DOCS), f"{name_of(page)}: {target} is not part of the site"
        if anchor and there.suffix == ".md":
            assert anchor in anchors(there.read_text(encoding="utf-8")), (
                f"{name_of(page)}: {target} has no such heading"
            )


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 200


def test_tree_is_that_of_the_disk() -> None:
    page = (ROOT / PAGE).read_text(encoding="utf-8")
    assert replaced(page, tree(ROOT)) == page, "run: .venv/bin/python scripts/readme_tree.py --write"


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("codmd-serve serve --prot 80", "unrecognized arguments: --prot"),
        ("codmd-serve --workers many", "workers must be auto"),
        ("codmd-serve --host 0.0.0.0", "refusing to listen"),
        ("codmd-serve sing", "invalid choice"),
        ("codmd-distill train --recipe wan_1_3b --out o --set prompts=p", "on 1 GPUs of 80 GiB lacks"),
        ("codmd-distill train --recipe wan_9b --out o", "--recipe must be one of"),
        ("codmd-distill train --out o --set batch=3", "unknown setting 'batch'"),
        (
            "torchrun --nproc-per-node 8 --no-python .venv/bin/codmd-distill train --recipe wan_14b --out o",
            "on 8 GPUs of 80 GiB lacks",
        ),
        ("curl localhost:8000/videos", "no route GET /videos"),
        ('curl localhost:8000/generate -d \'{"promt": "a"}\'', "promt"),
        ("make everything", "no target everything"),
        ("pip install -e '.[gpu]'", "no extra gpu"),
        ("python -m codmd_serve.nothing", "no module codmd_serve.nothing"),
        ("pytest tests/gpu/test_nothing.py", "there is no tests/gpu/test_nothing.py"),
        ("codmd-sreve serve", "neither a program of ours"),
    ],
)
def test_a_misprint_is_found(command: str, complaint: str) -> None:
    (words,) = commands(command)
    with pytest.raises(MisprintError, match=re.escape(complaint)):
        judge(words)


def test_commands_are_cut_as_a_shell_cuts_them() -> None:
    script = (
        "A=1 make serve  # the maker's comment\n# \"\nid=$(curl -s x | cut -d'\"' -f4)\n"
        "python -c 'a\nb' > out 2> err && make \\\n  test\n"
    )
    assert list(commands(script)) == [
        ["make", "serve"],
        ["curl", "-s", "x"],
        ["cut", '-d"', "-f4"],
        ["python", "-c", "a\nb"],
        ["make", "test"],
    ]


def test_blocks_and_links_of_a_page_are_found() -> None:
    text = (
        "# A `b` c\n\n    make serve\n\n<!-- run: a.mp4 b.mp4 -->\n```bash\nls\n```\n\n"
        "[x](y.md#z) ![p](q.png) `[n](m.md)`\n"
    )
    assert [(block.language, block.text, block.files) for block in blocks(text)] == [
        ("bash", "ls\n", ("a.mp4", "b.mp4")),
        ("bash", "make serve\n", None),
    ]
    assert links(text) == ["y.md#z", "q.png"] and anchors(text) == {"a-b-c"}


def test_an_inline_flag_that_is_gone_is_found() -> None:
    judge_flags(shlex.split("codmd-serve serve --workers 0"))
    with pytest.raises(MisprintError, match="no flag --worker-count"):
        judge_flags(shlex.split("codmd-serve work --worker-count 3"))
    with pytest.raises(MisprintError, match="no command sing"):
        judge_flags(shlex.split("codmd-distill sing"))
