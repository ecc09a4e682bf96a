"""The table of caption embeddings equals what the data pipeline of distillation makes of the same captions."""

import numpy as np
import torch

from codmd_serve.wan.attention import compact_prompt_embeds
from codmd_serve.wan.text import encode_prompts
from distill.pretrain.config import TextConfig
from distill.pretrain.prompts import MIN_POSITIONS, build_prompt_table
from distill.pretrain.text import build_text_encoder, build_tokenizer
from distill.worlds.shapeworld.captions import sample_caption

CPU = torch.device("cpu")


def test_rows_are_the_encoders_and_a_dropped_caption_is_the_empty_one() -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(TextConfig(d_model=16, d_ff=16, num_layers=1, num_heads=2), len(tokenizer)).eval()
    rng = np.random.default_rng(0)
    captions = [sample_caption(rng) for _ in range(70)]
    captions.append(captions[3])
    table = build_prompt_table(tokenizer, encoder, captions, CPU)
    assert table.embeds.shape == (72, MIN_POSITIONS, 16)
    wanted = compact_prompt_embeds(encode_prompts(tokenizer, encoder, [*captions, ""], MIN_POSITIONS))
    torch.testing.assert_close(table.embeds[:, : wanted.shape[1]], wanted)
    assert table.embeds[:, -1].eq(0).all()  # one position is left to stand for all padding
    rows = table.rows(torch.tensor([3, 70, 5]), torch.tensor([False, False, True]))
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[2], table.embeds[-1])


def test_no_caption_of_the_grammar_is_longer_than_the_table() -> None:
    tokenizer, rng = build_tokenizer(), np.random.default_rng(1)
    longest = max(len(ids) for ids in tokenizer([sample_caption(rng, "train", 2) for _ in range(4000)]).input_ids)
    assert longest < MIN_POSITIONS
