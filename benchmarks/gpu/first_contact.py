"""What to run in the first half hour with a GPU: does each thing work there, how fast, at which share of the card.

    PYTHONPATH=.:benchmarks python benchmarks/gpu/first_contact.py --out contact.json     # one H100 or H200, 30 minutes
    PYTHONPATH=.:benchmarks python benchmarks/gpu/first_contact.py --tiny                 # all of it on a CPU
    ... first_contact.py --parts card collectives embedding step lora mllm cached         # some parts, ten minutes

PyTorch, transformers, pydantic, PyYAML and pyarrow must be there. A part that needs more (Ray, DeepSpeed, vLLM) is
skipped, with its reason, where that is missing. Every part runs in a process of its own under a time limit: one that
fails or hangs costs the others nothing. Weights are random, since neither speed nor memory depends on their values.

Shares are of the rate that this card reaches in the same run at a bfloat16 product of 8192 x 8192 x 8192, and of the
maker's rate for dense bfloat16. Operations are counted by formula (_flops.py); padding is no work. The records are
written after each part, for the machine may be taken away.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent


class Part(NamedTuple):
    """A part of the run."""

    module: str  # file beside this one; its function has the part's name
    needs: tuple[str, ...]  # modules beyond PyTorch and transformers
    seconds: int  # limit on a GPU
    about: str


# In the order of what a later one would not need: the first minutes answer the most.
PARTS = {
    "card": Part("_contact_torch", (), 60, "the card itself"),
    "collectives": Part("_contact_torch", (), 90, "what ranks pass to each other"),
    "embedding": Part("_contact_torch", (), 120, "embedding, bare loop"),
    "step": Part("_contact_torch", (), 300, "training step with float32 masters"),
    "lora": Part("_contact_torch", ("peft",), 120, "training step with LoRA"),
    "cached": Part("_contact_torch", (), 180, "gradient caching"),
    "mllm": Part("_contact_torch", (), 120, "a multimodal LLM as embedder"),
    "pipeline": Part("_contact_jobs", ("pyarrow", "PIL"), 420, "bulk embedding from Parquet"),
    "training": Part("_contact_jobs", ("ray", "deepspeed", "pyarrow", "psutil"), 420, "Ray Train and ZeRO-3"),
    "offload": Part("_contact_jobs", ("deepspeed",), 180, "DeepSpeed's optimizer on the CPU"),
    "vllm": Part("_contact_jobs", ("vllm",), 240, "vLLM"),
}
TINY_SECONDS = 240


def run_part(name: str, tiny: bool, file: Path) -> None:
    """Run one part in this process; its records become lines of ``file`` as soon as they are there."""
    import torch

    if tiny:
        torch.set_num_threads(1)  # two spin for each other where another process needs a core
    module = importlib.import_module(PARTS[name].module)
    with open(file, "a", encoding="utf-8") as lines:
        for record in getattr(module, name)(tiny):
            print(json.dumps({"part": name, **record._asdict()}), file=lines, flush=True)


def run_apart(name: str, tiny: bool, log: Path) -> list[dict[str, Any]]:
    """The records of one part, run in a process of its own; the last one says why it was skipped or stopped."""
    part = PARTS[name]
    missing = [one for one in part.needs if importlib.util.find_spec(one) is None]
    if missing:
        return [_remark(name, f"skipped: {', '.join(missing)} not installed")]
    limit = TINY_SECONDS if tiny else part.seconds
    with tempfile.TemporaryDirectory() as directory, open(log, "w", encoding="utf-8") as output:
        file = Path(directory) / "records"
        command = [sys.executable, __file__, "--run", name, "--file", str(file), *(["--tiny"] if tiny else [])]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            reason = "" if process.wait(limit) == 0 else f"failed: {_last_line(log)} ({log})"
        except subprocess.TimeoutExpired:
            reason = f"stopped after {limit} s ({log})"
        finally:
            _end(process)
        records = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [*records, *([_remark(name, reason)] if reason else [])]


def _end(process: subprocess.Popen) -> None:
    """End the part's whole process group; what Ray started in it has groups of its own, and ends with its driver."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _remark(name: str, note: str) -> dict[str, Any]:
    return {"part": name, "what": PARTS[name].about, "note": note}


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "no output"


def with_shares(records: list[dict[str, Any]], nominal: float | None, on_cpu: bool = False) -> list[dict[str, Any]]:
    """The records with their shares of the measured product and of the maker's rate, and whether goals are met.

    Args:
        nominal: the maker's rate in FLOP/s; None where it is not known.
        on_cpu: then no goal holds.
    """
    measured = next((one["flops"] for one in records if one["part"] == "card" and one.get("flops")), None)
    done = []
    for record in records:
        flops, goal = record.get("flops"), record.get("goal")
        share = flops / measured if flops and measured else None
        of_nominal = flops / nominal if flops and nominal else None
        held = None if goal is None or share is None or on_cpu else share >= goal
        done.append({**record, "of_product": share, "of_nominal": of_nominal, "held": held})
    return done


def table(records: list[dict[str, Any]]) -> str:
    """One line a record."""
    lines = [f"{'part':12s}{'what':58s}{'value':>20s}{'product':>9s}{'nominal':>9s}{'GiB':>7s}  remark"]
    for one in records:
        value = "" if one.get("value") is None else f"{one['value']:.4g} {one['unit']}"
        shares = [f"{one[key]:.1%}" if one.get(key) else "" for key in ("of_product", "of_nominal")]
        peak = f"{one['peak_gib']:.1f}" if one.get("peak_gib") else ""
        goal = f"goal {one['goal']:.0%}: {'held' if one['held'] else 'missed'}" if one.get("held") is not None else ""
        remark = "; ".join(text for text in (goal, one.get("note", "")) if text)
        figures = f"{value:>20s}{shares[0]:>9s}{shares[1]:>9s}{peak:>7s}"
        lines.append(f"{one['part']:12s}{one['what']:58s}{figures}  {remark}".rstrip())
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny networks on the CPU, to see that all of it runs")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="by default all")
    parser.add_argument("--out", type=Path, default=Path("first_contact.json"), help="file of the records")
    parser.add_argument("--run", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        return run_part(arguments.run, arguments.tiny, arguments.file)
    import torch
    from embedder import NOMINAL

    if not arguments.tiny and not torch.cuda.is_available():
        parser.error("there is no GPU here; --tiny runs the same on the CPU")
    name = "CPU" if arguments.tiny else torch.cuda.get_device_name()
    nominal = next((rate for known, rate in NOMINAL.items() if known in name), None)
    print(f"{name}, {os.cpu_count()} CPUs, torch {torch.__version__}", flush=True)
    records: list[dict[str, Any]] = []
    parts = ["card", *(one for one in arguments.parts if one != "card")]
    for part in parts:
        started = time.monotonic()
        records += run_apart(part, arguments.tiny, arguments.out.with_suffix(f".{part}.log").absolute())
        print(f"  {part}: {time.monotonic() - started:.0f} s", flush=True)
        shared = with_shares(records, nominal, arguments.tiny)
        arguments.out.write_text(json.dumps({"machine": name, "torch": torch.__version__, "records": shared}, indent=1))
    print(table(shared))


if __name__ == "__main__":
    main()
