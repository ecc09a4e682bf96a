"""VDOT's term: what the critic predicts is moved onto what the teacher predicts by an optimal transport plan.

Owns its settings. Draws no random number.

Legend: B batch, C channels, F latent frames, H and W latent rows and columns.
"""

from dataclasses import dataclass

from torch import Tensor

from codmd_serve.errors import ConfigError
from distill.losses.transport import transport_direction, transported_frames, transported_samples
from distill.methods.scores import Scores
from distill.settings import check_choice, check_range

FRAME, BATCH = "frame", "batch"
# Matrices of tokens x tokens that Sinkhorn's iterations hold at once: cost, kernel, and two sums of the loop.
TOKEN_PLANS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class TransportConfig:
    """The transport term; a weight of 0 leaves it out.

    Attributes:
        weight: of the term.
        over: `frame` pairs the tokens of each frame, `batch` the samples of the whole batch.
        epsilon: weight of the plan's entropy, as a share of the mean cost.
        iterations: of Sinkhorn.
    """

    weight: float = 0.0
    over: str = FRAME
    epsilon: float = 0.05
    iterations: int = 50

    def __post_init__(self) -> None:
        check_range("terms.transport.weight", self.weight, 0.0, 1e4)
        check_choice("terms.transport.over", self.over, (FRAME, BATCH))
        check_range("terms.transport.epsilon", self.epsilon, 1e-4, 1e3)
        check_range("terms.transport.iterations", self.iterations, 1, 10_000)

    @property
    def relates_samples(self) -> bool:
        """Whether the term of one sample depends on the others of the batch."""
        return self.weight > 0 and self.over == BATCH

    def check_batch(self, batch_size: int) -> None:
        """Refuse a batch that has no pairs to choose from.

        Raises:
            ConfigError: names the key.
        """
        if self.relates_samples and batch_size < 2:
            raise ConfigError(f"terms.transport.over batch needs batch_size of 2 or more, got {batch_size}")


def sample_direction(
    student_x0: Tensor, scores: Scores, settings: TransportConfig, whole: tuple[Tensor, Tensor] | None, own: slice
) -> Tensor:
    """Return the direction of the term for a micro-batch, normalised as that of DMD.

    Args:
        student_x0: (B, C, F, H, W) the sample.
        scores: of it.
        settings: of the term.
        whole: critic's and teacher's predictions of the whole batch; only read over "batch".
        own: places of this micro-batch in them.
    """
    if settings.over == BATCH:
        assert whole is not None
        partner = transported_samples(*whole, settings.epsilon, settings.iterations, own)
    else:
        partner = transported_frames(scores.critic_x0, scores.teacher_x0, settings.epsilon, settings.iterations)
    return transport_direction(student_x0, scores.critic_x0, scores.teacher_x0, partner)
