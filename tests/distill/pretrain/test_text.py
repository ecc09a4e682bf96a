"""Tokenizer and text encoder: every word is known, saved and loaded they are the same, training lets heads read."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from distill.pretrain.config import TextConfig
from distill.pretrain.stage import StageOptions
from distill.pretrain.text import ATTRIBUTES, attribute_labels, build_tokenizer, train_text_encoder
from distill.worlds.shapeworld.captions import parse_caption, sample_caption


def test_tokenizer_knows_every_caption_and_survives_the_disk(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    rng = np.random.default_rng(0)
    captions = [sample_caption(rng, split) for split in ("train", "held_out") for _ in range(300)]
    for ids, again in zip(tokenizer(captions).input_ids, loaded(captions).input_ids, strict=True):
        assert ids == again
        assert tokenizer.unk_token_id not in ids
        assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer.unk_token_id in loaded("a plaid circle").input_ids


def test_labels_cover_every_attribute() -> None:
    labels = attribute_labels(parse_caption("a blue ring left of a white cross stay still on a navy background"))
    read = {name: options[index] for (name, options), index in zip(ATTRIBUTES.items(), labels, strict=True)}
    assert read == {
        "colour1": "blue",
        "shape1": "ring",
        "colour2": "white",
        "shape2": "cross",
        "motion1": "still",
        "speed1": "none",
        "motion2": "still",
        "speed2": "none",
        "background": "navy",
        "relation": "left of",
    }


def test_training_lowers_the_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = TextConfig(d_model=32, d_ff=64, num_layers=1, num_heads=2, num_steps=100, batch_size=32)
    options = StageOptions(
        folder=tmp_path, device=torch.device("cpu"), precision="fp32", budget_s=None, stop=lambda: False
    )
    with caplog.at_level("INFO", logger="distill.pretrain.stage"):
        trained = train_text_encoder(config, 0, options)
    assert trained is not None
    losses = [float(message.split("loss=")[1].split()[0]) for message in caplog.messages]
    assert losses[-1] < 0.92 * losses[0]
    assert not any(parameter.requires_grad for parameter in trained[1].parameters())
