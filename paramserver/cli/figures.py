"""How figures are written for people: the one place that knows the names in the status and in result.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from paramserver.cli.errors import EXIT_FAILED, EXIT_INTERRUPTED

FINAL_STATES = frozenset({"done", "failed", "cancelled"})
EXIT_CODES = {"done": 0, "failed": EXIT_FAILED, "cancelled": EXIT_INTERRUPTED}

Figures = Mapping[str, Any]


def number(value: float | None, digits: int = 3) -> str:
    """A figure, or a dash where there is none yet."""
    return "-" if value is None else f"{value:,.{digits}f}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def byte_size(value: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000 or unit == "GB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def progress_line(job: Figures) -> str:
    """One line of what a job is doing now."""
    parts = [str(job["state"])]
    if job["waiting"]:
        parts.append(str(job["waiting"]))
    if job["steps"]:
        wanted = job["examples_wanted"]
        done = min(job["examples"] / wanted, 1.0) if wanted else None
        parts += [
            f"{count(job['steps'])} steps" + (f" ({done:.0%})" if done is not None else ""),
            f"loss {_loss(job, job)}{_metrics(job['metrics'], 3)}",
            f"{number(job['examples_a_second'], 1)} examples/s",
            f"push {byte_size(job['pushed_bytes_a_second'])}/s, pull {byte_size(job['pulled_bytes_a_second'])}/s",
            f"staleness {number(job['staleness']['all']['mean'], 2)}",
        ]
    if job["examples_repeated"]:
        parts.append(f"{count(job['examples_repeated'])} examples repeated")
    return " | ".join(parts)


def result_rows(result: Figures) -> list[tuple[str, str]]:
    """The table at the end of a job: name and value."""
    rows = [("state", str(result["state"]) + (f": {result['reason']}" if result["reason"] else ""))]
    for split, what in (("train", "training loss, last steps"), ("valid", "validation loss"), ("test", "test loss")):
        loss = result[split]
        if loss["loss"] is not None:
            # Perplexity is what language models are compared by, and only they are told in bits.
            perplexity = f", perplexity {number(loss['perplexity'], 3)}" if result["unit"] == "bits" else ""
            rows.append((what, f"{_loss(loss, result, 4)}{perplexity}{_metrics(loss['metrics'])}"))
    for split, what in (("valid", "validation loss of the replica"), ("test", "test loss of the replica")):
        loss = result["replica"][split]
        if loss["loss"] is not None:
            rows.append((what, f"{_loss(loss, result, 4)}{_metrics(loss['metrics'])}"))
    rows.append(("time", f"{number(result['seconds'], 1)} s"))
    if result["steps"]:
        rows += _training_rows(result)
    if result["resumed_from"]:
        rows.append(("went on from checkpoint", str(result["resumed_from"])))
    if result["checkpoints"]:
        rows.append(("checkpoints", ", ".join(map(str, result["checkpoints"]))))
    if result["workers_lost"]:
        rows.append(("workers lost", ", ".join(str(name) for name in result["workers_lost"])))
    if result["shards_recovered"]:
        rows.append(("shards that came back", ", ".join(str(name) for name in result["shards_recovered"])))
    if result["faults"]["failovers"]:
        slowest = max(result["failover_seconds"], default=None)
        count_of = count(result["faults"]["failovers"])
        rows.append(("failovers", f"{count_of}, the slowest {number(slowest, 1)} s after the session's end"))
    if result["residuals_lost"]:
        norm = number(result["residuals_lost_norm"], 4)
        rows.append(("residuals lost", f"those of {count(result['residuals_lost'])} workers, norm {norm}"))
    return rows


def _training_rows(result: Figures) -> list[tuple[str, str]]:
    """What there is to say once a step was taken."""
    staleness = result["staleness"]["all"]
    repeated = result["examples_repeated"]
    rows = [
        ("steps", count(result["steps"])),
        ("examples", count(result["examples"]) + (f", {count(repeated)} repeated" if repeated else "")),
        (
            "staleness, versions",
            f"mean {number(staleness['mean'], 2)}, median {staleness['p50']}, 95% {staleness['p95']}, "
            f"largest {staleness['max']}",
        ),
    ]
    for way, title in (("push", "pushed"), ("pull", "pulled")):
        rows.append((title, f"{byte_size(result[f'{title}_bytes'])}, {_bits(result, way)}"))
    if result["snapshots"]:
        rows.append(("snapshots", f"{count(result['snapshots'])}, {byte_size(result['snapshot_bytes'])} of the pulled"))
    if result["skipped_steps"]:
        rows.append(("steps skipped, not finite", count(result["skipped_steps"])))
    return rows


def status_rows(job: Figures) -> list[tuple[str, str]]:
    """What `status` says of a job that runs or that ended last."""
    staleness, queues, faults = job["staleness"]["all"], job["queues"], job["faults"]
    return [
        ("job", str(job["id"])),
        ("state", " - ".join(str(part) for part in (job["state"], job["waiting"], job["reason"]) if part)),
        ("time", f"{number(job['seconds'], 1)} s"),
        ("model", f"{count(job['elements'])} parameters in {count(job['blocks'])} blocks"),
        ("steps", count(job["steps"])),
        ("examples", f"{count(job['examples'])} of {count(job['examples_wanted'])}"),
        ("loss", f"{_loss(job, job, 4)}{_metrics(job['metrics'])}"),
        ("examples/s", number(job["examples_a_second"], 1)),
        ("updates/s", number(job["updates_a_second"], 1)),
        ("push", _way(job, "push", "pushed")),
        ("pull", _way(job, "pull", "pulled")),
        (
            "staleness, versions",
            f"mean {number(staleness['mean'], 2)}, median {staleness['p50']}, 95% {staleness['p95']}, "
            f"largest {staleness['max']}",
        ),
        ("residuals", f"norm {number(job['residual_norm'], 4)}"),
        ("replica", _replica(job)),
        *_part_rows(job["parts"]),
        ("checkpoints", _checkpoints(job)),
        ("queues", _pairs(queues)),
        ("survived", _pairs({"examples repeated": job["examples_repeated"], **faults})),
        ("refused", _pairs(job["refusals"]) or "nothing"),
    ]


def _part_rows(parts: Figures) -> list[tuple[str, str]]:
    """Who serves each part of the model, and who would in its place."""
    rows = []
    for name, part in parts.items():
        text = f"served by {part['shard']} under term {part['term']}"
        if part["seconds_away"] is not None:
            text = f"not served for {number(part['seconds_away'], 1)} s, waits for {part['shard']}"
        if part["backup"] is not None:
            state = "in step" if part["is_synced"] else "catching up"
            lag = f", {count(part['lag_records'])} records behind" if part["lag_records"] else ""
            text += f", backup {part['backup']} {state}{lag}"
        if part["failovers"]:
            text += f", {count(part['failovers'])} failover(s)"
        rows.append((f"part {name}", text))
    return rows


def event_rows(job: Figures, most: int = 12) -> list[tuple[str, str]]:
    """The last of what happened to a job: seconds since its turn came, and words."""
    return [(f"{number(event['seconds'], 1)} s", str(event["text"])) for event in job["events"][-most:]]


def _loss(loss: Figures, of: Figures, digits: int = 3) -> str:
    """A loss in the unit that the job's family asks for, for example "1.886 bits a character"."""
    article = "an" if of["symbol"][:1] in "aeiou" else "a"
    value = loss["bits" if of["unit"] == "bits" else "loss"]
    return f"{number(value, digits)} {of['unit']} {article} {of['symbol']}"


