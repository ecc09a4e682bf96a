"""Prompt files of other systems are read as meant; whatever is left out is counted; anything else is one sentence."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codmd_serve.errors import ConfigError
from codmd_serve.prompts import is_blank
from distill.data.texts import Prompts, read_prompt_file


def read(folder: Path, name: str, data: bytes | str) -> Prompts:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return read_prompt_file(folder / name)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_prompt_with_another_line_separator_is_one_prompt(tmp_path: Path, separator: str) -> None:
    text = f"a red{separator}ring"
    row = json.dumps({"prompt": text}, ensure_ascii=False)
    if separator >= "\x20":  # JSON allows it raw within a string
        assert read(tmp_path, "p.jsonl", f"{row}\n{row}").texts == [text, text]
    assert read(tmp_path, "p.txt", f"{text}\r\n{text}\n").texts == [text, text]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_no_part_of_the_first_prompt(tmp_path: Path, encoding: str) -> None:
    assert read(tmp_path, "p.jsonl", '{"prompt": "a ring"}\r\n'.encode(encoding)).texts == ["a ring"]
    assert read(tmp_path, "p.txt", "a ring\r\nÄ\r\n".encode(encoding)).texts == ["a ring", "Ä"]


def test_what_was_dropped_and_doubled_is_counted(tmp_path: Path) -> None:
    prompts = read(tmp_path, "p.TXT", "a\n\n\ufeff\nb\n \u200b \na\n\na")
    assert prompts.texts == ["a", "b", "a", "a"] and (prompts.num_blank, prompts.num_duplicates) == (4, 2)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        (
            "p.jsonl",
            '{"prompt": "a"}\n{"prompt": "\\ufeff"}',
            "p.jsonl line 2 needs a text under one of prompt, caption",
        ),
        ("p.jsonl", '{"prompt": "a", "prompt": "b"}', "p.jsonl line 1 cannot be read as JSON: the key 'prompt' stands"),
        ("p.jsonl", '{"prompt": "\\ud83d"}', "p.jsonl line 1 holds half of a character"),
        ("p.jsonl", "[" * 50_000, "p.jsonl line 1 cannot be read as JSON: it is nested too deeply"),
        ("p.txt", b"a\nb\xe4\n", "p.txt is not UTF-8 text: line 2 holds the byte 0xe4; save it as UTF-8"),
        ("p.txt", "\ufeff\n \n", "holds no prompt"),
        ("p.parquet", "a", "prompts must be a .txt, .jsonl or .tar file"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_line(
    tmp_path: Path, name: str, data: bytes | str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read(tmp_path, name, data)


def test_a_folder_without_shards_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot be read: the folder holds no \.tar"):
        read_prompt_file(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=300) | st.text(max_size=200).map(str.encode), suffix=st.sampled_from(["txt", "jsonl"]))
def test_any_bytes_are_prompts_or_one_sentence(tmp_path: Path, data: bytes, suffix: str) -> None:
    try:
        prompts = read(tmp_path, f"p.{suffix}", data)
    except ConfigError:
        return
    assert prompts.texts and not any(map(is_blank, prompts.texts))
    for prompt in prompts.texts:
        prompt.encode()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=20), min_size=1))
def test_no_line_of_a_text_is_lost_in_silence(tmp_path: Path, lines: list[str]) -> None:
    """Every line is a prompt or counted as blank, in txt; every row is a prompt, in jsonl."""
    kept = [line for line in lines if not is_blank(line)]
    if not kept:
        return
    data = "\n".join(["first", *lines])
    prompts = read(tmp_path, "p.txt", data)
    assert prompts.texts == ["first", *(line.strip() for line in kept)]
    assert len(prompts.texts) + prompts.num_blank == len(lines) + 1 - (lines[-1] == "")
    rows = "\r\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in kept)
    assert read(tmp_path, "p.jsonl", rows).texts == [line.strip() for line in kept]
