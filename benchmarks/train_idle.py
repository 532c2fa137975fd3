"""How long a device waits for its batches in training: with threads, and with readers in other processes.

    python benchmarks/train_idle.py                 # a device 0.7 times as fast as one process reads
    python benchmarks/train_idle.py --speed 181     # a device of 181 notes/s; needs as many cores as that takes

Notes with JPEGs of 640 x 480 pixels and texts are read, decoded, tokenised and collated as in training. The step is
replaced by a device that takes a given time for each note, and leaves the processor alone meanwhile, as a GPU does.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "gpu"))

from _measure import machine
from _training import write_notes

from notellm2_ray.core.note_store import NoteStore
from notellm2_ray.core.settings import ModelSettings
from notellm2_ray.models.embedder.preprocess import NotePreprocessor
from notellm2_ray.models.llm import load_tokenizer
from notellm2_ray.models.packaged import PACKAGED, located
from notellm2_ray.models.vision.pixels import ImageSettings
from notellm2_ray.train.batches import NotePreparer, prefetched
from notellm2_ray.train.history import Stopwatch

GOAL = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speed", type=float, help="of the device, in notes/s")
    parser.add_argument("--readers", type=int, nargs="+", default=[0, 1], help="0: threads alone")
    parser.add_argument("--batch-notes", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        store = Path(directory) / "notes.arrow"
        ids = write_notes(store)
        tokenizer = load_tokenizer(located(PACKAGED, "llm"))
        preprocessor = NotePreprocessor(ModelSettings(prompt_language="en"), tokenizer, ImageSettings(224), 196)
        size = arguments.batch_notes
        batches = [
            [ids[(number * size + row) % len(ids)] for row in range(size)] for number in range(arguments.batches)
        ]

        def run(readers: int, speed: float) -> dict[str, Any]:
            prepare = NotePreparer(NoteStore(store), preprocessor, 4, readers=readers)
            prepare(batches[0])  # starts the processes
            try:
                return {"readers": readers, **_run(prepare, batches, speed)}
            finally:
                prepare.readers.close()

        alone = run(1, 1e9)["notes_per_s"]
        speed = arguments.speed or 0.7 * alone
        print(f"{machine()}: one process reads {alone:.1f} notes/s; the device takes {speed:.1f}")
        rows = [run(readers, speed) for readers in arguments.readers]
        for row in rows:
            what = f"{row['readers']} reader(s)" if row["readers"] else "threads"
            print(f"{what}: {row['notes_per_s']:.1f} notes/s, idle {row['idle']:.1%} (goal: {GOAL:.0%})")
        print(json.dumps({"alone": alone, "speed": speed, "rows": rows}))


def _run(prepare: Callable[[list[str]], Any], batches: list[list[str]], speed: float) -> dict[str, float]:
    stopwatch, began = Stopwatch(len(batches[0])), time.monotonic()
    for _ in stopwatch.waiting(prefetched(prepare, batches, 2)):
        stopwatch.begin()
        time.sleep(len(batches[0]) / speed)
        stopwatch.end()
    notes = len(batches) * len(batches[0])
    return {"notes_per_s": notes / (time.monotonic() - began), "idle": stopwatch.waiting_share}


if __name__ == "__main__":
    main()
