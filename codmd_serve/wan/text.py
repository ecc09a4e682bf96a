"""Prompts to embeddings, as Wan was trained on them; knows nothing of sampling.

Legend: B prompts, L positions, D width of the text encoder.
"""

import html
import re
from typing import Any

import ftfy
import torch
from torch import Tensor

MAX_SEQUENCE_LENGTH = 512


def clean_prompt(prompt: str) -> str:
    """Repair mojibake, undo HTML entities, also doubly escaped ones, and collapse white space, as Wan does."""
    repaired = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", repaired.strip()).strip()


def encode_prompts(
    tokenizer: Any, text_encoder: Any, prompts: list[str], max_sequence_length: int = MAX_SEQUENCE_LENGTH
) -> Tensor:
    """Embed prompts; equals `WanPipeline.encode_prompt` of diffusers.

    Args:
        tokenizer: a transformers tokenizer.
        text_encoder: a UMT5EncoderModel.
        prompts: B texts, cleaned here.
        max_sequence_length: positions per prompt; longer prompts are cut.

    Returns:
        (B, max_sequence_length, D) in the dtype and on the device of the encoder. Positions past a prompt's own
        length are zero: Wan attends to all of them, unmasked, so what stands there matters.
    """
    tokens = tokenizer(
        [clean_prompt(prompt) for prompt in prompts],
        padding="max_length",
        max_length=max_sequence_length,
        truncation=True,
        add_special_tokens=True,
        return_attention_mask=True,
        return_tensors="pt",
    )
    mask_BL = tokens.attention_mask.to(text_encoder.device)
    with torch.no_grad():
        embeds_BLD: Tensor = text_encoder(tokens.input_ids.to(text_encoder.device), mask_BL).last_hidden_state
    # Selects rather than multiplies: whatever the encoder makes of padding, zero times it need not be zero.
    return embeds_BLD.masked_fill(mask_BL[:, :, None] == 0, 0.0)


def prompt_warnings(tokenizer: Any, prompt: str, max_sequence_length: int = MAX_SEQUENCE_LENGTH) -> list[str]:
    """Say what of a prompt the text encoder will not see.

    Args:
        tokenizer: a transformers tokenizer; without an unknown token, or not a fast one, no word is reported.
        prompt: the text as the user wrote it.
        max_sequence_length: positions the encoder reads.

    Returns:
        At most two sentences: one naming the words outside the vocabulary, one when the prompt is too long.
    """
    cleaned = clean_prompt(prompt)
    warnings = []
    if getattr(tokenizer, "is_fast", False) and tokenizer.unk_token_id is not None:
        tokens = tokenizer(cleaned, return_offsets_mapping=True)
        spans = [
            cleaned[start:end]
            for token_id, (start, end) in zip(tokens.input_ids, tokens.offset_mapping, strict=True)
            if token_id == tokenizer.unk_token_id
        ]
        words = list(dict.fromkeys(span for span in spans if any(char.isalnum() for char in span)))
        if words:
            warnings.append(f"words outside the vocabulary of this model: {', '.join(words)}")
        num_tokens = len(tokens.input_ids)
    else:
        num_tokens = len(tokenizer(cleaned).input_ids)
    if num_tokens > max_sequence_length:
        warnings.append(f"prompt cut to its first {max_sequence_length} of {num_tokens} tokens")
    return warnings
