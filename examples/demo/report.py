"""What the demo shows: a short table and one picture."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any


@dataclass
class Run:
    """The log of one job (or of the pieces of a job that was killed)."""

    steps: list[dict[str, Any]] = field(default_factory=list)
    starts: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Run:
        run = cls()
        for line in path.read_text().splitlines():
            record = json.loads(line)
            kind = record.pop("event")
            if kind == "step":
                run.steps.append(record)
            elif kind == "start":
                run.starts.append(record)
            else:
                run.end = record
        return run

    def rate(self) -> tuple[float, float]:
        """Median samples/s and MB/s between neighbouring steps of one process."""
        pairs = [
            (b["time"] - a["time"], b) for a, b in zip(self.steps, self.steps[1:], strict=False) if b["step"] == a["step"] + 1
        ]
        per_second = [(b["samples"] / dt, b["bytes"] / dt / 1e6) for dt, b in pairs if dt > 0]
        return median(r for r, _ in per_second), median(r for _, r in per_second)


def table(rows: list[tuple[str, str]]) -> str:
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in rows)


def picture(path: Path, straight: Run, killed: Run, *, kill_step: int, resumed_from: int, epoch_steps: int) -> None:
    """The loss of both runs with the kill marked, and the throughput over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, figsize=(9, 6.4), constrained_layout=True)
    top.plot(
        [s["step"] for s in straight.steps], [s["loss"] for s in straight.steps], color="#b8c4d6", lw=5, label="uninterrupted"
    )
    cut = next(
        (i for i in range(1, len(killed.steps)) if killed.steps[i]["step"] <= killed.steps[i - 1]["step"]), len(killed.steps)
    )
    for part, color, label in ((killed.steps[:cut], "#1f6f8b", "until the kill"), (killed.steps[cut:], "#d1495b", "resumed")):
        top.plot([s["step"] for s in part], [s["loss"] for s in part], color=color, lw=1.4, label=label)
    top.axvline(kill_step, color="black", ls="--", lw=1)
    top.annotate("SIGKILL", (kill_step, top.get_ylim()[1] * 0.86), xytext=(5, 0), textcoords="offset points")
    top.axvspan(resumed_from, kill_step, color="#d1495b", alpha=0.12, lw=0)
    for epoch in range(1, straight.steps[-1]["step"] // epoch_steps):
        top.axvline(epoch * epoch_steps, color="#dddddd", lw=1, zorder=0)
    top.set(
        xlabel="step", ylabel="loss", title="Killed in epoch 2, resumed with another worker count: the same run, bit for bit"
    )
    top.legend(frameon=False)

    for run, color, label in ((straight, "#b8c4d6", "uninterrupted"), (killed, "#1f6f8b", "killed and resumed")):
        times, rates = _throughput(run)
        bottom.plot(times, rates, color=color, marker=".", lw=1.5, label=label)
    bottom.set(
        xlabel="seconds since the job's first start",
        ylabel="samples / s",
        title="Throughput over time (the gap is the restart)",
        ylim=(0, None),
    )
    bottom.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _throughput(run: Run, bucket: float = 0.25) -> tuple[list[float], list[float]]:
    origin = run.starts[0]["time"]
    counts: dict[int, int] = {}
    for step in run.steps:
        at = int((step["time"] - origin) / bucket)
        counts[at] = counts.get(at, 0) + step["samples"]
    last = max(counts, default=0)
    return [(i + 0.5) * bucket for i in range(last + 1)], [counts.get(i, 0) / bucket for i in range(last + 1)]
