"""Numbers in sentences."""


def counted(n: int, noun: str) -> str:
    """A number and what it counts: 1 gives "1 record", 2000 "2,000 records"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def duration(seconds: float) -> str:
    """A time span for people: `4.2 s`, `3 min 05 s`, `2 h 07 min`."""
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f} s"
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def shortened(text: str, n: int = 60) -> str:
    """The beginning of a text, of n characters; all of it if it is no longer."""
    return text if len(text) <= n else f"{text[:n]} ..."
