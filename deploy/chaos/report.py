"""What a chaos run has shown: plain values for programs, and the same as lines for people."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from deploy.chaos.harness import Outcome, Run
from deploy.chaos.schedule import Declaration

# What issue and docs/chaos.md ask for; a machine with other work on it misses the last three through no fault of ours.
KEPT_OUTSIDE, KEPT_IN_ALL, MOST_LOSS_CHANGE = 0.95, 0.85, 0.02


def make_report(declaration: Declaration, chaos: Run, quiet: Run | None, why_no_loss: str) -> dict[str, Any]:
    """Args:
    why_no_loss: why the final losses cannot be compared; empty where they can.
    """
    outcomes = chaos.outcomes
    report: dict[str, Any] = {
        "seed": declaration.seed,
        "seconds": declaration.seconds,
        "shards": declaration.shards,
        "workers": declaration.workers,
        "declared": {"faults": declaration.faults, "stalls": declaration.stalls, "mix": declaration.mix()},
        "job": chaos.job,
        "state": chaos.result["state"],
        "reason": chaos.result["reason"],
        "fired": sum(outcome.evidence.has_fired for outcome in outcomes),
        "by_kind": _by_kind(outcomes),
        "faults": [_fault(outcome) for outcome in outcomes],
        "updates": {
            "acknowledged": chaos.proof.acknowledged,
            "applied": chaos.proof.applied,
            "lost": chaos.proof.lost,
            "doubled": chaos.proof.doubled,
            "reasons": list(chaos.proof.reasons),
        },
        "examples": _examples(chaos),
        "workers_lost": len(chaos.result["workers_lost"]),
        "shards_recovered": len(chaos.result["shards_recovered"]),
        "unplanned_deaths": _unplanned(chaos),
        "throughput": _throughput(chaos, quiet),
        "restart_cpu_seconds": round(chaos.restart_cpu_seconds, 2),
        "loss": _loss(chaos, quiet, why_no_loss),
    }
    report["failures"] = failures(report)
    return report


def failures(report: Mapping[str, Any]) -> list[str]:
    """What was not as it must be on any machine; empty where all was. Speed and loss are judged by who reads them."""
    updates = report["updates"]
    reasons = "; ".join(updates["reasons"])
    found = [f"{updates[what]} updates {what}: {reasons}" for what in ("lost", "doubled") if updates[what]]
    if report["state"] != "done":
        found.append(f"the job is {report['state']}: {report['reason']}")
    for fault in report["faults"]:
        if not fault["has_fired"]:
            found.append(f"fault {fault['number']} ({fault['what']}) is not proven: {fault['evidence']}")
        elif fault["recovery_seconds"] is None:
            found.append(f"fault {fault['number']} ({fault['what']}) was not recovered from")
    found += [f"nobody asked for this death: {text}" for text in report["unplanned_deaths"]]
    return found


def _fault(outcome: Outcome) -> dict[str, Any]:
    planned = outcome.planned
    return {
        "number": planned.number,
        "kind": planned.kind,
        "what": str(planned),
        "target": planned.target,
        "other": planned.other,
        "planned_at_seconds": planned.at_seconds,
        "fired_at_seconds": outcome.fired_at_seconds,
        "has_fired": outcome.evidence.has_fired,
        "evidence": outcome.evidence.text,
        "recovery_seconds": outcome.recovery_seconds,
        "restart_cpu_seconds": outcome.restart_cpu_seconds,
    }


def _by_kind(outcomes: list[Outcome]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for kind in sorted({outcome.planned.kind for outcome in outcomes}):
        own = [outcome for outcome in outcomes if outcome.planned.kind == kind]
        seconds = [outcome.recovery_seconds for outcome in own if outcome.recovery_seconds is not None]
        rows[kind] = {
            "planned": len(own),
            "fired": sum(outcome.evidence.has_fired for outcome in own),
            "recovery_seconds_median": round(statistics.median(seconds), 2) if seconds else None,
            "recovery_seconds_max": max(seconds, default=None),
        }
    return rows


def _unplanned(run: Run) -> list[str]:
    """Deaths beyond those that faults have caused."""
    expected = [one.planned.target for one in run.outcomes if one.planned.kind.startswith(("kill-", "restart-"))]
    found = []
    for death in run.deaths:
        if death.name in expected:
            expected.remove(death.name)
        else:
            found.append(str(death))
    return found


def _examples(run: Run) -> dict[str, Any]:
    """The coordinator's count of repeated ones, beside the steps that all incarnations of workers have made."""
    return {
        "repeated": run.result["examples_repeated"],
        "counted": run.result["examples"],
        "steps_counted": run.result["steps"],
        "steps_in_accounts": sum(run.noted.steps.values()),
    }


