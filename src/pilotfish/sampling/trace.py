"""What each guide did at each step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from . import shown


@dataclass(frozen=True)
class Record:
    """One guide at one step; a tuple holds one value per image.

    Attributes:
        loss: before this step's move.
        gradient_norm: L2 norm of the loss's gradient where the guide read the picture.
        share: part of the step's move, 0 to 1; all guides' parts add up to 1.
        outside: of a guide with a mask, what part of the step's move (of its mean square, at latent
            size) lies where the mask is black, 0 to 1: the decoder's gradient reaches over the
            edge. Other guides of the step count in it.
        cosine: by another guide's name, that of the angle between the two gradients, each with the
            sign of its scale: -1 where they pull against each other. Only of guides that read the
            picture in the same form (`x0`, `rgb` or `image`).
        repeat: how often this step had been taken before, under a preset with recurrence.
        seconds: spent in the guide's own loss and its gradient; building what guides share, such
            as the decoded picture, is counted for nobody.
        final: of the finished picture, decoded by the VAE, where the run's `decoder` is another
            one: each guide that acted has one such record, after its last step.
        error: what went wrong, where `on_error` let the run go on without the guide.
    """

    index: int
    sigma: float
    plugin: str
    loss: tuple[float, ...] = ()
    gradient_norm: tuple[float, ...] = ()
    share: tuple[float, ...] = ()
    outside: tuple[float, ...] = ()
    cosine: dict[str, tuple[float, ...]] = field(default_factory=dict)
    seconds: float = 0.0
    error: str | None = None
    repeat: int = 0
    final: bool = False


class Trace(list[Record]):
    """All records of a run, in order.

    Attributes:
        remarks: what guides did not do in the whole run; see `GuideWarning`.
    """

    def __init__(self, records: Iterable[Record] = ()) -> None:
        super().__init__(records)
        self.remarks: list[str] = []

    def __repr__(self) -> str:
        return f"Trace({len(self)} records{': ' * bool(self)}{shown.losses(self)})"

    def _repr_html_(self) -> str:
        return shown.trace_html(self)

    def of(self, plugin: str) -> Trace:
        """The records of one guide."""
        return Trace(record for record in self if record.plugin == plugin)

    @property
    def plugins(self) -> list[str]:
        """The guides that have records."""
        return list(dict.fromkeys(record.plugin for record in self))

    def losses(self, plugin: str) -> list[float]:
        """One guide's loss over the steps on which it acted, mean over the images."""
        return [_mean(r.loss) for r in self.of(plugin) if r.loss and not r.final]

    def final_loss(self, plugin: str) -> float | None:
        """One guide's loss on the finished picture, mean over the images; see `Record.final`."""
        return next((_mean(r.loss) for r in self.of(plugin) if r.loss and r.final), None)

    def cosines(self, plugin: str, other: str) -> list[float]:
        """Two guides' cosine over the steps on which it is known, mean over the images."""
        return [_mean(r.cosine[other]) for r in self.of(plugin) if other in r.cosine]

    def told(self) -> list[str]:
        """What each guide did, and which pulled against each other, on a line each."""
        return [*shown.guide_lines(self), *shown.conflicts(self)]

    def to_dicts(self) -> list[dict[str, Any]]:
        """Plain data, for JSON or a data frame."""
        return [asdict(record) for record in self]


def _mean(values: tuple[float, ...]) -> float:
    return sum(values) / len(values)
