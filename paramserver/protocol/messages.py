"""Every message of the wire, one frozen class each, validated when it is made and when it is decoded.

A message is a head (these fields) and raw frames (tensor bytes) that travel beside it; the docstring
of each class says which frames it takes. Two planes share this file:

* data:    worker <-> shard        Hello, Push, Pull, Tick, Initialise and their replies
           shard <-> shard         Replicate and Stored: a part's journal on its way to the backup
* control: process <-> coordinator Register, Heartbeat and their replies

The control plane is *level triggered*: a heartbeat says what a process is and holds, its reply says
what the process should be. A lost beat or a restarted coordinator costs one beat, never a state.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

from msgspec import Meta, Struct

from paramserver.protocol.layout import Layout

PROTOCOL_VERSION = 3

Name = Annotated[str, Meta(min_length=1, max_length=128)]
Text = Annotated[str, Meta(max_length=4096)]
Count = Annotated[int, Meta(ge=0, lt=2**62)]
Edition = Annotated[int, Meta(ge=-1, lt=2**62)]  # -1: "I hold none"
Seconds = Annotated[float, Meta(ge=0)]
PublicKey = Annotated[str, Meta(max_length=64)]  # in Z85; empty where the cluster uses no keys

# Named refusals. A refusal changes nothing, is counted by its name, and goes back to the sender.
RefusalCode = Literal[
    "malformed",  # the bytes are no message, or its frames do not fit its head
    "wrong-version",  # another protocol version
    "wrong-job",  # the shard serves another job, or none
    "wrong-layout",  # the fingerprint differs
    "wrong-term",  # an older (or unknown) placement term
    "unknown-part",  # the part is not placed on this shard
    "unknown-block",  # the block is not placed on this shard
    "unknown-encoding",  # an encoding that this job does not use
    "wrong-size",  # a frame that does not fit the block under its encoding
    "not-finite",  # a value or scale that is NaN or infinite
    "corrupt-frame",  # of the right size, but no encoder writes such codes
    "out-of-order",  # a gap in the per-block sequence; `expected` says which one is next
    "old-incarnation",  # a predecessor of the worker that now carries this name
    "unknown-edition",  # computed on an edition that was never published
    "not-initialised",  # the block has no value yet
    "already-initialised",  # another value was pushed first
    "unknown-worker",  # no Hello was heard from this peer
    "unknown-session",  # the coordinator does not know this process: register again
    "name-taken",  # a live process carries this name
    "wrong-key",  # the name, or the incarnation, belongs to a process with another key
    "not-served",  # a message that this process never takes
    "other-build",  # a backup whose packages or CPU would compute other bits than its primary
]


class Message(Struct, frozen=True, array_like=True, kw_only=True, tag_field="type"):
    """Base of everything that is sent."""


# ---------------------------------------------------------------------------------- data plane


class Hello(Message, frozen=True, kw_only=True, tag="hello"):
    """A worker introduces itself to a part of the model, before anything else and after every reconnection.

    A connection is about one part: what comes through it later is for that one.
    """

    version: Count = PROTOCOL_VERSION
    worker: Name
    incarnation: Count
    job: Name
    layout: Name  # fingerprint
    part: Name


class Welcome(Message, frozen=True, kw_only=True, tag="welcome"):
    """The answer to a Hello that is accepted. `term` is the placement term under which the part is served."""

    version: Count = PROTOCOL_VERSION
    part: Name
    job: Name
    term: Count


class BlockUpdate(Struct, frozen=True, array_like=True):
    """One encoded update of one block. Its frame is the one at the same position in the message."""

    block: Count
    sequence: Annotated[int, Meta(ge=1, lt=2**62)]  # per (worker, block), without gaps, from 1
    edition: Count  # the edition of the block that it was computed on
    encoding: Name  # for example "int8/64": name and tile


class Want(Struct, frozen=True, array_like=True):
    """`have` is the edition that the worker holds of the block, -1 for none."""

    block: Count
    have: Edition = -1


class Push(Message, frozen=True, kw_only=True, tag="push"):
    """Updates from one worker; frames: one per update, in order. Resent with identical bytes until answered.

    `wants` lets the pull that follows travel with the push: see Pushed.
    """

    request: Count
    job: Name
    term: Count
    phase: Count = 0
    worker: Name
    incarnation: Count
    step: Count  # the worker's clock: steps that it has finished, this one included
    updates: tuple[BlockUpdate, ...]
    wants: tuple[Want, ...] = ()
    is_pull_slow: bool = False  # its exchanges take longer than its computation, for what they bring
    is_last: bool = False  # residuals at the end of a job: no later step corrects what they do


class Acknowledged(Struct, frozen=True, array_like=True):
    """The update is applied (or was already) and as durable as the job asked for."""

    block: Count
    sequence: Count
    version: Count  # of the block afterwards
    duplicate: bool = False


class RefusedUpdate(Struct, frozen=True, array_like=True):
    """The update changed nothing. `expected` is the next sequence for "out-of-order", else 0."""

    block: Count
    sequence: Count
    code: RefusalCode
    detail: Text
    expected: Count = 0


class Pull(Message, frozen=True, kw_only=True, tag="pull"):
    """Ask for what is new in these blocks. Idempotent; `step` is the worker's clock as in Push."""

    request: Count
    job: Name
    term: Count
    phase: Count = 0
    worker: Name
    incarnation: Count
    step: Count
    wants: tuple[Want, ...]
    source: Literal["replica", "weights"] = "replica"  # weights: at full precision, to evaluate or export


