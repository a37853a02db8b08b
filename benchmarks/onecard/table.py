"""A row of the table: what was measured, beside the peer's."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Row:
    name: str
    unit: str = ""
    own: float | None = None
    peer: float | None = None
    mfu: float | None = None
    """Share of the card's peak that llmpipe's figure is."""
    gib: float | None = None
    peer_gib: float | None = None
    note: str = ""
    failed: bool = False
    details: dict[str, Any] = field(default_factory=dict)
    """Further figures, for the record alone."""

    @property
    def ratio(self) -> float | None:
        """llmpipe's figure over the peer's."""
        return self.own / self.peer if self.own is not None and self.peer else None

    def record(self) -> dict[str, Any]:
        """What the file has of it: what is known."""
        known = {key: value for key, value in asdict(self).items() if value not in (None, "", {})}
        ratio = {} if self.ratio is None else {"ratio": self.ratio}
        return rounded(known | ratio)

    def __str__(self) -> str:
        cells = [
            f"{self.name:15s}{self.unit:12s}",
            f"{figure(self.own):>9s} {figure(self.peer):>9s}",
            f"{'' if self.ratio is None else f'x {self.ratio:.2f}':>8s}",
            f"{'' if self.mfu is None else f'{100 * self.mfu:.1f} %':>7s}",
            f"{figure(self.gib):>6s} {figure(self.peer_gib):>6s}",
        ]
        note = f"  {'FAILED: ' * self.failed}{self.note}"
        return ("".join(cells) + note).rstrip()


TITLE = (
    f"{'part':15s}{'unit':12s}{'llmpipe':>9s} {'peer':>9s}{'ratio':>8s}{'MFU':>7s}"
    f"{'GiB':>6s} {'peer':>6s}"
)


def figure(value: float | None) -> str:
    """With three digits, or all that stand before the point."""
    if value is None:
        return ""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def rounded(value: Any) -> Any:
    """Floats with five digits, wherever they stand."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return value


def table(rows: Iterable[Row]) -> str:
    return "\n".join([TITLE, *map(str, rows)])
