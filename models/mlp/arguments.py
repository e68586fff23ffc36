"""What a job may say of a multi-layer perceptron and its images. Torch-free: checked where torch is not installed.

Every default is on one line with its meaning.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Width = Annotated[int, Field(ge=1, le=8192)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class MlpArguments(_Section):
    """`model.args` of family `mlp`. The default is LeNet-300-100 of LeCun et al. 1998, with rectifiers."""

    hidden: Annotated[tuple[Width, ...], Field(max_length=16)] = (300, 100)  # units of each layer; [] for none
    activation: Literal["relu", "tanh"] = "relu"


class MlpData(_Section):
    """`data` of family `mlp`: the images, and how many make a step and a lease."""

    name: Literal["mnist", "digits"] = "mnist"
    batch: Annotated[int, Field(ge=1, le=4096)] = 128  # images of a step
    # Of a lease. More are fewer messages to the coordinator, and more to repeat when a worker dies.
    batches: Annotated[int, Field(ge=1, le=256)] = 16

    @property
    def lease_examples(self) -> int:
        """Images of a lease."""
        return self.batch * self.batches
