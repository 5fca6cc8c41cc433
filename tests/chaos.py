"""Kill a training run again and again, and see whether it ends where an undisturbed one does.

    python tests/chaos.py --kills 20

Starts `launch/train.py` under `torchrun --max-restarts`, kills a random rank with SIGKILL at random moments (every
other time while a checkpoint is being written), and compares the weights and the optimizer's state at the end with
those of a run that nobody disturbed: they must be the same to the last bit. Takes about 15 s for each kill.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from sm3_dist.checkpoint import load
from sm3_dist.checkpoint.reading import SafeReader

ROOT = Path(__file__).resolve().parents[1]
TRAIN = "--model tiny --batch-size 8 --seq-len 32 --lr 0.01 --held-out-bytes 3000 --device cpu"
SAVE = "--checkpoint-every 2 --resume auto"


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill a training run again and again.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--parallel", default="fsdp2")
    parser.add_argument("--longest", type=float, help="seconds to the next kill, at most")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        text = corpus(folder / "text")
        start = time.perf_counter()
        torchrun(text, folder / "calm", given).check_returncode()
        calm_seconds = time.perf_counter() - start
        if given.longest is None:  # about as long as a start takes, lest the run be over before the last kill
            given.longest = calm_seconds / 6
        print(f"undisturbed: {given.steps} steps in {calm_seconds:.0f} s", flush=True)
        restless(text, folder / "chaos", given)
        wanted, found = (
            tensors(folder / name / "checkpoints" / f"step-{given.steps:08d}") for name in ("calm", "chaos")
        )
    differing = [name for name in wanted if name not in found or not torch.equal(wanted[name], found[name])]
    print(f"{len(wanted)} tensors compared, {len(differing)} differ {differing}")
    return 1 if differing or not wanted or wanted.keys() != found.keys() else 0


def corpus(folder: Path) -> Path:
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"The {number}th file says: {number * number} is a square number.\n" * 40)
    return folder


def command(text: Path, out: Path, given: argparse.Namespace) -> list[str]:
    launcher = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node {given.ranks}"
    restarts = f"--max-restarts {2 * given.kills + 10} {ROOT / 'launch' / 'train.py'}"
    job = f"{TRAIN} --steps {given.steps} {SAVE} --parallel {given.parallel} --data {text} --out {out}"
    return f"{launcher} {restarts} {job}".split()


def torchrun(text: Path, out: Path, given: argparse.Namespace) -> subprocess.CompletedProcess[bytes]:
    with out.with_suffix(".log").open("wb") as log:
        return subprocess.run(command(text, out, given), stdout=log, stderr=log, env=environment())


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def restless(text: Path, out: Path, given: argparse.Namespace) -> None:
    """Run to the end, with so many kills on the way."""
    chance = random.Random(given.seed)
    kills = saving = 0
    with out.with_suffix(".log").open("wb") as log:
        process = subprocess.Popen(command(text, out, given), stdout=log, stderr=log, env=environment())
        killed: set[int] = set()
        try:
            while kills < given.kills and process.poll() is None:
                ranks = wait_for_workers(process, killed, given.ranks)
                if len(ranks) < given.ranks:
                    continue
                during_save = kills % 2 == 0 and wait_for_save(process, out, chance)
                if not during_save:
                    time.sleep(chance.uniform(0, given.longest))
                victim = chance.choice(ranks)
                if process.poll() is None and kill(victim):
                    killed |= set(ranks)
                    kills += 1
                    saving += during_save
                    when = "while saving" if during_save else "at some moment"
                    print(f"kill {kills}: process {victim} {when}, {progress(out)}", flush=True)
            status = process.wait()
        finally:
            process.terminate()  # torchrun ends its workers
            process.wait()
    print(f"{kills} kills, {saving} of them while saving; the run ended with status {status}, {progress(out)}")
    if status or kills < given.kills:
        print(out.with_suffix(".log").read_text(errors="replace")[-3000:])
        raise SystemExit("the run did not survive" if status else "the run ended before all kills were done")


def wait_for_workers(process: subprocess.Popen[bytes], known: set[int], count: int) -> list[int]:
    """The processes that torchrun has started since the last kill."""
    deadline = time.monotonic() + 60
    ranks: list[int] = []
    while process.poll() is None and len(ranks) < count and time.monotonic() < deadline:
        time.sleep(0.05)
        ranks = [pid for pid in children(process.pid) if pid not in known and b"train.py" in command_line(pid)]
    return ranks


def wait_for_save(process: subprocess.Popen[bytes], out: Path, chance: random.Random) -> bool:
    """Wait until a checkpoint is being written, the next or one of those after it, and a moment longer."""
    saves = chance.randint(1, 3)
    before = set((out / "checkpoints").glob("*.partial"))  # left behind by the last kill
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        now = set((out / "checkpoints").glob("*.partial"))
        saves -= len(now - before)
        if saves <= 0:
            time.sleep(chance.uniform(0, 0.05))
            return True
        before = now
        time.sleep(0.001)
    return False


def children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


def progress(out: Path) -> str:
    names = sorted(path.name for path in (out / "checkpoints").glob("step-*"))
    return f"on disk: {', '.join(names) or 'nothing'}"


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Every tensor of the model and of the optimizer's state."""
    described = SafeReader(checkpoint).checked_metadata().state_dict_metadata
    found = {
        name: torch.empty(value.size, dtype=value.properties.dtype)
        for name, value in described.items()
        if isinstance(value, TensorStorageMetadata)
    }
    load(found, checkpoint, no_dist=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
