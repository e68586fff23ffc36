"""Loss against bytes: encodings of push and pull compared at equal examples, on three tasks.

The product's own worker and shard parts run around real models, in one process over the network in memory; workers
take turns, and nothing depends on a clock. `confirm` runs the same settings as real processes.
"""

from benchmarks.bits.command import main

__all__ = ["main"]
