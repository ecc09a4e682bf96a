"""Prompts are encoded once: memory forgets the oldest, files survive restarts, and damaged ones are replaced."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from codmd_serve.errors import ConfigError
from codmd_serve.wan import text
from codmd_serve.wan.attention import compact_prompt_embeds
from codmd_serve.wan.text import PromptEmbedder, choose_text_encoder, encode_prompts, fingerprint, lent_to

PROMPT = "a red circle"
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collects what reaches the encoder."""
    seen: list[str] = []
    encode = text.encode_prompts

    def counting(tokenizer: object, encoder: object, prompts: list[str]) -> torch.Tensor:
        seen.extend(prompts)
        return encode(tokenizer, encoder, prompts)

    monkeypatch.setattr(text, "encode_prompts", counting)
    return seen


@pytest.fixture
def embedder(tiny_pipeline: WanPipeline) -> Callable[..., PromptEmbedder]:
    return lambda **options: PromptEmbedder(tiny_pipeline.tokenizer, tiny_pipeline.text_encoder, **options)


def test_the_embeddings_are_those_of_the_encoder_trimmed(
    embedder: Callable[..., PromptEmbedder], tiny_pipeline: WanPipeline
) -> None:
    want = compact_prompt_embeds(encode_prompts(tiny_pipeline.tokenizer, tiny_pipeline.text_encoder, [PROMPT]))
    got = embedder()(PROMPT)
    assert torch.equal(got, want) and got.shape == (1, 8, 16)
    assert got.untyped_storage().nbytes() == got.nbytes  # not a view of all 512 rows


def test_memory_keeps_the_prompts_asked_for_last(embedder: Callable[..., PromptEmbedder], encoded: list[str]) -> None:
    embed = embedder(size=2)
    for prompt in ("red", "blue", "  red ", "white", "red", "blue"):
        embed(prompt)
    assert encoded == ["red", "blue", "white", "blue"]


def test_files_survive_a_restart(embedder: Callable[..., PromptEmbedder], encoded: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "cache"
    first = embedder(folder=folder)(PROMPT)
    (file,) = folder.iterdir()
    assert file.suffix == ".safetensors" and "red" not in file.name
    assert torch.equal(embedder(folder=folder)(PROMPT), first)
    assert encoded == [PROMPT]


def test_other_weights_and_prompts_have_other_files(
    embedder: Callable[..., PromptEmbedder], tiny_pipeline: WanPipeline, encoded: list[str], tmp_path: Path
) -> None:
    other = copy.deepcopy(tiny_pipeline.text_encoder)
    other.shared.weight.data[3] += 0.5
    embedder(folder=tmp_path)(PROMPT)
    embedder(folder=tmp_path)("a ring")
    PromptEmbedder(tiny_pipeline.tokenizer, other, folder=tmp_path)(PROMPT)
    assert len(encoded) == 3 and len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "nonsense", "folder"])
def test_a_damaged_file_is_a_miss_and_replaced(
    embedder: Callable[..., PromptEmbedder],
    encoded: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    damage: str,
) -> None:
    first = embedder(folder=tmp_path)(PROMPT)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    if damage == "folder":
        file.unlink()
        file.mkdir()
    else:
        flipped = whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:]
        file.write_bytes({"empty": b"", "cut": whole[:-7], "flipped": flipped, "nonsense": b"x" * 200}[damage])
    assert torch.equal(embedder(folder=tmp_path)(PROMPT), first)
    assert encoded == [PROMPT] * 2 and "text_cache=damaged" in caplog.text
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    if damage != "folder":  # which nobody can replace by a file, so it stays a miss
        assert file.read_bytes() == whole


def test_a_cache_that_cannot_be_made_is_refused(embedder: Callable[..., PromptEmbedder], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"the text cache .*file/cache cannot be made: Not a directory"):
        embedder(folder=tmp_path / "file" / "cache")


def test_a_lent_encoder_comes_home(embedder: Callable[..., PromptEmbedder], tiny_pipeline: WanPipeline) -> None:
    encoder = tiny_pipeline.text_encoder
    homes = [parameter.data_ptr() for parameter in encoder.parameters()]
    with lent_to(encoder, CPU):
        for parameter in encoder.parameters():
            parameter.data = parameter.data.clone()  # as a move to a device would
        assert [parameter.data_ptr() for parameter in encoder.parameters()] != homes
    assert [parameter.data_ptr() for parameter in encoder.parameters()] == homes
    assert torch.equal(embedder(lend_to=CPU)(PROMPT), embedder()(PROMPT))


def test_fingerprint_tells_weights_apart() -> None:
    layer = torch.nn.Linear(5, 7)
    before = fingerprint(layer)
    assert before == fingerprint(copy.deepcopy(layer)) and len(before) == 64
    layer.bias.data[2] += 1e-3
    assert fingerprint(layer) != before
    assert fingerprint(copy.deepcopy(layer).bfloat16()) != fingerprint(layer)


def test_the_encoder_leaves_a_device_that_is_short_of_memory() -> None:
    gib = 2**30
    for name, free_gib, want in (
        ("auto", 80, "gpu"),
        ("auto", 24, "offload"),
        ("cpu", 80, "cpu"),
        ("offload", 80, "offload"),
        ("gpu", 24, "gpu"),
    ):
        # UMT5-XXL and Wan 1.3B in bfloat16
        assert choose_text_encoder(name, CUDA, int(11.4 * gib), int(3.3 * gib), free_gib * gib) == want
    assert choose_text_encoder("auto", CPU, 1, 1, 0) == choose_text_encoder("cpu", CPU, 1, 1, 0) == "cpu"
    with pytest.raises(ConfigError, match="text_encoder gpu needs a CUDA device"):
        choose_text_encoder("gpu", CPU, 1, 1, 0)
    with pytest.raises(ConfigError, match="text_encoder must be one of auto, gpu, cpu, offload, got 'disk'"):
        choose_text_encoder("disk", CPU, 1, 1, 0)