class BlockValue(Struct, frozen=True, array_like=True):
    """What a block's holder gets: nothing new (0 frames), a snapshot or weights (1 frame), or deltas (n frames).

    `edition` is the one that the holder has afterwards; the deltas lead to it, one edition each. With pulls of
    fresh weights every version is an edition. After "weights" the holder has none: they are no replica.
    """

    block: Count
    edition: Count
    kind: Literal["current", "snapshot", "deltas", "weights"]
    encoding: Name = "fp32"
    frames: Count = 0


class Pulled(Message, frozen=True, kw_only=True, tag="pulled"):
    """The answer to a Pull, or to the wants of a Push that was held; frames: each value's, one after another."""

    request: Count
    values: tuple[BlockValue, ...]


class Pushed(Message, frozen=True, kw_only=True, tag="pushed"):
    """The answer to a Push: each update is either acknowledged or refused by name.

    `values` are what the push wanted, with frames as in Pulled, in the same message, which costs both sides less
    than two. There are none where it wanted none or the policy makes it wait: Held and later Pulled follow then.
    """

    request: Count
    acknowledged: tuple[Acknowledged, ...]
    refused: tuple[RefusedUpdate, ...] = ()
    values: tuple[BlockValue, ...] = ()


class Held(Message, frozen=True, kw_only=True, tag="held"):
    """The pull of this request waits for slower workers (bounded, sync): the shard lives, be patient.

    Its Pulled follows when the policy lets it. A worker that asks again is told again.
    """

    request: Count


class Tick(Message, frozen=True, kw_only=True, tag="tick"):
    """A worker's clock, sent to the shards that its push did not touch. Not answered."""

    job: Name
    worker: Name
    incarnation: Count
    step: Count


class Initialise(Message, frozen=True, kw_only=True, tag="initialise"):
    """First values of blocks, float32; frames: one per block. Idempotent: the same bytes are accepted again."""

    request: Count
    job: Name
    term: Count
    layout: Name
    blocks: tuple[Count, ...]


class Initialised(Message, frozen=True, kw_only=True, tag="initialised"):
    request: Count


class Refusal(Message, frozen=True, kw_only=True, tag="refusal"):
    """A whole message was refused; nothing changed. `request` is 0 where the message had none."""

    request: Count = 0
    code: RefusalCode
    detail: Text


# --------------------------------------------------------------------- between two shard processes


class Replicate(Message, frozen=True, kw_only=True, tag="replicate"):
    """A piece of a part's journal, from its primary to its backup; frames: one, the bytes, perhaps none of them.

    A *line* is one unbroken stream of bytes: a snapshot, or none where the journal is young, and then every record
    after it, as it lies in the primary's segments. A line is cut into chunks, of which a large one travels in several
    pieces. What has no bytes only asks what the backup has.
    """

    part: Name
    job: Name
    term: Count  # under which the sender serves the part
    shard: Name  # the sender; with its incarnation and `line` it names the stream
    incarnation: Count
    line: Count
    ask: Count  # repeated in the answer
    at: Count = 0  # of the piece in the line, bytes
    kind: Literal["records", "manifest", "arrays"] = "records"
    begin: Count = 0  # of its chunk in the line, bytes
    chunk_bytes: Count = 0
    record: Count = 0  # number of the last record in the chunk, or in the snapshot


