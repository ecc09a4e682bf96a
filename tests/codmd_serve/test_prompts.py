"""What a prompt says: blank is what Wan's tokenizer leaves nothing of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from codmd_serve.prompts import clean_prompt, is_blank, lone_surrogate


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        " \n\t",
        "\ufeff",
        "\x00\x07",
        "\u200b\u200d",
        "&nbsp;",
        "\u00ad",
        "\ufe0f",
        "\u3164",
        "\u2800",
        "\u2028",
    ],
)
def test_prompts_of_nothing_are_blank(prompt: str) -> None:
    assert is_blank(prompt)


@pytest.mark.parametrize("prompt", ["a", "\ufeffa", "1", "!", "🔴", "é", "色", "a\u0301", "\ue000"])
def test_prompts_of_something_are_not(prompt: str) -> None:
    assert not is_blank(prompt)


def test_halves_of_characters_are_found() -> None:
    assert lone_surrogate("a\ud83d") == "\ud83d" and lone_surrogate("a🔴") is None


@given(st.text())
def test_blank_is_a_matter_of_the_cleaned_text(prompt: str) -> None:
    assert is_blank(prompt) == is_blank(clean_prompt(prompt))
    assert is_blank(prompt) or not is_blank(prompt + "a")
