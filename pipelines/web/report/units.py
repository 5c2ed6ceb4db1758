"""Numbers as people read them."""


def count(value: float | None) -> str:
    """A whole number with its thousands apart; a dash for nothing known."""
    return "–" if value is None else f"{value:,.0f}"


def percent(value: float) -> str:
    """A share as a percentage, with as many digits as small ones need."""
    return f"{value:.1%}" if value >= 0.001 or value == 0 else f"{100 * value:.2g}%"


def size(num_bytes: float | None) -> str:
    """Bytes in the unit that suits them."""
    amount = float(num_bytes or 0)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} TB"


def short(text: str | None) -> str:
    """The beginning of a digest."""
    return (text or "–")[:12]
