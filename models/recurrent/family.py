"""How the family `recurrent` announces itself. Imports no torch."""

from __future__ import annotations

from models.family import Family
from models.recurrent.arguments import RecurrentArguments, RecurrentData

FAMILY = Family(
    name="recurrent",
    arguments=RecurrentArguments,
    data=RecurrentData,
    task="models.recurrent.task:build",
    find_data="models.recurrent.corpus:find_data",
    symbol=lambda arguments: "character" if arguments.task == "char-lm" else "word",
)
