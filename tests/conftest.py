"""Shared fixtures: a tiny random pipeline and bundle of the real classes, and what runs the tests."""

# ruff: noqa: E402
import atexit
import os
import shutil
import tempfile

from codmd_serve.cpu import prepare_threads

prepare_threads(os.environ)  # before torch is imported
# What servers of the tests measure and convert is theirs alone, and gone afterwards.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="codmd-tests-cache-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

import codmd_serve
from codmd_serve.wan.checkpoint import NativeShape, StudentSpec, save_bundle

WORDS = [
    "a",
    "red",
    "circle",
    "moves",
    "right",
    "quickly",
    "on",
    "black",
    "background",
    "blue",
    "ring",
    "and",
    "white",
    "triangle",
    "stays",
    "still",
]


# Files that start processes or train for seconds, below tests/; `make test-fast` leaves them out.
SLOW = (
    "browser",
    "clients",
    "codmd_serve/bench",
    "codmd_serve/test_batch.py",
    "codmd_serve/test_cpu.py",
    "codmd_serve/test_load_memory.py",
    "codmd_serve/test_models_cli.py",
    "codmd_serve/test_pool.py",
    "codmd_serve/test_server_process.py",
    "distill/evaluate/compare/test_cells.py",
    "distill/evaluate/compare/test_shape_cells.py",
    "distill/evaluate/study/test_command.py",
    "distill/evaluate/study/test_coverage.py",
    "distill/evaluate/test_detect.py",
    "distill/parallel/test_processes.py",
    "distill/plan/test_memory.py",
    "distill/pretrain",
    "distill/run",
    "faults",
    "test_embedded.py",
    "test_examples.py",
    "test_wheel.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = tuple(Path(__file__).parent / name for name in SLOW)
    for item in items:
        if any(item.path.is_relative_to(path) for path in slow):
            item.add_marker(pytest.mark.slow)


def pytest_report_header() -> str:
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return f"device: {device}, torch {torch.__version__}, CUDA {torch.version.cuda}"


@pytest.fixture(autouse=True, scope="session")
def _own_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Servers that tests start keep no jobs in the data folder of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_DATA_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=512
    )


@pytest.fixture(scope="session")
def tiny_pipeline() -> WanPipeline:
    """A random WanPipeline: 8x spatial and 4x temporal compression, as the embedded one, in a few thousand numbers."""
    torch.manual_seed(0)
    text_encoder = UMT5EncoderModel(
        UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    )
    vae = AutoencoderKLWan(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.1, 0.9],
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=4,
        scale_factor_spatial=8,
    )
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
    )
    return WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=transformer.eval(),
    )


@pytest.fixture(scope="session")
def tiny_base(tiny_pipeline: WanPipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random pipeline as a diffusers folder."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    tiny_pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_spec() -> StudentSpec:
    return StudentSpec(
        base="../tiny",
        sigmas=(1.0, 0.9375, 0.8333, 0.625, 0.0),
        timesteps=(1000.0, 937.5, 833.3, 625.0),
        sampler="sde",
        native=NativeShape(height=32, width=32, num_frames=9, fps=16),
        method="codmd",
        base_model="tiny",
        step=3,
        ema=True,
        config_sha256="",
        package_version=codmd_serve.__version__,
        vocabulary_note="It knows a few words only.",
    )


@pytest.fixture(scope="session")
def tiny_bundle(tiny_base: Path, tiny_pipeline: WanPipeline, tiny_spec: StudentSpec) -> Path:
    """A student bundle beside tiny_base: real classes, random weights."""
    path = tiny_base.parent / "tiny-codmd"
    save_bundle(path, tiny_pipeline.transformer, tiny_spec)
    return path
