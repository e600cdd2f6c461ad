"""What a run says of itself: progress bar, metrics.jsonl, TensorBoard, Weights & Biases.

Only the first process writes. Metrics stay on the device until the steps after them have been
dispatched, so that reading them never makes it wait.
"""

from __future__ import annotations

import collections
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import jax

from singer_jax.errors import RunError

# Dense bfloat16 FLOP/s of one device, by the start of its `device_kind` (vendor data sheets).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
}

LOG = logging.getLogger("singer_jax")


def peak_flops() -> float | None:
    """bfloat16 FLOP/s of all devices together; None for a kind that is not listed."""
    kind = jax.devices()[0].device_kind
    known = [name for name in PEAK_FLOPS if kind.startswith(name)]
    return PEAK_FLOPS[max(known, key=len)] * jax.device_count() if known else None


class MetricsWriter:
    """Rows of named numbers into `metrics.jsonl`, TensorBoard and, if asked for, W&B.

    Args:
      folder: the work directory.
      step: rows after this step are dropped: a resumed run writes them again.
      wandb: the run's configuration where Weights & Biases is wanted, else None.
    """

    def __init__(self, folder: Path, step: int = 0, wandb: dict[str, Any] | None = None) -> None:
        self.active = jax.process_index() == 0
        if not self.active:
            return
        from tensorboardX import SummaryWriter

        path = folder / "metrics.jsonl"
        _cut_back(path, step)
        self.file = path.open("a")
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        self.wandb = None
        if wandb is not None:
            import wandb as package

            self.wandb = package.init(dir=str(folder), config=wandb, resume="allow")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """One row; the file holds it when this returns."""
        if not self.active:
            return
        row = {"step": step, "time": time.time()} | metrics
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for name, value in metrics.items():
            self.tensorboard.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(metrics, step=step)

    def close(self) -> None:
        """Flushes and closes everything."""
        if self.active:
            self.file.close()
            self.tensorboard.close()
            if self.wandb:
                self.wandb.finish()


def _cut_back(path: Path, step: int) -> None:
    """Drops rows after `step`, and a last line that a kill left half written."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    partial = path.with_suffix(".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


class Recorder:
    """Follows a training loop: writes its metrics late, shows progress, stops it at a NaN.

    Args:
      writer: for the rows.
      start, steps: where the run stands, and its end.
      every: steps between rows.
      batch_size: global.
      flops: of one step on all devices; None leaves `train/mfu` out.
    """

    LAG = 2  # steps in flight

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        start: int,
        steps: int,
        every: int,
        batch_size: int,
        flops: float | None,
    ) -> None:
        from tqdm.auto import tqdm

        self.writer, self.every, self.batch_size = writer, every, batch_size
        peak = peak_flops()
        self.flops_share = flops / peak if flops and peak else None
        self.steps = steps
        self.pending: collections.deque[tuple[int, dict[str, Any]]] = collections.deque()
        self.bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            disable=not writer.active,
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 30,  # a log file gets a line now and then
        )
        self.row_step, self.row_time = start + 1, time.perf_counter()

    def add(self, step: int, metrics: dict[str, jax.Array | float]) -> None:
        """Takes the metrics of a dispatched step (counted from 1), reads those of an earlier one.

        Raises:
          RunError: the loss or the gradient of a step is not finite.
        """
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self.pending.append((step, metrics))
        while len(self.pending) > self.LAG:
            self._read()

    def flush(self) -> None:
        """Reads what is pending; raises as `add`."""
        while self.pending:
            self._read()

    def _read(self) -> None:
        step, arrays = self.pending.popleft()
        metrics = {f"train/{name}": float(value) for name, value in arrays.items()}
        for name in ("train/loss", "train/grad_norm"):
            if not math.isfinite(metrics[name]):
                raise RunError(
                    f"{name} is {metrics[name]} at step {step}; the last good checkpoint is kept"
                )
        self.bar.update()
        if step > self.row_step and (step % self.every == 0 or step == self.steps):
            now = time.perf_counter()
            steps_per_second = (step - self.row_step) / (now - self.row_time)
            self.row_step, self.row_time = step, now
            metrics["train/images_per_second"] = steps_per_second * self.batch_size
            if self.flops_share:
                metrics["train/mfu"] = steps_per_second * self.flops_share
            self.bar.set_postfix_str(
                f"loss {metrics['train/loss']:.4g}, "
                f"{metrics['train/images_per_second']:.0f} images/s"
            )
            self.writer.write(step, metrics)
        elif step == self.row_step:
            # The first step of this start: its time is mostly that of the start itself.
            self.row_time = time.perf_counter()
            self.writer.write(step, metrics)

    def close(self) -> None:
        """Ends the progress bar."""
        self.bar.close()
