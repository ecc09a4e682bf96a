"""The weights that student or critic start from, when these are not the base's: any file that `convert` reads.

Knows neither losses nor the training loop.
"""

from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from codmd_serve.errors import CheckpointError
from codmd_serve.wan.convert import ConvertOptions, student_weights
from codmd_serve.wan.published import read_published


def load_start(transformer: WanTransformer3DModel, source: str, setting: str) -> WanTransformer3DModel:
    """Replace the base's weights by those of a student or critic trained before, in place.

    Args:
        transformer: of the base, whole, with its weights; a LoRA is added to them.
        source: a bundle, a diffusers transformer folder, or a file or folder that `codmd-serve convert` reads.
        setting: that names the source, for messages: student_from or critic_from.

    Returns:
        The same transformer, its dtype kept.

    Raises:
        CheckpointError: no such file, one that cannot be read, or one of another architecture.
    """
    path = Path(source)
    if not path.exists():
        raise CheckpointError(f"{setting}: there is no file or folder {path.absolute()}")
    folder = path / "transformer"
    try:
        published = read_published(folder if folder.is_dir() else path)
        weights, _scales = student_weights(
            published, transformer.state_dict(), transformer, str(path), ConvertOptions()
        )
    except CheckpointError as error:
        raise CheckpointError(f"{setting}: {error}") from error
    dtypes = {name: tensor.dtype for name, tensor in transformer.state_dict().items()}
    with torch.no_grad():
        transformer.load_state_dict({name: tensor.to(dtypes[name]) for name, tensor in weights.items()})
    return transformer
