"""Checkpoints of a job: the cut that makes one (`cut`), its files (`files`, `manifest`), and a run that goes on from
one (`reading`, `resume`). docs/checkpoints.md tells the whole."""
