"""Prompt embeddings equal those of the diffusers pipeline; warnings name what the encoder cannot see."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import WanPipeline

from codmd_serve.wan.text import clean_prompt, encode_prompts, prompt_warnings
from distill.worlds.shapeworld.captions import grammar

PROMPTS = ["a red circle", "a  blue &amp;amp; white\ttriangle\n moves", "\u00e2\u20ac\u201d a ring", "dragon", ""]


@pytest.mark.parametrize("length", [512, 4])
def test_encode_prompts_equals_the_pipeline(tiny_pipeline: WanPipeline, length: int) -> None:
    with torch.no_grad():
        expected, _ = tiny_pipeline.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, max_sequence_length=length
        )
    embeds = encode_prompts(tiny_pipeline.tokenizer, tiny_pipeline.text_encoder, PROMPTS, length)
    assert embeds.shape == (len(PROMPTS), length, 16)
    # Fewer masked positions are summed up: another order of rounding. Zeroed positions are zero on both sides.
    assert torch.equal(embeds == 0, expected == 0)
    torch.testing.assert_close(embeds, expected, rtol=1e-5, atol=1e-6)


def test_encode_prompts_encodes_no_more_positions_than_the_longest_prompt_has(tiny_pipeline: WanPipeline) -> None:
    seen = []
    hook = tiny_pipeline.text_encoder.register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape))
    try:
        embeds = encode_prompts(tiny_pipeline.tokenizer, tiny_pipeline.text_encoder, PROMPTS)
    finally:
        hook.remove()
    longest = max(len(ids) for ids in tiny_pipeline.tokenizer([clean_prompt(prompt) for prompt in PROMPTS]).input_ids)
    assert seen == [(len(PROMPTS), longest)] and embeds.shape[1] == 512


def test_padding_is_zero_even_where_the_encoder_gives_none_numbers() -> None:
    def encoder(input_ids: torch.Tensor, mask: torch.Tensor) -> SimpleNamespace:
        hidden = torch.where(mask[:, :, None] > 0, 1.0, float("nan")).expand(-1, -1, 3)
        return SimpleNamespace(last_hidden_state=hidden)

    encoder.device = torch.device("cpu")  # type: ignore[attr-defined]
    mask = torch.tensor([[1, 1, 0, 0]])
    tokens = SimpleNamespace(input_ids=mask, attention_mask=mask)
    embeds = encode_prompts(lambda *args, **options: tokens, encoder, ["x"], 4)
    assert embeds[0].tolist() == [[1.0] * 3] * 2 + [[0.0] * 3] * 2


def test_clean_prompt_unescapes_twice_and_collapses_space() -> None:
    assert clean_prompt("  a&amp;lt;b \n\n c ") == "a<b c"


def test_prompt_warnings_names_each_unknown_word_once_and_no_punctuation(tiny_pipeline: WanPipeline) -> None:
    warnings = prompt_warnings(tiny_pipeline.tokenizer, "A red Dragon, a dragon in a castle!")
    assert warnings == ["words outside the vocabulary of this model: Dragon, dragon, in, castle"]


def test_prompt_warnings_names_symbols_too(tiny_pipeline: WanPipeline) -> None:
    for prompt, unknown in (("🔴🚀🎉", "🔴🚀🎉"), ("a red ❤ circle, 1+1!", "❤, 1, +"), ("色", "色")):
        warnings = prompt_warnings(tiny_pipeline.tokenizer, prompt)
        assert warnings == [f"words outside the vocabulary of this model: {unknown}"]


def test_prompt_warnings_says_when_nothing_is_left(tiny_pipeline: WanPipeline) -> None:
    warnings = prompt_warnings(tiny_pipeline.tokenizer, " ")
    assert warnings == ["nothing of this prompt reaches the text encoder: its tokenizer drops all of it"]


def test_prompt_warnings_are_none_for_known_words(tiny_pipeline: WanPipeline) -> None:
    assert prompt_warnings(tiny_pipeline.tokenizer, "a Red circle, moves right.") == []


def test_prompt_warnings_says_when_the_prompt_is_cut(tiny_pipeline: WanPipeline) -> None:
    assert prompt_warnings(tiny_pipeline.tokenizer, "red " * 600) == ["prompt cut to its first 512 of 601 tokens"]


def test_prompt_warnings_say_what_a_model_of_a_grammar_can_do(tiny_pipeline: WanPipeline) -> None:
    inside, outside = "a red circle moves right quickly on a black background", "a red circle moves right"
    known = grammar()
    assert prompt_warnings(tiny_pipeline.tokenizer, inside, grammar=known) == []
    (warning,) = prompt_warnings(tiny_pipeline.tokenizer, outside, grammar=known)
    assert warning == known.warning(outside)
    assert prompt_warnings(tiny_pipeline.tokenizer, outside) == []