class Stored(Message, frozen=True, kw_only=True, tag="stored"):
    """The answer to Replicate: what the backup has of the sender's line; `line` is 0 where it has none of it."""

    part: Name
    line: Count
    ask: Count
    received: Count  # bytes of the line, without a gap
    record: Count  # the last one that is as durable here as the job asks for; 0: none


# ------------------------------------------------------------------------------- control plane


class Register(Message, frozen=True, kw_only=True, tag="register"):
    """A process joins, or joins again after the coordinator forgot it.

    A process that joins again gives the incarnation that it already has and keeps it; a new one gives 0.
    """

    version: Count = PROTOCOL_VERSION
    role: Literal["shard", "worker"]
    name: Name
    incarnation: Count = 0
    address: Text = ""  # where a shard answers workers; empty for a worker
    pid: Count = 0
    host: Text = ""


class Registered(Message, frozen=True, kw_only=True, tag="registered"):
    """`incarnation` grows with every process that carries this name."""

    incarnation: Count
    heartbeat_seconds: Seconds
    session_seconds: Seconds


class Lease(Struct, frozen=True, array_like=True):
    """A right to a set of examples. `number` never repeats within a job, also not for a re-lease."""

    number: Count
    kind: Literal["initialise", "train", "evaluate", "export"]
    epoch: Count = 0
    phase: Count = 0
    examples: tuple[Count, ...] = ()
    split: str = "train"  # or "valid", "test"
    source: Literal["replica", "weights"] = "replica"  # what an evaluation is of


class LeaseDone(Struct, frozen=True, array_like=True):
    """The result of a lease. Sums, so that results of several leases add up."""

    number: Count
    steps: Count = 0
    elements: Count = 0  # predicted symbols; what loss_sum is divided by
    loss_sum: float = 0.0  # nats
    skipped_steps: Count = 0  # not finite, caught on the worker
    metrics: dict[str, float] = {}  # the task's own, by name


class PartAddress(Struct, frozen=True, array_like=True):
    """Where a part is served, and under which term: both change when it moves to another shard."""

    part: Name
    address: Text
    blocks: tuple[Count, ...]
    term: Count = 1
    key: PublicKey = ""  # who answers there: it has proven to the coordinator that it holds this key


class Member(Struct, frozen=True, array_like=True):
    """A worker that counts for bounded and synchronous consistency: it holds a lease."""

    worker: Name
    incarnation: Count


class WorkerKey(Struct, frozen=True, array_like=True):
    """Who may say Hello: the live worker of this name and incarnation, with the key that it has proven to hold."""

    worker: Name
    incarnation: Count
    key: PublicKey


class Partner(Struct, frozen=True, array_like=True):
    """The other shard process that holds a part: its backup, told to the primary, or its primary, told to the backup.

    `is_synced`: the coordinator may promote this backup, so the primary acknowledges nothing that it has not stored.
    """

    shard: Name
    incarnation: Count
    address: Text
    key: PublicKey = ""
    is_synced: bool = False
    number: Count = 0  # of this partnership: each has a new one, also one with the same process again


class PartOrder(Struct, frozen=True, array_like=True):
    """What a shard should be to one part: the blocks that share a journal, named after the first shard that held it.

    A primary serves workers. With a `partner` it streams its journal to that one; without one it goes on alone, which
    the coordinator has recorded. A backup takes records from its partner alone. `term` grows when another becomes
    primary, or the blocks change.
    """

    part: Name
    job: Name
    specification: str  # the resolved job specification as JSON
    term: Count
    phase: Count
    layout: Layout
    blocks: tuple[Count, ...]
    members: tuple[Member, ...] = ()
    workers: tuple[WorkerKey, ...] = ()  # all live ones; empty where the cluster uses no keys
    role: Literal["primary", "backup"] = "primary"
    partner: Partner | None = None
    checkpoint: Count = 0  # copy the state as it is now, and send it: see CheckpointPiece; 0: there is none to take
    resumes: bool = False  # blocks without a value get theirs from the coordinator: see TakeBlock


class ShardOrder(Struct, frozen=True, array_like=True, tag="shard-order"):
    """What a shard should be: all of one job, at most one order a part."""

    parts: tuple[PartOrder, ...]


class WorkerOrder(Struct, frozen=True, array_like=True, tag="worker-order"):
    """What a worker should be doing. `layout` and `placement` are empty until the job is placed.

    `hold` is how many leases it may keep: it hands back the surplus that it has not begun.
    """

    job: Name
    specification: str
    stage: Literal["initialise", "train", "drain", "evaluate", "export"]
    phase: Count = 0
    layout: Layout | None = None
    placement: tuple[PartAddress, ...] = ()
    grants: tuple[Lease, ...] = ()
    hold: Count = 2**31
    checkpoint: Count = 0  # stop at the next boundary, copy the own state, and wait until this is 0 again
    resumes: bool = False  # a predecessor's state is kept for this worker: see TakeState


