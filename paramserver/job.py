"""The job specification: a YAML file, checked once, frozen afterwards.

Every default is on one line with its meaning. Whatever cannot work is refused here, with the field,
what was found and what is allowed; whatever is known not to converge warns and names the mend.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from paramserver.encoding import Encoding, EncodingError, EncodingOptions, encoding_names, make_encoding
from paramserver.encoding.layers import FULL_PRECISION, encodings_by_block, layer_encoding, settling_encoding
from paramserver.explain import explain, found, nearest
from paramserver.families import families, known_families, load_function
from paramserver.protocol.layout import Layout

LOW_BITS = 2  # from here down an adaptive optimiser sees mostly what rounding did
FRESH_ENCODINGS = frozenset({"fp32", "bf16"})  # others lose too much without error feedback
MOST_COUNT = 2**40  # of steps, updates and epochs: products of them stay inside float64 and 64 bits
MAX_FILE_BYTES = 2**20  # as over HTTP; also the end of what has none, such as a device


class JobError(ValueError):
    """A job specification that is refused. The text has one line a problem: where, found, allowed."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Model(_Section):
    family: str  # an installed model family
    args: dict[str, Any] = {}  # checked by the family's own schema


class Cluster(_Section):
    """What the job needs at least; it waits until so many are there."""

    shards: Annotated[int, Field(ge=1, le=1024)] = 2
    workers: Annotated[int, Field(ge=1, le=4096)] = 2


class Consistency(_Section):
    mode: Literal["async", "bounded", "sync"] = "async"
    slack: Annotated[int, Field(ge=0, le=MOST_COUNT)] | None = None  # bounded: worker steps ahead of the slowest
    quorum: Annotated[int, Field(ge=1)] | None = None  # sync: pushes a round; absent: all workers
    damping: Literal["none", "inverse", "sqrt"] = "none"  # lr by staleness s: 1, 1/(1+s), 1/sqrt(1+s)
    settling_updates: Annotated[int, Field(ge=0, le=MOST_COUNT)] = (
        16  # of a block, times s: until then lr grows from nothing, where the optimizer divides by past gradients
    )

    @field_validator("mode", mode="before")
    @classmethod
    def _planned(cls, mode: object) -> object:
        if mode in ("elastic", "local"):
            raise ValueError(f"{mode!r} is not supported yet; use 'async', 'bounded' or 'sync'")
        return mode

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.mode == "bounded" and self.slack is None:
            raise ValueError("mode 'bounded' needs slack: how many steps a worker may run ahead, for example 4")
        if self.mode != "bounded" and self.slack is not None:
            raise ValueError(f"slack belongs to mode 'bounded', found with mode {self.mode!r}")
        if self.mode != "sync" and self.quorum is not None:
            raise ValueError(f"quorum belongs to mode 'sync', found with mode {self.mode!r}")
        return self


def _make(name: str, options: EncodingOptions) -> Encoding:
    try:
        return make_encoding(name, options)
    except EncodingError as error:
        raise ValueError(str(error)) from None


class _Encoded(_Section):
    """What both ways choose: an encoding, its options, and layers that are treated apart."""

    encoding: str
    tile: int = 64  # elements that share a scale
    layers: dict[str, str] = {}  # pattern of a parameter's name or group -> encoding; norms and biases: fp32
    _other_way_only: ClassVar[str] = ""  # an encoding that cannot be had this way

    @property
    def options(self) -> EncodingOptions:
        return EncodingOptions(tile=self.tile)

    @property
    def encoding_names(self) -> set[str]:
        """All that a block may use."""
        return {self.encoding, FULL_PRECISION, *self.layers.values()}

    def possible_encodings(self) -> list[Encoding]:
        """One of each name, as `encodings` makes them."""
        return [layer_encoding(name, self.options) for name in sorted(self.encoding_names)]

    def encodings(self, layout: Layout) -> tuple[Encoding, ...]:
        """The encoding of every block of the layout."""
        return encodings_by_block(layout, self.encoding, self.options, self.layers)

    @field_validator("encoding", "layers")
    @classmethod
    def _known(cls, given: str | dict[str, str]) -> str | dict[str, str]:
        known = [name for name in encoding_names() if name != cls._other_way_only]
        for name in [given] if isinstance(given, str) else given.values():
            if name == cls._other_way_only:
                raise ValueError(f"encoding {name!r} is for the other way; here there are {', '.join(known)}")
            if name not in known:
                raise ValueError(f"unknown encoding {name!r}{nearest(name, known)} (known: {', '.join(known)})")
        return given

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for name in self.layers.values():
            _make(name, EncodingOptions(tile=self.tile))
        _make(self.encoding, self.options)
        return self


