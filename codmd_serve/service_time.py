"""Estimates how long a video takes on this machine from finished ones. Standard library only."""

from collections import OrderedDict

from codmd_serve.config import GenerateParams, ModelFacts

WEIGHT = 0.3  # of the newest time in the moving average
MAX_SHAPES_KEPT = 64
# Multiples of the expected service time that a job may take, in all and from one progress message to the next. With a
# whole-loop graph all denoising steps are one message.
DEADLINE_FACTOR = 10.0
STALL_FACTOR = 5.0

# ffmpeg is killed when it takes longer than this for what it was given: x264 on one busy core is ten times as fast.
MIN_ENCODER_WAIT_S = 30.0
MIN_ENCODED_PX_PER_S = 250_000.0
MIN_ANIMATED_PX_PER_S = 25_000.0  # the palette of a gif
LOOKAHEAD_FRAMES = 64  # frames that x264 may hold back until its input ends

# Height, width, frames, format, and whether the teacher makes it.
Shape = tuple[int, int, int, str, bool]


def encoder_limit_s(num_px: float, format: str) -> float:
    """Return the seconds that ffmpeg gets for that many pixels of a video."""
    return MIN_ENCODER_WAIT_S + num_px / (MIN_ENCODED_PX_PER_S if format == "mp4" else MIN_ANIMATED_PX_PER_S)


def encoding_limit_s(params: GenerateParams) -> float:
    """Return the seconds that ffmpeg gets after the last frame of a video."""
    num_frames = min(params.num_frames, LOOKAHEAD_FRAMES) if params.format == "mp4" else params.num_frames
    return encoder_limit_s(params.height * params.width * num_frames, params.format)


class ServiceTimes:
    """Moving averages of service time by shape, format and model; a new shape is scaled from the native one.

    Args:
        facts: of the engine, with the time of its native video.
    """

    def __init__(self, facts: ModelFacts) -> None:
        self._native = (facts.height, facts.width, facts.num_frames, "mp4")
        self._known: OrderedDict[Shape, float] = OrderedDict({(*self._native, False): facts.service_s})
        if facts.teacher is not None:
            self._known[(*self._native, True)] = facts.teacher.service_s

    def add(self, params: GenerateParams, took_s: float) -> None:
        """Update the average with a video that took `took_s` on the device."""
        shape = _shape(params)
        known_s = self._known.get(shape)
        self._known[shape] = took_s if known_s is None else known_s + WEIGHT * (took_s - known_s)
        self._known.move_to_end(shape)
        while len(self._known) > MAX_SHAPES_KEPT:
            self._known.pop(next(shape for shape in self._known if shape[:4] != self._native))

    def expected_s(self, params: GenerateParams) -> float:
        """Return the expected seconds of a video of this shape."""
        known_s = self._known.get(_shape(params))
        return self._native_s(params) * self._size(params) if known_s is None else known_s

    def deadline_s(self, params: GenerateParams, floor_s: float, is_encoding: bool = False) -> float:
        """Return the seconds after its start at which a job counts as hung; at least `floor_s`.

        Args:
            params: of the job.
            floor_s: see above.
            is_encoding: whether all frames are decoded. The encoder has a limit of its own, which must come first.
        """
        return floor_s + DEADLINE_FACTOR * self._longest_s(params) + self._encoder_s(params, is_encoding)

    def stall_s(self, params: GenerateParams, floor_s: float, is_encoding: bool = False) -> float:
        """Return the seconds without progress at which a job counts as hung; see `deadline_s`."""
        return floor_s + STALL_FACTOR * self._longest_s(params) + self._encoder_s(params, is_encoding)

    def _encoder_s(self, params: GenerateParams, is_encoding: bool) -> float:
        # A gif or WebP may hold up its frames while they are decoded, and is encoded when the last one has come.
        return encoding_limit_s(params) if is_encoding or params.format != "mp4" else 0.0

    def _native_s(self, params: GenerateParams) -> float:
        student_s = self._known[(*self._native, False)]
        return self._known.get((*self._native, True), student_s) if params.teacher else student_s

    def _size(self, params: GenerateParams) -> float:
        height, width, num_frames, _ = self._native
        return params.height * params.width * params.num_frames / (height * width * num_frames)

    def _longest_s(self, params: GenerateParams) -> float:
        """Return an upper bound: attention is quadratic in tokens, and nothing grows faster."""
        return max(self.expected_s(params), self._native_s(params) * self._size(params) ** 2)


def _shape(params: GenerateParams) -> Shape:
    return params.height, params.width, params.num_frames, params.format, bool(params.teacher)
