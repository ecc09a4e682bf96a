"""Formats numbers with units."""


def rate(flop_per_s: float) -> str:
    """Format FLOP per second with a prefix, three digits."""
    return f"{count(flop_per_s)}FLOP/s"


def count(number: float) -> str:
    """Format a number with a decimal prefix, three digits."""
    for factor, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.3g} {prefix}"
    return f"{number:.3g} "


def size(num_bytes: float) -> str:
    """Format bytes as MiB or GiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"


def duration(milliseconds: float) -> str:
    """Format milliseconds, or seconds from one second on."""
    return f"{milliseconds / 1000:.2f} s" if milliseconds >= 1000 else f"{milliseconds:.3g} ms"


def percent(share: float) -> str:
    """Format a share as percent, one digit below ten."""
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{100 * share:.1f}%"
