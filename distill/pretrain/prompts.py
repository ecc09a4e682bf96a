"""Embeddings of all training captions as one table on the training device.

Legend: P captions, B batch, L prompt positions, D text width.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from codmd_serve.wan.text import encode_prompts

ENCODE_BATCH = {"cpu": 64, "cuda": 1024}
POSITIONS_MULTIPLE = 8
# The longest caption of the grammar has 25 tokens: one shape for all runs, which can be compiled before they have any.
MIN_POSITIONS = 32


@dataclass(frozen=True, slots=True)
class PromptTable:
    """Compact embeddings, all of one length, so that a compiled network sees one shape.

    Attributes:
        embeds: (P + 1, L, D) float32, rows past a caption's length zero, the last position of all zero; the last row
            is the empty caption.
    """

    embeds: Tensor

    @property
    def width(self) -> int:
        """D."""
        return self.embeds.shape[2]

    def rows(self, indices_B: Tensor, is_dropped_B: Tensor) -> Tensor:
        """Embeddings (B, L, D) of some captions, those of dropped ones replaced by the empty caption's."""
        return self.embeds[torch.where(is_dropped_B, len(self.embeds) - 1, indices_B)]


@torch.no_grad()
def build_prompt_table(
    tokenizer: PreTrainedTokenizerFast, text_encoder: UMT5EncoderModel, captions: list[str], device: torch.device
) -> PromptTable:
    """Embed captions and the empty one; equal ones once, on `device`."""
    wanted = [*captions, ""]
    distinct = list(dict.fromkeys(wanted))
    lengths = [len(ids) for ids in tokenizer(distinct).input_ids]
    # At least one zero row at the end stands for all the padding that was trimmed: see compact_prompt_embeds.
    num_positions = max(math.ceil((max(lengths) + 1) / POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE, MIN_POSITIONS)
    order = sorted(range(len(distinct)), key=lengths.__getitem__)
    text_encoder = text_encoder.to(device)
    table = torch.zeros(len(distinct), num_positions, text_encoder.config.d_model, device=device)
    batch = ENCODE_BATCH.get(device.type, 64)
    for start in range(0, len(order), batch):
        chunk = order[start : start + batch]
        # The encoder masks padding, so embeddings do not depend on how much of it there is.
        longest = max(max(lengths[index] for index in chunk), 1)
        embeds = encode_prompts(tokenizer, text_encoder, [distinct[index] for index in chunk], longest)
        table[torch.tensor(chunk, device=device), : embeds.shape[1]] = embeds.float().to(device)
    place = {text: index for index, text in enumerate(distinct)}
    return PromptTable(table[torch.tensor([place[text] for text in wanted], device=device)])
