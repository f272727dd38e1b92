"""Damages copies of a checkpoint: none may load with other values.

    .venv/bin/python tests/checkpoint_damage.py [--flips 1000] [--truncations 300] [--seed 0]

A stage leaves a checkpoint. Random bits of it are flipped, each in a copy of its own, then copies are cut off at random
lengths. Each must be refused, in one line, or load with the values of the whole one: some bits of the container, such
as those of time stamps, say nothing about them.

Exit status 1 if a copy loads with other values.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kill_and_resume import Trainings, say, sha256_of  # noqa: E402

from instaqnas.checkpoint import load_checkpoint  # noqa: E402
from instaqnas.errors import InputError  # noqa: E402

REFUSED, EQUAL, OTHER = "refused", "loaded with the same values", "LOADED WITH OTHER VALUES"


def flipped(content: bytes, bit: int) -> bytes:
    """`content` with one of its bits the other way."""
    byte, place = divmod(bit, 8)
    return content[:byte] + bytes([content[byte] ^ 1 << place]) + content[byte + 1 :]


def outcomes(checkpoint: Path, folder: Path, *, flips: int, truncations: int, seed: int = 0) -> dict[str, Counter[str]]:
    """How many copies, made in `folder`, came to which end, by the kind of damage."""
    content, chance = checkpoint.read_bytes(), random.Random(seed)
    whole = sha256_of(load_checkpoint(checkpoint))
    copies = {
        "bit flips": (flipped(content, chance.randrange(8 * len(content))) for _ in range(flips)),
        "truncations": (content[: chance.randrange(len(content))] for _ in range(truncations)),
    }
    return {kind: Counter(_outcome(folder / "copy.pt", copy, whole) for copy in made) for kind, made in copies.items()}


def _outcome(path: Path, content: bytes, whole: str) -> str:
    path.write_bytes(content)
    try:
        state = load_checkpoint(path)
    except InputError as error:
        assert "\n" not in str(error)
        return REFUSED
    return EQUAL if sha256_of(state) == whole else OTHER


def main() -> None:
    """See the docstring of the file."""
    parser = argparse.ArgumentParser(description="Damage copies of a checkpoint; none may load with other values.")
    parser.add_argument("--flips", type=int, default=1000, help="copies with one bit flipped (1000)")
    parser.add_argument("--truncations", type=int, default=300, help="copies that are cut off (300)")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        trainings = Trainings(folder, pretrain_epochs=1)
        trainings.undisturbed("pretrain_fp32")
        checkpoint = trainings.reference / "pretrain_fp32" / "last.pt"
        say(f"a checkpoint of {checkpoint.stat().st_size:,} bytes")
        found = outcomes(checkpoint, folder, flips=options.flips, truncations=options.truncations, seed=options.seed)
    for kind, counts in found.items():
        say(f"{counts.total():,} {kind}: {', '.join(f'{count:,} {end}' for end, count in counts.most_common())}")
    sys.exit(any(OTHER in counts for counts in found.values()))


if __name__ == "__main__":
    main()