def _throughput(chaos: Run, quiet: Run | None) -> dict[str, Any]:
    own = chaos.throughput
    figures: dict[str, Any] = {
        "unit": "acknowledged updates a second",
        "in_all": round(own.a_second, 2),
        "outside_recovery": round(own.outside_a_second, 2),
        "seconds": round(own.seconds, 1),
        "outside_recovery_seconds": round(own.outside_seconds, 1),
        "quiet": None,
        "kept_in_all": None,
        "kept_outside_recovery": None,
    }
    if quiet is not None and quiet.throughput.a_second:
        before = quiet.throughput.a_second
        figures |= {
            "quiet": round(before, 2),
            "kept_in_all": round(own.a_second / before, 4),
            "kept_outside_recovery": round(own.outside_a_second / before, 4) if own.outside_seconds else None,
        }
    return figures


def _loss(chaos: Run, quiet: Run | None, why_not: str) -> dict[str, Any]:
    own = chaos.result["valid"]["loss"]
    figures: dict[str, Any] = {
        "split": "valid",
        "chaos": own,
        "quiet": None,
        "change": None,
        "why_not_compared": why_not,
    }
    if quiet is not None:
        figures["quiet"] = quiet.result["valid"]["loss"]
        if not why_not and own is not None and figures["quiet"]:
            figures["change"] = own / figures["quiet"] - 1
    return figures


def lines(report: Mapping[str, Any]) -> list[str]:
    """For people, the verdict last."""
    updates, speed, loss = report["updates"], report["throughput"], report["loss"]
    text = [
        f"seed {report['seed']}: {report['fired']} of {report['declared']['faults']} faults fired and are proven, "
        f"{report['declared']['stalls']} of them stall a shard; the job is {report['state']}",
        *(
            f"  {kind:<24} {row['fired']:>3} of {row['planned']:<3} recovery: "
            f"{_seconds(row['recovery_seconds_median'])} median, {_seconds(row['recovery_seconds_max'])} at most"
            for kind, row in report["by_kind"].items()
        ),
        f"updates: {updates['acknowledged']:,} acknowledged, {updates['applied']:,} applied, "
        f"{updates['lost']} lost, {updates['doubled']} doubled",
        f"examples: {report['examples']['repeated']:,} repeated, of {report['examples']['counted']:,.0f}; "
        f"steps: {report['examples']['steps_counted']:,} counted, {report['examples']['steps_in_accounts']:,} made",
        f"throughput: {speed['in_all']:,.1f} updates/s in all{_share(speed['kept_in_all'], KEPT_IN_ALL)}, "
        f"{speed['outside_recovery']:,.1f} outside recovery{_share(speed['kept_outside_recovery'], KEPT_OUTSIDE)}; "
        f"restarts cost {report['restart_cpu_seconds']:.1f} s of processor time",
        _loss_line(loss),
    ]
    text += [f"FAILED: {failure}" for failure in report["failures"]]
    return text if report["failures"] else [*text, "no update was lost or doubled, and every fault is proven"]


def _seconds(value: float | None) -> str:
    return "    -  " if value is None else f"{value:5.1f} s"


def _share(kept: float | None, wanted: float) -> str:
    if kept is None:
        return ""
    return f" ({kept:.1%} of the quiet run, {'at least' if kept >= wanted else 'LESS THAN'} {wanted:.0%})"


def _loss_line(loss: Mapping[str, Any]) -> str:
    own = "-" if loss["chaos"] is None else f"{loss['chaos']:.4f}"
    if loss["change"] is None:
        return f"final validation loss: {own}; not compared: {loss['why_not_compared'] or 'there is none'}"
    word = "within" if loss["change"] <= MOST_LOSS_CHANGE else "NOT WITHIN"
    quiet, change = f"{loss['quiet']:.4f}", f"{loss['change']:+.2%}"
    return f"final validation loss: {own}, quiet {quiet} ({change}, {word} {MOST_LOSS_CHANGE:.0%})"
