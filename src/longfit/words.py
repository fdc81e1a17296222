"""How bytes are said to people, one way everywhere."""


def format_bytes(num_bytes: float) -> str:
    """Say a size in the unit that shows it: ``4.78 GiB``, ``53.2 MiB``; what is there is never said to be 0."""
    if abs(num_bytes) >= 0.1 * 2**30:
        return f"{num_bytes / 2**30:,.2f} GiB"
    size = num_bytes / 2**20
    return "below 0.1 MiB" if 0 < abs(size) < 0.1 else f"{size:.1f} MiB"