class StalenessRow(Struct, frozen=True, array_like=True):
    """Block updates applied for one worker and group. counts[i] is for staleness bucket i (see shard/staleness)."""

    worker: Name
    group: str
    counts: tuple[Count, ...]
    total: Count  # the sum of all stalenesses, for an exact mean


class TrafficRow(Struct, frozen=True, array_like=True):
    """Payload of one group's blocks in one encoding: bytes of frames, and the elements that they stand for.

    A pull counts every element that was asked for, so that bytes over elements is what a step downloads. A
    snapshot (where the puller was too far behind) counts under the encoding that the block has otherwise.
    """

    way: Literal["push", "pull"]
    group: str
    encoding: Name
    payload_bytes: Count = 0
    elements: Count = 0
    snapshots: Count = 0
    snapshot_bytes: Count = 0  # of payload_bytes


class PartReport(Struct, frozen=True, array_like=True):
    """A shard's counters for one part since it took it up; all grow but those of "now"."""

    part: Name
    job: Name
    term: Count = 0
    role: Literal["primary", "backup"] = "primary"
    blocks: Count = 0
    initialised_blocks: Count = 0
    elements: Count = 0
    updates: Count = 0  # block updates applied
    duplicates: Count = 0
    pushes: Count = 0
    pulls: Count = 0
    refusals: dict[str, int] = {}
    bytes_in: Count = 0  # message bytes, heads included
    bytes_out: Count = 0
    traffic: tuple[TrafficRow, ...] = ()
    staleness: tuple[StalenessRow, ...] = ()
    parked_pulls: Count = 0  # held back by the consistency policy, now
    pending_updates: Count = 0  # accumulated by `sync`, not yet applied, now
    workers: tuple[str, ...] = ()
    unpublished: Count = 0  # blocks with updates that no edition holds yet, now
    editions: Count = 0  # published, over all blocks
    replica_distance: float = 0.0  # |weights - published| / |weights|, now
    publish_period: Count = 0  # updates of a block between two editions, the longest now; 0: every version is one
    refusing_disk: Text = ""  # why the journal cannot be written now; acknowledgements wait for it
    journal_bytes: Count = 0  # written to the journal
    failed: Text = ""  # why this shard cannot hold the part: a clear message
    record: Count = 0  # number of the last record in its journal; 0 without a journal
    stored: Count = 0  # of a primary: the last record that its backup has stored, now
    is_synced: bool = False  # of a primary: its backup has caught up, and nothing is acknowledged without it
    partner: Text = ""  # of a primary: the shard that `stored` and `is_synced` are about ...
    partner_incarnation: Count = 0  # ... its incarnation, and the number of the partnership
    partner_number: Count = 0
    waiting_for: Text = ""  # why a primary acknowledges nothing now, where that is not its own disk
    checkpoint: Count = 0  # the last one of which the state is copied


class ShardReport(Struct, frozen=True, array_like=True, tag="shard-report"):
    """What a shard holds, and its own counters since it took up the job."""

    parts: tuple[PartReport, ...] = ()
    refusals: dict[str, int] = {}  # of messages that are for no part
    waiting_seconds: Seconds = 0.0
    working_seconds: Seconds = 0.0
    handshake_failures: Count = 0
    dropped: Count = 0  # answers to workers that are gone, or that have left too much unread


class WorkerReport(Struct, frozen=True, array_like=True, tag="worker-report"):
    """A worker's counters since it took its job up, and the leases that it holds."""

    job: str = ""
    stage: str = "idle"  # what it is doing: idle, loading, or the stage of its order
    layout: Layout | None = None  # declared with the initialise lease, until the job is placed
    examples: dict[str, int] = {}  # split -> number of examples; declared with the layout
    held: tuple[Count, ...] = ()
    returned: tuple[Count, ...] = ()  # handed back
    done: tuple[LeaseDone, ...] = ()  # repeated until confirmed
    drained: bool = False  # residuals are flushed and acknowledged
    failed: Text = ""  # a job failure that is nobody's crash: a clear message
    steps: Count = 0
    finished_examples: float = 0.0
    elements: Count = 0
    loss: float = 0.0  # of the last steps, nats an element (moving average)
    skipped_steps: Count = 0
    push_bytes: Count = 0
    pull_bytes: Count = 0
    retries: Count = 0
    reconnections: Count = 0
    refusals: dict[str, int] = {}
    residual_norm: float = 0.0
    in_flight: Count = 0
    waiting_seconds: Seconds = 0.0
    working_seconds: Seconds = 0.0
    device: str = ""
    begun: tuple[Count, ...] = ()
    """Leases whose first batch has started and that are not done; also those that a leaving worker handed back.

    What is freed after it was begun counts as repeated. A worker tells at once when it begins a lease; what
    it began and could not tell before it died is not counted.
    """

    metrics: dict[str, float] = {}  # of the last steps, means over elements (moving averages)
    checkpoint: Count = 0  # the one for which it waits now, with nothing on its way
    checkpoint_bytes: Count = 0  # of the own state that it sends for it; 0: it has none


