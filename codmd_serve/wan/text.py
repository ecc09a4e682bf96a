"""Encodes prompts as Wan was trained on them, and caches the embeddings; knows nothing of sampling.

Legend: B prompts, L positions, D width of the text encoder.
"""

import contextlib
import hashlib
import itertools
import logging
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from codmd_serve.config import TEXT_ENCODERS
from codmd_serve.errors import ConfigError
from codmd_serve.files import atomic_file
from codmd_serve.grammar import Grammar
from codmd_serve.prompts import clean_prompt as clean_prompt
from codmd_serve.prompts import is_blank
from codmd_serve.wan.attention import compact_prompt_embeds

MAX_SEQUENCE_LENGTH = 512
NUM_PROMPTS_CACHED = 256
NUM_VALUES_HASHED = 4096
# Weights may take this share of a device; the rest is for what a video needs.
WEIGHTS_SHARE = 0.6

logger = logging.getLogger(__name__)


def encode_prompts(
    tokenizer: Any, text_encoder: Any, prompts: list[str], max_sequence_length: int = MAX_SEQUENCE_LENGTH
) -> Tensor:
    """Embed prompts; equals `WanPipeline.encode_prompt` of diffusers, up to rounding.

    Only the positions of the longest prompt are encoded: padding is masked inside the encoder and zeroed after it.
    Encoding all positions, as diffusers does, gives the same numbers and takes many times longer.

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
        padding="longest",
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
    embeds_BLD = embeds_BLD.masked_fill(mask_BL[:, :, None] == 0, 0.0)
    return torch.nn.functional.pad(embeds_BLD, (0, 0, 0, max_sequence_length - embeds_BLD.shape[1]))


def prompt_warnings(
    tokenizer: Any, prompt: str, max_sequence_length: int = MAX_SEQUENCE_LENGTH, grammar: Grammar | None = None
) -> list[str]:
    """Return warnings: parts of a prompt that the text encoder does not see, and words the model was not trained on.

    Args:
        tokenizer: a transformers tokenizer; without an unknown token, or not a fast one, no word is reported.
        prompt: the text as the user wrote it.
        max_sequence_length: positions the encoder reads.
        grammar: of the only captions the model knows; None when it takes any text.

    Returns:
        At most four sentences: the words and symbols outside the vocabulary, how the prompt differs from every caption
        the model knows and the nearest one, that nothing is left of it, and where a long prompt was cut.
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
        words = list(dict.fromkeys(span for span in spans if _says_something(span)))
        if words:
            warnings.append(f"words outside the vocabulary of this model: {', '.join(words)}")
        ids = tokens.input_ids
    else:
        ids = tokenizer(cleaned).input_ids
    if grammar is not None and (outside := grammar.warning(cleaned)) is not None:
        warnings.append(outside)
    if not set(ids) - set(tokenizer.all_special_ids) - {tokenizer.unk_token_id} and tokenizer.unk_token_id not in ids:
        warnings.append("nothing of this prompt reaches the text encoder: its tokenizer drops all of it")
    if len(ids) > max_sequence_length:
        warnings.append(f"prompt cut to its first {max_sequence_length} of {len(ids)} tokens")
    return warnings


def _says_something(span: str) -> bool:
    """Return whether a span is more than punctuation: letters, digits, and symbols such as emoji."""
    return not is_blank(span) and any(not unicodedata.category(char).startswith("P") for char in span)


