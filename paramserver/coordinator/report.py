"""What a job has come to, in plain JSON values: figures while it runs, a result when it is over.

Losses are nats and bits an element, perplexity is exp(nats), a task's own metrics are means over elements, bytes are
whole messages on the shards' side. `unit` says whether people are told the nats or the bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

from paramserver.coordinator.effects import JobRecord
from paramserver.coordinator.lifecycle import JobRun
from paramserver.coordinator.sessions import Session
from paramserver.coordinator.telemetry import Telemetry, bits, plain, ratio
from paramserver.protocol.messages import ShardReport, WorkerReport
from paramserver.router.leases import EVALUATED_SPLITS, split_name


def job_figures(run: JobRun, waiting: str, now: float) -> dict[str, Any]:
    """The status of a job that runs or that ended last."""
    telemetry = run.telemetry
    if run.is_settling(now):
        telemetry.forget_samples()
    rates = telemetry.sample(now, telemetry.totals())
    loss = telemetry.loss()
    figures: dict[str, Any] = {
        "id": run.record.id,
        "state": run.state,
        "reason": run.record.reason,
        "waiting": waiting,
        "warnings": [*run.record.warnings, *run.leasing.warnings],
        "seconds": run.active_seconds(now),
        "seconds_by_state": run.seconds_by_state(now),
        "steps": run.steps(),
        "steps_wanted": run.job.stop.steps,
        "examples": _examples(run),
        "examples_wanted": run.job.stop.epochs * run.examples.get("train", 0),
        "examples_repeated": run.book.examples_repeated,
        "leases_left": {kind: run.book.left(kind) for kind in ("train", "evaluate")},
        "elements": run.layout.elements if run.layout else 0,
        "blocks": len(run.layout.blocks) if run.layout else 0,
        "loss": loss,
        "bits": bits(loss),
        "metrics": telemetry.metrics(),
        "symbol": run.symbol,
        "unit": run.unit,
        **{f"{name}_a_second": rate for name, rate in rates.items()},
        **telemetry.traffic(),
        "staleness": telemetry.staleness(),
        "layers": telemetry.layers(),
        "residual_norm": telemetry.residual_norm(),
        "queues": telemetry.queues(),
        "faults": {
            **telemetry.faults(),
            "workers_lost": len(run.workers_lost),
            **_shard_faults(run),
        },
        "refusals": telemetry.refusals(),
        "workers_lost": list(run.workers_lost),
        "shards_recovered": list(run.shards_recovered),
        "events": run.events.rows(),
        "events_forgotten": run.events.forgotten,
        "failover_seconds": list(run.failover.seconds),
        "checkpoint": run.checkpoints.cuts.figures(),
        **run.checkpoints.residual_figures(run.state),
        "parts": _parts(run, now),
        "shards": telemetry.by_process(),
        "workers": telemetry.by_worker(),
    }
    return cast(dict[str, Any], plain(figures))


def _shard_faults(run: JobRun) -> dict[str, int]:
    return {
        "shards_recovered": len(run.shards_recovered),
        "failovers": sum(part.failovers for part in run.failover.parts),
        "grants": sum(part.grants for part in run.failover.parts),
    }


def _parts(run: JobRun, now: float) -> dict[str, Any]:
    """Of each part: which processes hold it, and what its primary counted last."""
    counted, away = run.telemetry.by_part(), run.failover.away_figures(now)
    figures: dict[str, Any] = {}
    for part in run.failover.parts:
        report, backup = run.telemetry.parts.get(part.name), part.backup
        lag = report.record - report.stored if report is not None and backup is not None else None
        figures[part.name] = {
            "shard": part.primary.shard,
            "term": part.term,
            "backup": None if backup is None else backup.shard,
            "is_synced": part.is_synced,
            "lag_records": lag,
            "failovers": part.failovers,
            "grants": part.grants,
            "seconds_away": away.get(part.name),
            **counted.get(part.name, {}),
        }
    return figures


def job_result(run: JobRun, coordinator_refusals: dict[str, int], now: float) -> dict[str, Any]:
    """What result.json holds."""
    telemetry = run.telemetry
    train = telemetry.loss()
    sums = run.leasing.sums
    skipped = max(telemetry.faults()["skipped_steps"], int(sums.get("train", {}).get("skipped_steps", 0)))
    staleness = telemetry.staleness()
    figures: dict[str, Any] = {
        "job": run.record.id,
        "name": run.job.name,
        "seed": run.job.seed,
        "state": run.state,
        "reason": run.record.reason,
        "symbol": run.symbol,
        "unit": run.unit,
        "train": _loss(train, telemetry.metrics()),
        **{split: _evaluated(run, split) for split in EVALUATED_SPLITS},
        "replica": {split: _evaluated(run, split_name(split, "replica")) for split in EVALUATED_SPLITS},
        "steps": run.steps(),
        "examples": _examples(run),
        "examples_repeated": run.book.examples_repeated,
        "skipped_steps": skipped,
        "seconds": run.active_seconds(now),
        "seconds_by_state": run.seconds_by_state(now),
        "staleness": {"all": staleness["all"], "by_worker": staleness["by_worker"]},
        **telemetry.traffic(),
        "layers": telemetry.layers(),
        "refusals": {"shards": telemetry.refusals(), "coordinator": coordinator_refusals},
        "faults": {**telemetry.faults(), "workers_lost": len(run.workers_lost), **_shard_faults(run)},
        "workers_lost": list(run.workers_lost),
        "shards_recovered": list(run.shards_recovered),
        "events": run.events.rows(),
        "events_forgotten": run.events.forgotten,
        "failover_seconds": list(run.failover.seconds),
        "checkpoints": list(run.checkpoints.cuts.taken),
        "checkpoints_given_up": run.checkpoints.cuts.given_up,
        **run.checkpoints.residual_figures(run.state),
        "warnings": [*run.record.warnings, *run.leasing.warnings],
    }
    return cast(dict[str, Any], plain(figures))


def empty_result(record: JobRecord) -> dict[str, Any]:
    """What result.json holds of a job that could not be taken up at all: the fields of `job_result`, empty."""
    telemetry = Telemetry()
    staleness = telemetry.staleness()
    return {
        "job": record.id,
        "name": record.id,
        "seed": None,
        "state": record.state,
        "reason": record.reason,
        "symbol": "element",
        "unit": "nats",
        **{split: _loss(None, {}) for split in ("train", *EVALUATED_SPLITS)},
        "replica": {split: _loss(None, {}) for split in EVALUATED_SPLITS},
        **dict.fromkeys(("steps", "examples", "examples_repeated", "skipped_steps"), 0),
        "seconds": 0.0,
        "seconds_by_state": {},
        "staleness": {"all": staleness["all"], "by_worker": {}},
        **telemetry.traffic(),
        "layers": {},
        "refusals": {"shards": {}, "coordinator": {}},
        "faults": {
            **telemetry.faults(),
            **dict.fromkeys(("workers_lost", "shards_recovered", "failovers", "grants"), 0),
        },
        "workers_lost": [],
        "shards_recovered": [],
        "events": [],
        "events_forgotten": 0,
        "failover_seconds": [],
        "checkpoints": [],
        "checkpoints_given_up": 0,
        "resumed_from": None,
        "residuals_lost": 0,
        "residuals_lost_norm": 0.0,
        "warnings": list(record.warnings),
    }


def session_figures(session: Session, now: float) -> dict[str, Any]:
    return {
        "name": session.name,
        "role": session.role,
        "incarnation": session.incarnation,
        "host": session.host,
        "pid": session.pid,
        "address": session.address,
        "key": session.key,
        "seconds_since_heartbeat": max(0.0, now - session.heard_at),
        "seconds_alive": now - session.since,
        "job": _job_of(session.report),
    }


def _job_of(report: ShardReport | WorkerReport | None) -> str:
    if isinstance(report, ShardReport):
        return report.parts[0].job if report.parts else ""
    return report.job if report is not None else ""


def _examples(run: JobRun) -> float:
    """Training examples that were worked on, parts of leases and repeated ones included."""
    finished = run.checkpoints.examples_before + run.telemetry.finished_examples
    recorded = run.leasing.sums.get("train", {}).get("examples", 0)
    return round(max(finished, recorded), 3)


def _evaluated(run: JobRun, split: str) -> dict[str, Any]:
    sums, metric_sums = run.leasing.sums.get(split, {}), run.leasing.metric_sums.get(split, {})
    elements = sums.get("elements", 0)
    metrics = {name: ratio(total, elements) for name, total in sorted(metric_sums.items())}
    return _loss(ratio(sums.get("loss_sum", 0.0), elements), metrics)


def _loss(nats: float | None, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    # Beyond 700 nats the perplexity is no float any more.
    perplexity = math.exp(nats) if nats is not None and nats < 700 else None
    return {"loss": nats, "bits": bits(nats), "perplexity": perplexity, "metrics": dict(metrics)}
