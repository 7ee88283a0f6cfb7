"""`opensora-fast demo`: the whole project at a size that two CPU cores can train in minutes.

Real clips -> autoencoder -> three stages -> a text-to-video and an image-to-video sample -> report.html and
summary.json. Every part is a command that a user could type, printed before it runs; a demo that was stopped goes on
where it stopped when started again.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch

from opensora_fast import cli
from opensora_fast.arguments import Parser
from opensora_fast.checkpoint_folder import load_autoencoder
from opensora_fast.profiling.report import write_report
from opensora_fast.train.demo_data import DemoData, prepare_demo_data
from opensora_fast.train.feeds import fixed_feed
from opensora_fast.train.index import ClipRecord, read_index
from opensora_fast.train.metrics import mean, read_metrics
from opensora_fast.train.recipes import demo_ae
from opensora_fast.video_io import read_clip, resize_crop, write_image, write_video

STAGES = ("stage1", "stage2", "stage3")


def main(argv: list[str]) -> int:
    """Returns 0 when the report is written, 130 when interrupted (run it again to go on)."""
    parser = Parser(prog="opensora-fast demo")
    parser.add_argument("--out", type=Path, help="where runs, samples and the report go (runs/demo)")
    parser.add_argument("--steps", type=int, help="a rehearsal: so many steps a part, in runs/rehearsal")
    options = parser.parse_args(argv)
    out: Path = options.out or Path("runs/demo" if options.steps is None else "runs/rehearsal")
    begun = time.perf_counter()
    data = prepare_demo_data(out / "data")
    common = ["--data.index", str(data.train_index), "--data.heldout_index", str(data.heldout_index)]
    if options.steps is not None:
        common += ["--steps", str(options.steps)]
    code = _run("train", "demo_ae", "--out", f"{out}/ae", *common)
    previous: list[str] = []
    for stage in STAGES:
        if code == 0:
            inputs = ["--autoencoder.weights", f"{out}/ae", *common, *previous]
            code = _run("train", f"demo_{stage}", "--out", f"{out}/{stage}", *inputs)
            previous = ["--init_weights", f"{out}/{stage}"]
    if code:
        return code
    reconstructions = _write_reconstructions(out, data)
    code, samples = _write_samples(out, data)
    if code:
        return code
    summary = summarise(out, samples, time.perf_counter() - begun)
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    report = write_report(out)
    print(f"\nreport           {report}\nsamples          {', '.join(samples)}")
    print(f"reconstructions  {reconstructions}\nsummary          {out}/summary.json")
    print(
        "\nnext: open the report; sample again with\n"
        f"  opensora-fast sample --checkpoint {out}/stage3 --prompt '...' --out clip.mp4\n"
        "or train on clips of your own:\n"
        "  opensora-fast data index FOLDER --out index.parquet\n"
        f"  opensora-fast train demo_stage1 --data.index index.parquet --autoencoder.weights {out}/ae --out runs/mine"
    )
    return 0


def summarise(out: Path, samples: list[str], seconds: float) -> dict:
    """Per stage the mean loss of the first 10 and last 50 steps and the held-out loss at both ends; PSNR in dB."""
    summary: dict = {}
    for stage in STAGES:
        rows = read_metrics(out / stage)
        losses = [row["loss"] for row in rows if row["kind"] == "step"]
        heldout = [row["loss"] for row in rows if row["kind"] == "heldout"]
        summary[stage] = {
            "first10": mean(losses[:10]),
            "last50": mean(losses[-50:]),
            "heldout_start": heldout[0],
            "heldout_end": heldout[-1],
        }
    quality = [row for row in read_metrics(out / "ae") if row["kind"] == "heldout"][-1]
    return summary | {
        "psnr": quality["psnr"],
        "psnr_baseline": quality["psnr_baseline"],
        "samples": samples,
        "seconds": seconds,
    }


def _run(*words: str) -> int:
    print(f"\n$ opensora-fast {' '.join(words)}", flush=True)
    return cli.main(list(words))


def _write_reconstructions(out: Path, data: DemoData) -> Path:
    """Each held-out clip beside what the autoencoder makes of it, as two videos."""
    recipe = demo_ae()
    autoencoder = load_autoencoder({"weights": str(out / "ae")}, torch.device("cpu"), torch.float32)
    folder = out / "reconstructions"
    folder.mkdir(exist_ok=True)
    for batch in fixed_feed(str(data.heldout_index), recipe.data, multiple=autoencoder.compression[1]):
        reconstruction_BCTHW = autoencoder.decode(autoencoder.encode(batch.video_BCTHW)).clamp(-1, 1)
        for number, path in enumerate(batch.paths):
            name, fps = Path(path).stem, batch.fps[number].item()
            write_video(folder / f"{name}-original.mp4", batch.video_BCTHW[number], fps)
            write_video(folder / f"{name}-reconstruction.mp4", reconstruction_BCTHW[number], fps)
    return folder


def _write_samples(out: Path, data: DemoData) -> tuple[int, list[str]]:
    """Exit code and paths of a sample of a training caption and one from the first frame of a held-out clip."""
    folder = out / "samples"
    folder.mkdir(exist_ok=True)
    seen, unseen = _clip(data.train_index, "rabbit"), _clip(data.heldout_index, "rabbit_end")
    first_frame = folder / "first_frame.png"
    write_image(first_frame, resize_crop(read_clip(unseen.path, 0, 1), (unseen.height, unseen.width))[:, 0])
    requests = {
        "text_to_video": ["--prompt", seen.text],
        "image_to_video": ["--prompt", unseen.text, "--image", str(first_frame)],
    }
    code, paths = 0, []
    for name, words in requests.items():
        paths.append(str(folder / f"{name}.mp4"))
        code = code or _run("sample", "--checkpoint", f"{out}/{STAGES[-1]}", *words, "--out", paths[-1])
    return code, paths


def _clip(index: Path, name: str) -> ClipRecord:
    return next(clip for clip in read_index(index) if Path(clip.path).name == f"{name}.mp4")
