"""Where compilers keep their results between starts. Standard library only."""

from collections.abc import MutableMapping
from pathlib import Path

# Compiled blocks, and the kernels of Triton; both are keyed by versions, so a cache of older ones is only left unused.
COMPILER_CACHES = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def prepare_caches(environment: MutableMapping[str, str], cache: str) -> None:
    """Let torch.compile and Triton keep their results below `cache`; call it before either compiles.

    Args:
        environment: os.environ; what the user has set stays.
        cache: folder; empty leaves the compilers to their own temporary ones.
    """
    if cache:
        for name, folder in COMPILER_CACHES.items():
            environment.setdefault(name, str(Path(cache).absolute() / folder))
