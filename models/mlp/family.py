"""How the family `mlp` announces itself. Imports no torch."""

from __future__ import annotations

from models.family import Family
from models.mlp.arguments import MlpArguments, MlpData

FAMILY = Family(
    name="mlp",
    arguments=MlpArguments,
    data=MlpData,
    task="models.mlp.task:build",
    find_data="models.mlp.data:find_data",
    symbol=lambda arguments: "image",
    unit="nats",
    lease_examples=lambda data: data.lease_examples,
)