def _metrics(metrics: Figures, digits: int = 4) -> str:
    """The task's own metrics, to follow its loss; empty where it has none."""
    return "".join(f", {name} {number(value, digits)}" for name, value in metrics.items())


def _checkpoints(job: Figures) -> str:
    figures = job["checkpoint"]
    said = [
        f"{figures['phase']} {figures['taking']}" if figures["taking"] else "",
        f"the last is {figures['last']}" if figures["last"] else "",
        f"this run goes on from {job['resumed_from']}" if job["resumed_from"] else "",
        str(figures["reason"]),
    ]
    return "; ".join(filter(None, said)) or "none"


def _replica(job: Figures) -> str:
    if not job["publish_period"]:
        return "the weights"
    return (
        f"{count(job['editions'])} editions, now one after {count(job['publish_period'])} updates of a block, "
        f"{number(100 * job['replica_distance'], 2)}% from the weights"
    )


def _way(job: Figures, way: str, past: str) -> str:
    return f"{byte_size(job[f'{past}_bytes_a_second'])}/s, {byte_size(job[f'{past}_bytes'])} in all, {_bits(job, way)}"


def _bits(figures: Figures, way: str) -> str:
    """Bits an element one way; encoded and full-precision blocks apart where there are both."""
    encoded, full = figures[f"{way}_bits_encoded"], figures[f"{way}_bits_full_precision"]
    text = f"{number(figures[f'{way}_bits_an_element'], 2)} bits an element"
    return text if encoded is None or full is None else f"{text} ({number(encoded, 2)} of what is encoded)"


def _pairs(values: Figures) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in values.items())


def load_rows(job: Figures) -> list[tuple[str, str]]:
    """How long each process waited and worked."""
    return [
        (name, f"worked {number(one['working_seconds'], 1)} s, waited {number(one['waiting_seconds'], 1)} s")
        for processes in (job["shards"], job["workers"])
        for name, one in processes.items()
    ]


def session_rows(status: Figures) -> list[tuple[str, str]]:
    return [
        (
            str(one["name"]),
            f"pid {one['pid']} on {one['host']}, heard {number(one['seconds_since_heartbeat'], 1)} s ago",
        )
        for one in status["sessions"]
    ]


def write_rows(rows: Iterable[tuple[str, str]], title: str = "") -> None:
    """A two-column table on standard output; plain text where that is no terminal."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    console = Console(highlight=False)
    if not console.is_terminal:
        # Not folded at some width: a line of output is a figure.
        width = max((len(name) for name, _ in rows), default=0)
        print("\n".join(([title] if title else []) + [f"{name:<{width}}  {value}" for name, value in rows]))
        return
    table = Table(title=title or None, show_header=False, title_justify="left")
    for name, value in rows:
        table.add_row(Text(name), Text(value))
    console.print(table)
