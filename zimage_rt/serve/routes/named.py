"""What bodies of several APIs have in common."""

from pydantic import BaseModel, ConfigDict


class NamedLora(BaseModel):
    """A LoRA of the server's folder."""

    model_config = ConfigDict(extra="forbid")
    name: str
    weight: float = 1.0
