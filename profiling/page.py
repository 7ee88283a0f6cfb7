"""The report's page: a run's recipe and figures in words, and templates/report.html filled in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from opensora_fast.config import VideoDCAEConfig, config_from_dict
from opensora_fast.profiling.charts import Chart, run_charts
from opensora_fast.profiling.clips import Clip, Reconstruction
from opensora_fast.profiling.machine import Machine
from opensora_fast.profiling.page_template import page_template
from opensora_fast.profiling.runs import FIRST_STEPS, LAST_STEPS, Change, Run

NO_FIGURE = "–"
# What a sample of each condition is given beside its text.
CONDITION_WORDS = {
    "t2v": "text alone",
    "i2v_head": "first frame",
    "i2v_tail": "last frame",
    "i2v_loop": "first and last frame",
    "v2v_head": "beginning",
    "v2v_tail": "end",
    "v2v_head_easy": "long beginning",
    "v2v_tail_easy": "long end",
}


@dataclass(frozen=True, kw_only=True)
class RunView:
    """What the template shows of one run."""

    run: Run
    device: str
    facts: list[tuple[str, str]]
    charts: list[Chart]


def render_page(
    *,
    title: str,
    runs: Sequence[Run],
    summary: dict[str, Any],
    reconstructions: Sequence[Reconstruction],
    samples: Sequence[Clip],
    machine: Machine,
) -> str:
    """The page as one HTML document that refers to nothing outside itself. Text from files is escaped."""
    views = [_view(run, machine) for run in runs]
    template = page_template("report.html", figure=figure, percent=percent, duration=duration, setting=setting)
    return template.render(
        title=title,
        views=views,
        on_cpu=any(view.device.startswith("CPU") for view in views),
        few_steps=any(0 < len(run.steps) < FIRST_STEPS + LAST_STEPS for run in runs),
        first_steps=FIRST_STEPS,
        last_steps=LAST_STEPS,
        seconds=summary.get("seconds"),
        psnr=_psnr(summary, runs),
        reconstructions=reconstructions,
        samples=samples,
        machine=machine,
    )


def figure(value: float | None) -> str:
    """Three significant digits, whole numbers from 1,000 on."""
    if value is None:
        return NO_FIGURE
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".")


def percent(value: float | None) -> str:
    """A change with its sign."""
    return NO_FIGURE if value is None else f"{round(value, 1) + 0.0:+.1f}\u00a0%".replace("-", "−")


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [(hours, "h"), (minutes, "min"), (rest, "s")]
    return " ".join(f"{count} {unit}" for count, unit in parts if count) or "0 s"


def setting(value: object) -> str:
    """A recipe's leaf as JSON without the quotes of a plain string."""
    return value if isinstance(value, str) else json.dumps(value)


def _view(run: Run, machine: Machine) -> RunView:
    device = machine.device(run.recipe["loop"]["device"])
    return RunView(run=run, device=device, facts=_facts(run), charts=run_charts(run, device.split(" ")[0]))


def _psnr(summary: dict[str, Any], runs: Sequence[Run]) -> tuple[float, float] | None:
    """PSNR in dB of the reconstructions and of the mean colour: the summary's, or an autoencoder run's last."""
    evaluations = [row for run in runs for row in run.heldout if "psnr" in row]
    source = summary if "psnr" in summary else evaluations[-1] if evaluations else None
    return None if source is None else (source["psnr"], source["psnr_baseline"])


def _facts(run: Run) -> list[tuple[str, str]]:
    recipe = run.recipe
    facts = [("Trains", _model_words(recipe)), ("On", _bucket_words(recipe["data"]["buckets"]))]
    if run.is_diffusion:
        facts.append(("Given", _condition_words(recipe["condition_weights"])))
        facts.append(("Starts from", recipe["init_weights"] or "random weights"))
    psnr = run.heldout_change("psnr")
    if psnr.start is not None:
        baseline = run.heldout[-1]["psnr_baseline"]
        facts.append(("Held-out PSNR", f"{_arrow(psnr)} dB; the mean colour of each clip has {figure(baseline)} dB"))
    if run.skipped:
        numbers = ", ".join(str(row["step"]) for row in run.skipped)
        facts.append(
            ("Skipped", f"{len(run.skipped)} of {run.steps_done} steps, non-finite loss or gradient: {numbers}")
        )
    return facts


def _arrow(change: Change) -> str:
    return " → ".join(figure(value) for value in (change.start, change.end) if value is not None)


def _model_words(recipe: dict[str, Any]) -> str:
    if "model" in recipe:
        model = recipe["model"]
        blocks = f"{model['depth']} double-stream and {model['depth_single_blocks']} single-stream blocks"
        return f"video diffusion transformer, {blocks} of width {model['hidden_size']}"
    config = config_from_dict(VideoDCAEConfig, recipe["autoencoder"]["config"])
    factors = f"{config.temporal_compression} × {config.spatial_compression} × {config.spatial_compression}"
    return f"video autoencoder, {factors} (time × height × width) compression to {config.latent_channels} channels"


def _bucket_words(buckets: dict[str, dict[str, Any]]) -> str:
    words = []
    for resolution, table in buckets.items():
        frames = _span(int(count) for count in table)
        what = "images" if frames == "1" else f"clips of {frames} frames"
        words.append(f"{resolution} {what}, {_span(batch for _, batch in table.values())} per batch")
    return "; ".join(words)


def _span(values: Iterable[int]) -> str:
    """The one value there is, or the smallest and the largest."""
    distinct = sorted(set(values))
    return str(distinct[0]) if len(distinct) == 1 else f"{distinct[0]} to {distinct[-1]}"


def _condition_words(weights: dict[str, float]) -> str:
    drawn = {CONDITION_WORDS[name]: weight for name, weight in weights.items() if weight}
    total = sum(drawn.values())
    return ", ".join(f"{words} {100 * weight / total:.3g}\u00a0%" for words, weight in drawn.items())