class Heartbeat(Message, frozen=True, kw_only=True, tag="heartbeat"):
    """I live, this is what I hold. `seen` is the number of the last order that arrived."""

    name: Name
    incarnation: Count
    seen: Count
    report: ShardReport | WorkerReport


class Orders(Message, frozen=True, kw_only=True, tag="orders"):
    """The answer to a Heartbeat; also sent unasked when something changes.

    `number` grows. A process without a job gets no order and drops what it holds of an older one.
    `confirmed` are leases whose LeaseDone is recorded, or that it has not begun and that are not its own any
    more: the worker forgets them.
    """

    number: Count
    order: ShardOrder | WorkerOrder | None = None
    confirmed: tuple[Count, ...] = ()
    shutdown: bool = False


class ExportPart(Message, frozen=True, kw_only=True, tag="export-part"):
    """A piece of model.safetensors from the worker that holds the export lease; frames: one, its bytes."""

    name: Name
    incarnation: Count
    job: Name
    lease: Count
    offset: Count
    total: Count


class ExportStored(Message, frozen=True, kw_only=True, tag="export-stored"):
    """So many bytes of the export are stored, from the start on."""

    job: Name
    lease: Count
    stored: Count


class CheckpointPiece(Message, frozen=True, kw_only=True, tag="checkpoint-piece"):
    """A piece of what a process keeps in a checkpoint; frames: one, its bytes.

    A shard sends the file of each of its parts; a worker its own, `part` empty. The next piece follows when the one
    before is stored; one without an answer is sent again.
    """

    name: Name
    incarnation: Count
    job: Name
    checkpoint: Count
    part: Annotated[str, Meta(max_length=128)]
    offset: Count
    total: Count


class CheckpointStored(Message, frozen=True, kw_only=True, tag="checkpoint-stored"):
    """So many bytes of the file are stored, from the start on."""

    job: Name
    checkpoint: Count
    part: Annotated[str, Meta(max_length=128)]
    stored: Count


class TakeBlock(Message, frozen=True, kw_only=True, tag="take-block"):
    """A shard asks for what the checkpoint that its job goes on from holds of a block."""

    name: Name
    incarnation: Count
    job: Name
    part: Name
    block: Count


class KeptBlock(Message, frozen=True, kw_only=True, tag="kept-block"):
    """A block of a checkpoint; frames: one for each name in `arrays`. `state` is what the shard's room says of it, in
    JSON (see shard/checkpoint.py)."""

    job: Name
    part: Name
    block: Count
    state: str
    arrays: tuple[Name, ...]


class TakeState(Message, frozen=True, kw_only=True, tag="take-state"):
    """A worker asks for its predecessor's own state, from `offset` on."""

    name: Name
    incarnation: Count
    job: Name
    offset: Count


class KeptState(Message, frozen=True, kw_only=True, tag="kept-state"):
    """A piece of a predecessor's file; frames: one, its bytes. `adopted` are the blocks whose residual may be added to
    the next update: those that have taken no update of that name since."""

    job: Name
    offset: Count
    total: Count
    adopted: tuple[Count, ...]


AnyMessage = (
    Hello
    | Welcome
    | Push
    | Pushed
    | Pull
    | Pulled
    | Held
    | Tick
    | Initialise
    | Initialised
    | Refusal
    | Replicate
    | Stored
    | Register
    | Registered
    | Heartbeat
    | Orders
    | ExportPart
    | ExportStored
    | CheckpointPiece
    | CheckpointStored
    | TakeBlock
    | KeptBlock
    | TakeState
    | KeptState
)

MESSAGE_TYPES: tuple[type[Message], ...] = get_args(AnyMessage)
