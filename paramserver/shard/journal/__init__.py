"""The journal of a shard: what it decided, in order, so that nothing acknowledged is lost when its process dies.

* records     what is written, one class a decision; the core knows this file alone
* layout      a record as bytes: checks, and where a log ends or is damaged
* storage     one folder of files; memory: the same in memory, with crashes, for tests
* segments    the log over its files: append, commit, read again
* snapshot    the whole state at one point of the log, so that older segments can go
* replay      records applied to a state again
* keeper      all of it together: opens, recovers, writes, takes snapshots
"""
