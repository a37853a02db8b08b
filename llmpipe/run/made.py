"""What a stage's `train` says of what it made, for the manifest."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from llmpipe.run.manifest import Document
from llmpipe.run.probe import Probe


@dataclass
class Made:
    """The last word of a stage; `None`: it has nothing to say of that."""

    final: dict[str, Any]
    """The last metrics."""
    kind: str | None = None
    """Kind of the artifact, where it is another one than the stage's."""
    training: dict[str, Any] | None = None
    """See `TrainingFacts`."""
    hardware: dict[str, Any] | None = None
    verified: dict[str, Any] | None = None
    """What was compared after reloading."""
    probe: Probe | None = None
    """What the model in memory said."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Of the rows and the tokenizer, see `PreparedRows.facts`."""
    merged: list[str] = field(default_factory=list)
    """Artifacts of the merged model, beside the adapter's."""

    def record(self) -> Document:
        """The fields of a manifest that it knows."""
        values = {
            "final": self.final,
            "training": self.training,
            "hardware": self.hardware,
            "verified": self.verified,
            "probe": self.probe and asdict(self.probe),
        }
        return self.facts | {name: value for name, value in values.items() if value is not None}
