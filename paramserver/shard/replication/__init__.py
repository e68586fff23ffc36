"""A part's journal on two shard processes: what is acknowledged is on both, so that either may die.

* source    the bytes of a line, from the primary's files: the newest snapshot, if any, and the records after it
* stream    the primary's side: what to send next, what its backup has, and what replies must wait for
* link      a stream and its connection
* assembly  pieces in their order
* store     the backup's side: takes a line into a folder of its own
* standby   a part in the role of backup: who may replicate, answers, records replayed lazily, promotion

Decisions know no socket and no clock: a simulation drives the same code (tests/shard).
"""
