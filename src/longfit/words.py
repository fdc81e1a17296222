"""How bytes are said to people, one way everywhere."""


def in_bytes(num_bytes: float) -> str:
    """Say a size with three figures: ``4.78 GiB``, ``53.2 MiB``; nothing that is there is said to be 0."""
    unit, name = (2**30, "GiB") if abs(num_bytes) >= 0.1 * 2**30 else (2**20, "MiB")
    size = num_bytes / unit
    if 0 < abs(size) < 0.1:
        return "below 0.1 MiB"
    return f"{size:,.2f} {name}" if unit == 2**30 else f"{size:.1f} {name}"
