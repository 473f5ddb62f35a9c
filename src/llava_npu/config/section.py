"""What all sections of a configuration have in common."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Strict: "3" is no number and 1 is no boolean. Frozen: a run's description does not change while it runs."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, validate_default=True)