# Settings of a push that one encoding alone obeys.
_OPTION_OF = {"density": "topk", "error": "adaptive", "error_limit": "adaptive"}


class PushSettings(_Encoded):
    _other_way_only: ClassVar[str] = "coded"  # its step is common to all that a shard publishes

    encoding: str = "int4"  # of updates
    density: Annotated[float, Field(gt=0, le=1)] = 0.01  # topk: share of the elements that go out
    rounding: Literal["nearest", "stochastic"] = "nearest"
    error: Annotated[float, Field(gt=0, lt=1)] = 0.6  # adaptive: root of the share of the squares that may stay behind
    error_limit: Annotated[float, Field(gt=0, lt=1)] = 0.8  # adaptive: the same where the wire is what a step waits for
    settling_updates: Annotated[int, Field(ge=0, le=MOST_COUNT)] = (
        100  # of the model, which go out finely: 4 bits and less in int8; adaptive: over which both grow so far
    )
    overlap: Literal["auto", True, False] = "auto"  # compute the next batch meanwhile; auto: where an exchange is slow
    deadline_seconds: Annotated[float, Field(ge=0.01, le=3600)] = 5.0  # then the same bytes are sent again

    @property
    def options(self) -> EncodingOptions:
        return EncodingOptions(tile=self.tile, density=self.density, rounding=self.rounding)

    def possible_encodings(self) -> list[Encoding]:
        usual = super().possible_encodings()
        return list({one.identifier: one for one in [*usual, *map(settling_encoding, usual)]}.values())

    @model_validator(mode="before")
    @classmethod
    def _limit_follows_error(cls, given: Any) -> Any:
        """Who names a larger error alone means it where the wire is slow, too."""
        if isinstance(given, Mapping) and "error_limit" not in given and isinstance(given.get("error"), int | float):
            usual: float = cls.model_fields["error_limit"].default
            return {**given, "error_limit": max(usual, given["error"])}
        return given

    @model_validator(mode="after")
    def _options_have_a_user(self) -> Self:
        # A resolved job names every field, so it is by its value that an option shows that somebody meant it.
        for option, encoding in _OPTION_OF.items():
            default = type(self).model_fields[option].default
            if getattr(self, option) != default and encoding not in self.encoding_names:
                raise ValueError(
                    f"{option} belongs to encoding {encoding!r}, found {getattr(self, option)} with "
                    f"{', '.join(repr(name) for name in sorted(self.encoding_names - {FULL_PRECISION})) or 'fp32'}; "
                    f"leave {option} out, or use encoding {encoding!r}"
                )
        return self

    @model_validator(mode="after")
    def _limit_is_a_limit(self) -> Self:
        if self.error_limit < self.error:
            raise ValueError(
                f"error_limit {self.error_limit} is less than error {self.error}: it is what may stay behind where the "
                "wire is slow; raise it, or give both the same number"
            )
        return self


class PullSettings(_Encoded):
    _other_way_only: ClassVar[str] = "adaptive"  # its plan is over all that a worker pushes

    encoding: str = "ternary"  # of published deltas, or of fresh weights: fp32 or bf16
    fresh: bool | None = None  # true: the weights as they are now; absent: true with fp32 and bf16
    publish_every: Annotated[int, Field(ge=1, le=MOST_COUNT)] | None = (
        None  # updates of a block; absent: half the active pushers, up to all where pulls are slow
    )
    publish_seconds: Annotated[float, Field(ge=0.01, le=3600)] = 0.5  # the longest that an update stays unpublished

    still: Annotated[float, Field(ge=0, lt=1)] = 1e-5  # a block that moves less, relative to its norm, is held back ...
    still_periods: Annotated[int, Field(ge=1, le=1000)] = 16  # ... for at most so many periods

    @property
    def is_fresh(self) -> bool:
        return self.encoding in FRESH_ENCODINGS if self.fresh is None else self.fresh

    @model_validator(mode="after")
    def _does_not_drift(self) -> Self:
        drifting = sorted({self.encoding, *self.layers.values()} - FRESH_ENCODINGS)
        if self.is_fresh and drifting:
            raise ValueError(
                f"fresh weights in {drifting[0]!r} drift, because what rounding loses is lost; use 'fp32' or 'bf16' "
                "with fresh: true, or leave fresh out for published deltas"
            )
        if self.is_fresh and self.publish_every is not None:
            raise ValueError("publish_every belongs to published deltas; with fresh weights leave it out")
        return self


