"""Reading prompt lists: of the file, of a wheel, and what is refused."""

import json
import zipfile
from pathlib import Path

import pytest

from codmd_serve.errors import ConfigError
from distill.evaluate.vbench.suite import LIST_NAME, find_suite, read_augmented, read_suite


def test_suite_merges_a_prompt_that_stands_there_twice_and_keeps_case_apart(suite_file: Path) -> None:
    suite = read_suite(suite_file)
    assert suite.num_entries == 7 and len(suite.prompts) == 6 and not suite.is_official
    ring = next(prompt for prompt in suite.prompts if prompt.text == "a red ring")
    assert ring.dimensions == ["appearance_style", "overall_consistency", "aesthetic_quality", "imaging_quality"]
    assert ring.auxiliary == {"appearance_style": {"appearance_style": "red"}} and ring.lines == [4, 5]
    assert [prompt.index for prompt in suite.prompts] == list(range(6))


def test_suite_is_read_from_a_wheel(suite_file: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "vbench-0.1.5-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(LIST_NAME, suite_file.read_bytes())
    assert read_suite(wheel) == read_suite(suite_file)


def test_augmented_prompts_are_matched_by_line(suite_file: Path, tmp_path: Path) -> None:
    path = tmp_path / "longer.txt"
    path.write_text("".join(f"longer {line}\n" for line in range(7)))
    assert read_augmented(path, read_suite(suite_file)) == {
        0: "longer 0",
        1: "longer 1",
        2: "longer 2",
        3: "longer 3",
        4: "longer 4",
        5: "longer 6",
    }
    path.write_text("one\n")
    with pytest.raises(ConfigError, match="1 lines, expected one for each of the 7"):
        read_augmented(path, read_suite(suite_file))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "a list of prompts"),
        ({}, "a list of prompts"),
        (["a"], "expected an object"),
        ([{"dimension": ["scene"]}], "prompt_en"),
        ([{"prompt_en": " ", "dimension": ["scene"]}], "1 to 2000 characters"),
        ([{"prompt_en": "a\nb", "dimension": ["scene"]}], "one line"),
        ([{"prompt_en": "a", "dimension": []}], "list of names"),
        ([{"prompt_en": "a", "dimension": ["taste"]}], "unknown dimension 'taste'"),
        ([{"prompt_en": "a", "dimension": ["scene"], "auxiliary_info": 3}], "auxiliary_info"),
    ],
)
def test_suite_refuses_other_content(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=message):
        read_suite(path)


def test_suite_says_where_to_get_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="pip download --no-deps vbench"):
        find_suite(None)
    with pytest.raises(ConfigError, match=r"no prompt list in nowhere\.json"):
        read_suite(Path("nowhere.json"))
    Path("broken.whl").write_bytes(b"no zip")
    with pytest.raises(ConfigError, match=r"no prompt list in broken\.whl"):
        read_suite(Path("broken.whl"))
