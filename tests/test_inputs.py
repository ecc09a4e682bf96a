"""Rules for what comes from outside, kept by walking the sources: no code of strangers runs, no text is cut wrongly."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("codmd_serve", "distill", "app", "scripts")
# Output of child processes; their lines end as the terminal's do.
OF_CHILDREN = {"scripts/readme_tree.py"}


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call of a method of that name in the product, with the file it stands in."""
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == name:
                    yield str(path.relative_to(ROOT)), node


def test_every_from_pretrained_refuses_code() -> None:
    found = list(calls("from_pretrained"))
    assert len(found) >= 2
    for file, call in found:
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        trust = options.get("trust_remote_code")
        where = f"{file}:{call.lineno}"
        assert isinstance(trust, ast.Constant) and trust.value is False, f"{where} may run code of the folder"
        local = options.get("local_files_only")
        assert isinstance(local, ast.Constant) and local.value is True, f"{where} asks the hub file by file"


def test_every_torch_load_reads_weights_only() -> None:
    for file, call in calls("load"):
        if ast.unparse(call.func) == "torch.load":
            options = {keyword.arg: keyword.value for keyword in call.keywords}
            only = options.get("weights_only")
            assert isinstance(only, ast.Constant) and only.value is True, f"{file}:{call.lineno} may run code"


def test_two_files_ask_the_hub_for_pipelines_and_for_students() -> None:
    for name in ("snapshot_download", "hf_hub_download", "HfApi"):
        assert {file for file, _ in calls(name)} <= {"codmd_serve/wan/hub.py", "codmd_serve/wan/fetch.py"}, name


def test_no_text_of_users_is_split_at_the_line_ends_of_unicode() -> None:
    for file, call in calls("splitlines"):
        assert file in OF_CHILDREN, f"{file}:{call.lineno} splits at U+2028 and nine others too"
