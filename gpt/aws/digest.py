"""What a job came to, in a few lines: time, money, metrics, where things lie; of a failure the reason, the last lines and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gpt.aws.hints import hint_for
from gpt.aws.pricing import duration
from gpt.aws.records import Submission

_LAST = 15  # lines of the host that failed
_EXIT = re.compile(r",?\s*exit code:? ?(-?\d+)\s*$", re.IGNORECASE)


def exit_code(description: Mapping[str, Any]) -> int:
    """What `gpt` ends with for a job that has ended: 0 done; 2 the user's input was wrong, as the job or SageMaker said; 1 it failed
    otherwise; 143 it was stopped, by the user or at a limit of time."""
    status = description["TrainingJobStatus"]
    if status == "Failed":
        reason = description.get("FailureReason", "")
        match = _EXIT.search(reason)
        return 2 if reason.startswith("ClientError") or (match and match[1] == "2") else 1
    return {"Completed": 0, "Stopped": 143}[status]


def summary(description: Mapping[str, Any], submission: Submission) -> list[str]:
    """Its state, time, cost and metrics, and where its files lie: a line each."""
    machines = f"{submission.instance_count} x {submission.instance_type}{', spot' if submission.spot else ''}"
    lines = [f"{submission.name}: {state_of(description)} ({machines}, {submission.region})"]
    lines += [f"  {text}" for text in (_time(description), _cost(description, submission)) if text]
    metrics = description.get("FinalMetricDataList") or ()
    if metrics:
        lines.append(f"  metrics: {shown_metrics({one['MetricName']: one['Value'] for one in metrics})}")
    lines.append(f"  run:     {submission.checkpoints}/")
    lines.append(f"  output:  {submission.output}/{submission.name}/output/")
    return lines


def state_of(description: Mapping[str, Any]) -> str:
    """`InProgress, Training`, or `Completed`."""
    status, secondary = description["TrainingJobStatus"], description.get("SecondaryStatus", "")
    return status if secondary in ("", status) else f"{status}, {secondary}"


def shown_metrics(metrics: Mapping[str, float]) -> str:
    """`train_loss=3.21 val_loss=3.4`."""
    return " ".join(f"{name}={value:.6g}" for name, value in metrics.items())


def cost_of(description: Mapping[str, Any], submission: Submission) -> float | None:
    """USD for the seconds that are billed so far; None: the price, or how many they are, is not known.

    BillableTimeInSeconds is of one instance, and a spot job's saving is in it (DescribeTrainingJob, SageMaker API reference).
    """
    billed = description.get("BillableTimeInSeconds")
    return None if billed is None or submission.price is None else billed / 3600 * submission.instance_count * submission.price


def _time(description: Mapping[str, Any]) -> str:
    trained, billed = description.get("TrainingTimeInSeconds"), description.get("BillableTimeInSeconds")
    if not trained:
        return ""
    saved = f" ({1 - billed / trained:.0%} saved by spot)" if billed is not None and billed < trained else ""
    return f"time:    {duration(trained)} of training" + (f", {duration(billed)} billed{saved}" if billed is not None else "")


def _cost(description: Mapping[str, Any], submission: Submission) -> str:
    billed = description.get("BillableTimeInSeconds")
    if billed is None:
        return ""
    cost = cost_of(description, submission)
    if cost is None:
        return (
            f"cost:    unknown; no price of {submission.instance_type} was known (launch.prices.{submission.instance_type}=<USD per hour>)"
        )
    kept = (description.get("WarmPoolStatus") or {}).get("ResourceRetainedBillableTimeInSeconds")
    warm = f"; the warm pool's {duration(kept)} come on top" if kept else ""
    of_one = f"{submission.instance_count} x {submission.price:g} USD an hour"
    return f"cost:    about {cost:,.2f} USD ({of_one}; storage and transfer are not in it{warm})"


def digest(
    description: Mapping[str, Any], submission: Submission, run_id: str, tails: Mapping[str, Sequence[str]], metrics: Mapping[str, float]
) -> list[str]:
    """Lines for the end of a job.

    Args:
        description: DescribeTrainingJob, of a job that has ended.
        submission: as it was submitted.
        run_id: of its run.
        tails: host -> the last lines of its log.
        metrics: the last values in the log, for where SageMaker tells none.
    """
    lines = ["", *summary(description, submission)]
    if metrics and not description.get("FinalMetricDataList"):
        lines.insert(-2, f"  metrics: {shown_metrics(metrics)}")
    status = description["TrainingJobStatus"]
    if status == "Completed":
        return [*lines, f"bring the model and the report home: gpt jobs fetch {run_id}"]
    if status == "Failed":
        lines += _failure(description, tails)
    elif hint := hint_for(description.get("SecondaryStatus", "")):
        lines.append(f"hint: {hint}")
    return lines


def _failure(description: Mapping[str, Any], tails: Mapping[str, Sequence[str]]) -> list[str]:
    reason = description.get("FailureReason") or "no reason is given"
    host = failing_host(reason, tails)
    last = [text for text in tails.get(host, ()) if text.strip()][-_LAST:]
    lines = [f"reason: {' '.join(reason.split())}"]
    lines += [f"last lines of {host}:", *(f"  {text}" for text in last)] if last else []
    hint = hint_for(reason) or hint_for("\n".join(last))
    return [*lines, *([f"hint: {hint}"] if hint else [])]


def failing_host(reason: str, tails: Mapping[str, Sequence[str]]) -> str:
    """The host in whose log the reason stands; else one whose last lines hold an error; else the first."""
    said = _EXIT.sub("", re.sub(r"^\w*Error: ", "", reason)).strip().partition("\n")[0].strip()
    hosts = sorted(tails, key=lambda host: int(host.rpartition("-")[2]) if host.rpartition("-")[2].isdigit() else 0)
    for sign in filter(None, (said[:80], r"Traceback", r"gpt: ", r"Error")):
        for host in hosts:
            if any(sign in text for text in tails[host]):
                return host
    return hosts[0] if hosts else ""