def fingerprint(module: torch.nn.Module) -> str:
    """Hash weights to 64 hex digits: names, shapes, dtypes, and up to 4,096 values of every tensor."""
    digest = hashlib.blake2b(digest_size=32)
    for name, tensor in module.state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().flatten()
        values = flat[:: max(1, len(flat) // NUM_VALUES_HASHED)][:NUM_VALUES_HASHED]
        digest.update(_tensor_bytes(values))
    return digest.hexdigest()


def _tensor_bytes(tensor: Tensor) -> bytes:
    data: bytes = tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return data


def choose_text_encoder(name: str, device: torch.device, encoder_bytes: int, other_bytes: int, free_bytes: int) -> str:
    """Decide where the text encoder lives: gpu, cpu, or offload (on the CPU, on the device while it encodes).

    Args:
        name: auto or one of them. auto keeps it on the device unless all weights are more than .6 of what is free.
        device: of the network.
        encoder_bytes, other_bytes: weights of the text encoder, and of everything else.
        free_bytes: of the device before anything is loaded; not looked at on a CPU.

    Raises:
        ConfigError: an unknown name, or one that needs a CUDA device where there is none.
    """
    if name not in TEXT_ENCODERS:
        raise ConfigError(f"text_encoder must be one of {', '.join(TEXT_ENCODERS)}, got {name!r}")
    if device.type == "cpu":
        if name in ("gpu", "offload"):
            raise ConfigError(f"text_encoder {name} needs a CUDA device; on this one say cpu or auto")
        return "cpu"
    if name != "auto":
        return name
    return "gpu" if encoder_bytes + other_bytes <= WEIGHTS_SHARE * free_bytes else "offload"


@contextlib.contextmanager
def lent_to(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Move a module to `device` within the block; its host tensors are kept, so nothing is copied back."""
    tensors = [*itertools.chain(module.parameters(), module.buffers())]
    homes = [tensor.data for tensor in tensors]
    try:
        # A parameter cannot take over a tensor that was made in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home.to(device)
        yield
    finally:
        for tensor, home in zip(tensors, homes, strict=True):
            tensor.data = home


class PromptEmbedder:
    """Trimmed prompt embeddings from an LRU cache, from disk or from the encoder. Not thread-safe.

    Args:
        tokenizer: a transformers tokenizer.
        text_encoder: a UMT5EncoderModel, wherever it lives.
        lend_to: a device that the encoder is lent to while it encodes; None leaves it where it is.
        folder: keeps embeddings over restarts, one file each, without a bound; None is memory only. Servers may share
            one: a name is made of the prompt, the tokenizer and the weights.
        size: capacity of the LRU cache, in prompts.

    Raises:
        ConfigError: the folder cannot be made.
    """

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        *,
        lend_to: torch.device | None = None,
        folder: Path | None = None,
        size: int = NUM_PROMPTS_CACHED,
    ) -> None:
        self.tokenizer, self.text_encoder = tokenizer, text_encoder
        self.lend_to, self._folder, self._size = lend_to, folder, size
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._identity = ""
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"the text cache {folder} cannot be made: {error.strerror}") from None
            # Ids say what the tokenizer does; the probe has the words, digits and signs that vocabularies differ in.
            probe = tokenizer("a red circle moves right, 42 times! <pad> </s>").input_ids
            self._identity = f"{fingerprint(text_encoder)} {len(tokenizer)} {probe}"

    def __call__(self, prompt: str) -> Tensor:
        """Return the embeddings of one prompt, (1, L, D) on the CPU, trimmed by `compact_prompt_embeds`."""
        cleaned = clean_prompt(prompt)
        if cleaned in self._known:
            self._known.move_to_end(cleaned)
            return self._known[cleaned]
        path = self._path(cleaned)
        embeds_BLD = None if path is None else self._read(path)
        if embeds_BLD is None:
            embeds_BLD = self._encode(cleaned)
            if path is not None:
                _write_entry(path, embeds_BLD)
        self._known[cleaned] = embeds_BLD
        if len(self._known) > self._size:
            self._known.popitem(last=False)
        return embeds_BLD

    def _encode(self, prompt: str) -> Tensor:
        with lent_to(self.text_encoder, self.lend_to) if self.lend_to else contextlib.nullcontext():
            embeds_BLD = encode_prompts(self.tokenizer, self.text_encoder, [prompt])
            # A copy: the rows that are trimmed would stay in memory with the ones that are kept.
            return compact_prompt_embeds(embeds_BLD).to("cpu", copy=True)

    def _path(self, prompt: str) -> Path | None:
        if self._folder is None:
            return None
        name = hashlib.blake2b(f"{self._identity}\n{prompt}".encode(), digest_size=24).hexdigest()
        return self._folder / f"{name}.safetensors"

    def _read(self, path: Path) -> Tensor | None:
        """Return the embeddings in a file; None when it is missing or damaged."""
        try:
            with safe_open(path, "pt") as file:
                embeds_BLD: Tensor = file.get_tensor("prompt_embeds")
                expected = (file.metadata() or {}).get("blake2b")
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            logger.warning("text_cache=damaged file=%s reason=%r", path.name, str(error))
            return None
        if expected != _checksum(embeds_BLD):
            logger.warning("text_cache=damaged file=%s reason=checksum", path.name)
            return None
        return embeds_BLD


def _checksum(embeds: Tensor) -> str:
    return hashlib.blake2b(
        f"{tuple(embeds.shape)} {embeds.dtype}".encode() + _tensor_bytes(embeds), digest_size=16
    ).hexdigest()


def _write_entry(path: Path, embeds_BLD: Tensor) -> None:
    """Write a cache entry atomically. A failed write costs time later, not the video."""
    try:
        with atomic_file(path) as temporary:
            save_file({"prompt_embeds": embeds_BLD}, temporary, metadata={"blake2b": _checksum(embeds_BLD)})
    except (OSError, SafetensorError) as error:
        logger.warning("text_cache=unwritable file=%s reason=%r", path.name, str(error))
