"""Tokenizer and text encoder of the ShapeWorld pipeline: built from the grammar, taught by what captions mean."""

import numpy as np
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from codmd_serve.errors import CheckpointError
from distill.networks.base import open_base
from distill.pretrain.config import TextConfig
from distill.pretrain.stage import StageOptions, autocast, run_stage
from distill.worlds.shapeworld.captions import parse_caption, sample_caption, vocabulary
from distill.worlds.shapeworld.schema import BACKGROUNDS, COLOURS, MOTIONS, RELATIONS, SHAPES, SPEEDS, Scene

SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
MAX_LENGTH = 512
WORD_DROPOUT = 0.02
"""Share of words replaced by the unknown token, so that one strange word does not derail a caption."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "colour1": tuple(COLOURS),
    "shape1": SHAPES,
    "colour2": (*COLOURS, "none"),
    "shape2": (*SHAPES, "none"),
    "motion1": MOTIONS,
    "speed1": (*SPEEDS, "none"),
    "motion2": (*MOTIONS, "none"),
    "speed2": (*SPEEDS, "none"),
    "background": tuple(BACKGROUNDS),
    "relation": (*RELATIONS, "none"),
}
"""What a linear head has to read off the pooled embedding, and its values."""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A fast word-level tokenizer over the grammar's vocabulary: lower case, punctuation apart, `</s>` at the end."""
    ids = {word: index for index, word in enumerate((*SPECIAL_TOKENS, ",", ".", *vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", ids["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
    )


def build_text_encoder(config: TextConfig, vocab_size: int) -> UMT5EncoderModel:
    """A fresh UMT5 encoder."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=vocab_size,
            d_model=config.d_model,
            d_ff=config.d_ff,
            d_kv=config.d_model // config.num_heads,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
            decoder_start_token_id=0,
        )
    )


def attribute_labels(scene: Scene) -> list[int]:
    """Index of the scene's value of every entry of ATTRIBUTES."""
    second = scene.objects[1] if scene.count == 2 else ("none", "none")
    moves = (*scene.moves, ("none", None))[:2]
    values = (
        *scene.objects[0],
        *second,
        *(value or "none" for move in moves for value in move),
        scene.background,
        scene.relation or "none",
    )
    return [options.index(value) for options, value in zip(ATTRIBUTES.values(), values, strict=True)]


class _FactorHeads(nn.Module):
    """The encoder with one linear head per attribute on the mean over a caption's positions."""

    def __init__(self, encoder: UMT5EncoderModel) -> None:
        super().__init__()
        self.encoder = encoder
        width = encoder.config.d_model
        self.heads = nn.ModuleList(nn.Linear(width, len(options)) for options in ATTRIBUTES.values())

    def forward(self, input_ids: Tensor, mask_BL: Tensor) -> list[Tensor]:
        hidden = self.encoder(input_ids, mask_BL).last_hidden_state.float()
        weights = mask_BL[:, :, None].float()
        pooled = (hidden * weights).sum(1) / weights.sum(1)
        return [head(pooled) for head in self.heads]


def train_text_encoder(
    config: TextConfig, seed: int, options: StageOptions, start: str = ""
) -> tuple[PreTrainedTokenizerFast, UMT5EncoderModel] | None:
    """Train, or go on training, the text encoder, from the pipeline `start` if named; None when told to stop.

    Raises:
        CheckpointError: `start` has no text encoder of this layout, or lacks words that no step could teach it.
    """
    torch.manual_seed(seed + 1)
    tokenizer = build_tokenizer()
    encoder = build_text_encoder(config, len(tokenizer))
    if start:
        load_words(tokenizer, encoder, start, may_be_new=config.num_steps > 0)
    reader = _FactorHeads(encoder).to(options.device)

    def compute_loss(step: int, _progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        rng = np.random.default_rng([seed, 2, step])
        captions = [sample_caption(rng) for _ in range(config.batch_size)]
        labels = torch.tensor([attribute_labels(parse_caption(caption)) for caption in captions]).to(options.device)
        tokens = tokenizer(captions, padding=True, return_tensors="pt").to(options.device)
        dropped = torch.from_numpy(rng.random(tokens.input_ids.shape) < WORD_DROPOUT).to(options.device)
        is_word = tokens.input_ids >= len(SPECIAL_TOKENS)
        input_ids = tokens.input_ids.masked_fill(dropped & is_word, tokenizer.unk_token_id)
        with autocast(options):
            logits = reader(input_ids, tokens.attention_mask)
        losses = [functional.cross_entropy(part, labels[:, index]) for index, part in enumerate(logits)]
        right = torch.stack([part.argmax(1) == labels[:, index] for index, part in enumerate(logits)])
        return torch.stack(losses).mean(), {"all_right": right.all(0).float().mean()}

    trained = run_stage("text", reader, config.num_steps, config.learning_rate, compute_loss, options, use_muon=False)
    return None if trained is None else (tokenizer, reader.encoder.eval().requires_grad_(False))


def load_words(tokenizer: PreTrainedTokenizerFast, encoder: UMT5EncoderModel, start: str, *, may_be_new: bool) -> None:
    """Copy the text encoder of the pipeline `start` into `encoder`; words keep their rows whatever their number is now.

    Args:
        tokenizer: of today's grammar.
        encoder: fresh, of its vocabulary.
        start: whose grammar may have had other words.
        may_be_new: whether words that `start` does not know may keep their fresh rows.

    Raises:
        CheckpointError: missing, damaged, of another layout or without some words.
    """
    base = open_base(start)
    source = base.load(UMT5EncoderModel, "text_encoder").float()
    known = base.load_tokenizer().get_vocab()
    words = tokenizer.get_vocab()
    new = sorted(words.keys() - known.keys())
    if new and not may_be_new:
        raise CheckpointError(f"text encoder of {start} does not know {', '.join(new)}: train it with --until text")
    state, table = source.state_dict(), "shared.weight"
    rows = encoder.state_dict()[table].clone()
    if rows.shape[1:] != state[table].shape[1:]:
        raise CheckpointError(f"text_encoder of {start} has another layout than this run's: its width differs")
    for word in words.keys() & known.keys():
        rows[words[word]] = state[table][known[word]]
    tables = {key: rows for key in state if key.endswith(("shared.weight", "embed_tokens.weight"))}
    try:
        encoder.load_state_dict(state | tables)
    except RuntimeError as error:
        raise CheckpointError(f"text_encoder of {start} has another layout than this run's: {error}") from error