class OptimizerSettings(_Section):
    # The bounds keep what reaches a kernel inside float32: an infinite factor, or zero by zero, ends in the weights.
    name: Literal["sgd", "momentum", "nesterov", "adagrad", "adam", "rmsprop"] = "adagrad"
    lr: Annotated[float, Field(gt=0, le=1000)] = 0.05
    clip: Annotated[float, Field(gt=0)] | None = 1.0  # global norm, on the worker
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9  # momentum, nesterov
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (
        0.9,
        0.999,
    )  # adam
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.99  # rmsprop: of the mean square
    epsilon: Annotated[float, Field(ge=1e-12, le=1000)] = 1e-8  # adagrad, adam, rmsprop
    initial_accumulator: Annotated[float, Field(ge=0, le=1e30)] = 0.0  # adagrad
    where: Literal["server", "worker"] = "server"  # worker: preconditions before the encoding

    @property
    def is_preconditioning(self) -> bool:
        """Whether it divides by the size of past gradients."""
        return self.name in ("adagrad", "adam", "rmsprop")


class Durability(_Section):
    log: Literal["none", "journal", "journal+fsync"] = "none"  # what is acknowledged survives: the shard, the machine
    backups: Literal[0, 1] = 0  # other shard processes that store what a shard acknowledges, and take its place
    keep: Literal["needed", "all"] = "needed"  # all: the whole journal, to be replayed after the job

    @model_validator(mode="after")
    def _backups_need_a_journal(self) -> Self:
        if self.backups and self.log == "none":
            raise ValueError(
                f"backups {self.backups} with log 'none': a backup stores the records of a journal; use log 'journal', "
                "or backups 0"
            )
        return self

    @model_validator(mode="after")
    def _has_what_it_keeps(self) -> Self:
        if self.keep == "all" and self.log == "none":
            raise ValueError("durability.keep 'all' keeps the journal, but durability.log is 'none'; use log 'journal'")
        return self


class CheckpointSettings(_Section):
    every_seconds: Annotated[float, Field(ge=1, le=MOST_COUNT)] | None = None  # of training, between two
    every_steps: Annotated[int, Field(ge=1, le=MOST_COUNT)] | None = None  # of all workers together
    keep: Annotated[int, Field(ge=1, le=1000)] = 2  # the newest so many; older ones are removed


class Routing(_Section):
    mode: Literal["random"] = "random"

    @field_validator("mode", mode="before")
    @classmethod
    def _planned(cls, mode: object) -> object:
        if mode in ("hash", "affinity"):
            raise ValueError(f"{mode!r} is not supported yet; use 'random'")
        return mode


class Stop(_Section):
    epochs: Annotated[int, Field(ge=1, le=MOST_COUNT)] = 1
    steps: Annotated[int, Field(ge=1, le=MOST_COUNT)] | None = (
        None  # of all workers together: ends earlier than the epochs
    )


class Job(_Section):
    """One training job. `data` is checked by the model family."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
    model: Model
    data: dict[str, Any] = {}
    cluster: Cluster = Cluster()
    consistency: Consistency = Consistency()
    push: PushSettings = PushSettings()
    pull: PullSettings = PullSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    durability: Durability = Durability()
    checkpoint: CheckpointSettings = CheckpointSettings()
    routing: Routing = Routing()
    stop: Stop = Stop()

    @model_validator(mode="after")
    def _has_room_for_backups(self) -> Self:
        if self.durability.backups and self.cluster.shards < 2:
            raise ValueError(
                f"durability.backups {self.durability.backups} with cluster.shards {self.cluster.shards}: a backup is "
                "another shard process; ask for 2 shards or more, or use backups 0"
            )
        return self

    @model_validator(mode="after")
    def _cannot_deadlock(self) -> Self:
        quorum = self.consistency.quorum
        if quorum is not None and quorum > self.cluster.workers:
            raise ValueError(
                f"consistency.quorum {quorum} is more than cluster.workers {self.cluster.workers}: "
                "a round could never fill; lower the quorum or ask for more workers"
            )
        return self

    def warnings(self) -> list[str]:
        """Settings that work but are known not to converge, each with its mend."""
        found: list[str] = []
        workers, optimizer = self.cluster.workers, self.optimizer
        on_server = optimizer.where == "server"
        is_momentum = optimizer.name in ("momentum", "nesterov")
        if is_momentum and on_server and workers > 2 and self.consistency.mode != "sync":
            found.append(
                f"optimizer.name {optimizer.name!r} on the server with {workers} asynchronous workers is known to "
                "diverge beyond 2; use optimizer.where 'worker', 'adagrad' or 'adam', or consistency {mode: sync}"
            )
        low = sorted(name for name in self.push.encoding_names if make_encoding(name).bits <= LOW_BITS)
        if "adaptive" in low and on_server and optimizer.is_preconditioning:
            low.remove("adaptive")
            found.append(
                f"push encoding 'adaptive' with {optimizer.name!r} on the server is known to learn slowly at first: "
                "bits go where gradients are large, and it moves the others as far; use optimizer.where 'worker'"
            )
        if low and on_server and optimizer.is_preconditioning:
            found.append(
                f"push encoding {low[0]!r} (2 bits and less) with {optimizer.name!r} on the server is known to "
                "converge badly: its second moments are those of the rounding; use optimizer.where 'worker', "
                "or push.encoding 'int4'"
            )
        if optimizer.name == "sgd" and workers > 1 and self.consistency.mode == "async":
            if self.consistency.damping == "none":
                found.append(
                    "plain 'sgd' with asynchronous workers loses accuracy with every worker; use 'adagrad' or "
                    "'adam', or consistency.damping 'sqrt'"
                )
        elif self.consistency.damping != "none" and optimizer.name != "sgd":
            found.append("consistency.damping helps 'sgd' only; with adaptive optimizers it slows learning")
        if optimizer.clip is None and workers > 1:
            found.append("optimizer.clip is off: stale gradients are safer clipped, for example clip: 1.0")
        return found

    def json_text(self) -> str:
        """The resolved specification as one line of JSON; `parse_job` of it gives the same job."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True)


