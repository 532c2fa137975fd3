"""What the sequential baselines are trained on.

They may know no more than the ranker. They are trained on the whole sequences of the training users. Of validation and
test users they see what came before the target; of users whose target is not tested, all but the last event. When
targets are split by time, they see no event, of any user, from the first validation target's time on.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal

from notellm2_ray.baselines.ranking.data import read_table
from notellm2_ray.core.workspace import Workspace


def training_data(
    workspace: Workspace, split_by: Literal["users", "time"], *, published: bool
) -> tuple[list[list[str]], list[tuple[list[str], str]]]:
    """What a sequential baseline may be trained on, and the validation examples.

    Args:
        workspace: where the sequences lie.
        split_by: how targets were split (``candidates.split_by``).
        published: hold out the published protocol's test targets instead of the users' last events.

    Returns:
        Training sequences of note ids, and (history, target) of the validation users.
    """
    valid = read_table(workspace.examples("valid"))
    test = read_table(workspace.examples("published" if published else "test"))
    held_out: dict[str, set[str]] = {}
    for table in (valid, test):
        for user, target in zip(
            table.column("user_id").to_pylist(), table.column("target_id").to_pylist(), strict=True
        ):
            held_out.setdefault(user, set()).add(target)
    training = set(read_table(workspace.examples("train")).column("user_id").to_pylist())
    until = min(valid.column("timestamp").to_pylist()) if split_by == "time" and len(valid) else None
    rows = []
    for row in read_table(workspace.sequence_table).to_pylist():
        notes = known_part(row["note_ids"], held_out.get(row["user_id"], set()), trained=row["user_id"] in training)
        rows.append(_before(notes, row["timestamps"], until))
    targets = zip(valid.column("history_ids").to_pylist(), valid.column("target_id").to_pylist(), strict=True)
    return [row for row in rows if row], [(history, target) for history, target in targets if history]


def known_part(notes: list[str], held_out: set[str], *, trained: bool) -> list[str]:
    """The beginning of a sequence that may be learned from.

    Args:
        notes: the sequence, oldest first.
        held_out: the user's validation and test targets. What comes before the first of them is kept; nothing is kept
            if the target is older than the kept sequence.
        trained: for a user without such targets, whether it is a training user, whose whole sequence is kept. The last
            event of any other user is a target that is not tested, and is left out.
    """
    if held_out:
        return notes[: next((at for at, note in enumerate(notes) if note in held_out), 0)]
    return notes if trained or len(notes) == 1 else notes[:-1]


def _before(notes: Sequence[str], timestamps: Sequence[datetime], until: datetime | None) -> list[str]:
    if until is None:
        return list(notes)
    return [note for note, at in zip(notes, timestamps[: len(notes)], strict=True) if at < until]