def symbol_of(job: Job) -> str:
    """What one predicted element of a checked job is, in a word, for example "character"."""
    family = families()[job.model.family]
    return family.symbol(family.arguments.model_validate(job.model.args))


def unit_of(job: Job) -> str:
    """What people are told the losses of a checked job in: "bits" or "nats"."""
    return families()[job.model.family].unit


def lease_examples_of(job: Job) -> int:
    """Examples of a lease of a checked job; the last one of an epoch or split may have fewer."""
    family = families()[job.model.family]
    return family.lease_examples(family.data.model_validate(job.data))


# ------------------------------------------------------------------------------------- reading


class _StrictLoader(yaml.SafeLoader):
    """YAML as the standard has it: a field that is given twice is an error, not the last one's victory.

    Aliases are refused, as over HTTP: a few lines of them stand for more than a machine can hold.
    """

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases (*name) are not allowed; write the values out", mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_job(content: object, source: str = "job") -> Job:
    """Check a specification. Raises JobError with one line a problem, each naming source and field."""
    if not isinstance(content, Mapping):
        raise JobError(f"{source}: a job specification is a mapping of fields, found {found(content)}")
    try:
        job = Job.model_validate(content)
    except ValidationError as error:
        raise JobError(explain(error, source, Job)) from None
    family = families().get(job.model.family)
    if family is None:
        raise JobError(
            f"{source}: model.family: unknown family {job.model.family!r}"
            f"{nearest(job.model.family, families())} (known: {known_families()})"
        )
    problems, checked = [], {}
    for field, schema, given in (
        ("model.args", family.arguments, job.model.args),
        ("data", family.data, job.data),
    ):
        try:
            checked[field] = schema.model_validate(given).model_dump(mode="json")
        except ValidationError as error:
            problems.append(explain(error, source, schema, field))
    if problems:
        raise JobError("\n".join(problems))
    model = job.model.model_copy(update={"args": checked["model.args"]})
    return job.model_copy(update={"model": model, "data": checked["data"]})


def parse_job_text(text: str, source: str = "job") -> Job:
    """The same from YAML or JSON text."""
    try:
        content = yaml.load(text, _StrictLoader)
    except RecursionError:
        raise JobError(f"{source}: nested too deep to be a job specification") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # the last two: an impossible date, for example
        raise JobError(f"{source}: not readable as YAML: {' '.join(str(error).split())}") from None
    return parse_job(content, source)


def load_job(path: Path) -> Job:
    """The same from a file."""
    try:
        if path.is_fifo() or path.is_socket():
            # Whoever opens a pipe waits for its other end, perhaps for ever.
            raise JobError(f"{path}: not a file but a pipe; write the job into a file")
        with path.open("rb") as file:
            raw = file.read(MAX_FILE_BYTES + 1)
        text = raw[:MAX_FILE_BYTES].decode("utf-8")
    except FileNotFoundError:
        raise JobError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: not readable: {error}") from None
    if len(raw) > MAX_FILE_BYTES:
        raise JobError(f"{path}: larger than {MAX_FILE_BYTES} bytes, the most allowed for a job")
    return parse_job_text(text, str(path))


def check_data(job: Job) -> None:
    """Raise JobError where the job's data is not on this machine."""
    family = families()[job.model.family]
    try:
        load_function(family.find_data)(family.data.model_validate(job.data))
    except ValueError as error:
        raise JobError(f"data: {error}") from None


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job; model.args and data list what each installed family takes."""
    schema = Job.model_json_schema()
    schema["x-families"] = {
        name: {"args": family.arguments.model_json_schema(), "data": family.data.model_json_schema()}
        for name, family in sorted(families().items())
    }
    schema["x-encodings"] = encoding_names()
    return schema
