"""What the training job reads: the split of the files, the batches, and the baselines."""

from __future__ import annotations

import bz2
import math
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from launch.job.baselines import START, bz2_bits, order_0, order_1
from launch.job.batches import IGNORED, Batches, Passage, Share
from launch.job.corpus import HELD_OUT, Corpus, load
from launch.job.world import UserError


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Forty different files, some in subdirectories, and a copy of one of them."""
    root = tmp_path / "texts"
    for number in range(40):
        file = root / f"part-{number % 3}" / f"{number}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"This is text number {number}.\n" * (10 + number))
    shutil.copy(root / "part-0" / "3.txt", root / "copy.txt")
    return root


def text_of(files: tuple[Path, ...]) -> bytes:
    return b"".join(file.read_bytes() for file in files)


def test_whole_files_are_held_out(directory: Path) -> None:
    corpus = load(directory)
    assert bytes(corpus.train.tolist()) == text_of(corpus.train_files)
    assert bytes(corpus.held_out.tolist()) == text_of(corpus.held_out_files)
    share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
    assert HELD_OUT <= share < 2 * HELD_OUT


def test_no_text_is_on_both_sides_and_copies_count_once(directory: Path) -> None:
    corpus = load(directory)
    texts = [file.read_bytes() for file in corpus.train_files + corpus.held_out_files]
    assert len(texts) == len(set(texts)) == 40


def test_the_split_depends_on_the_contents_alone(directory: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for number, file in enumerate(sorted(directory.rglob("*.txt"), reverse=True)):
        shutil.copy(file, elsewhere / f"renamed-{number}.txt")
    assert load(elsewhere).digest == load(directory).digest


def test_hidden_and_empty_files_are_passed_over(directory: Path) -> None:
    digest = load(directory).digest
    (directory / ".hidden").write_text("hidden")
    (directory / ".git").mkdir()
    (directory / ".git" / "config").write_text("hidden too")
    (directory / "empty.txt").touch()
    assert load(directory).digest == digest
    (directory / "seen.txt").write_text("seen")
    assert load(directory).digest != digest


def test_the_end_of_a_single_file_is_held_out(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_bytes(bytes(range(200)))
    corpus = load(file)
    assert corpus.train.tolist() == list(range(190))
    assert corpus.held_out.tolist() == list(range(190, 200))


def test_the_standard_library_is_the_default() -> None:
    corpus = load()
    names = [file.name for file in corpus.train_files + corpus.held_out_files]
    assert {"argparse.py", "typing.py"} <= set(names)
    assert not any("site-packages" in file.parts or "test" in file.parts for file in corpus.train_files)
    assert not set(corpus.train_files) & set(corpus.held_out_files)
    assert corpus.digest == load().digest
    assert torch.equal(load(held_out_bytes=1000).held_out, corpus.held_out[:1000])


def test_data_that_is_missing_or_too_little_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such file or directory"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="found 0 different files"):
        load(tmp_path)
    (tmp_path / "one").write_text("the same")
    (tmp_path / "two").write_text("the same")
    with pytest.raises(UserError, match="found 1 different files"):
        load(tmp_path)
    (tmp_path / "one").write_text("x")
    with pytest.raises(UserError, match="1 bytes are too few"):
        load(tmp_path / "one")


DATA = torch.randint(256, (1001,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [2, 3, 6])
def test_the_ranks_share_the_batch_of_one_process(count: int) -> None:
    whole = Batches(DATA, batch_size=6, seq_len=16, seed=1)
    shares = [Batches(DATA, batch_size=6, seq_len=16, seed=1, share=Share(rank, count)) for rank in range(count)]
    for step in (0, 1, 1000):
        for which in (0, 1):
            assert torch.equal(whole[step][which], torch.cat([share[step][which] for share in shares]))


def test_batches_are_windows_of_the_text_that_differ_by_step_and_seed() -> None:
    batches = Batches(DATA, batch_size=4, seq_len=16, seed=1)
    windows = {tuple(window) for window in DATA.unfold(0, 17, 1).tolist()}
    inputs, targets = batches[3]
    for before, after in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert (*before, after[-1]) in windows
        assert before[1:] == after[:-1]
    assert torch.equal(inputs, batches[3][0])
    assert not torch.equal(inputs, batches[4][0])
    assert not torch.equal(inputs, Batches(DATA, batch_size=4, seq_len=16, seed=2)[3][0])


def test_every_window_can_be_drawn() -> None:
    batches = Batches(DATA[:20], batch_size=64, seq_len=16, seed=0)
    assert {tuple(row) for row in batches[0][0].tolist()} == {tuple(row) for row in DATA[:19].unfold(0, 16, 1).tolist()}


@pytest.mark.parametrize("length", [9, 10, 64, 65, 66, 1001])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_passage_asks_for_every_byte_once(length: int, count: int) -> None:
    shares = [list(Passage(DATA[:length], batch_size=8, seq_len=8, share=Share(rank, count))) for rank in range(count)]
    asked = []
    for batch in zip(*shares, strict=True):  # strict: every rank has equally many batches
        inputs, targets = (torch.cat([each[which] for each in batch]).flatten() for which in (0, 1))
        asked += targets[targets != IGNORED].tolist()
        assert torch.equal(inputs[1:][targets[1:] != IGNORED], targets[:-1][targets[1:] != IGNORED])
    assert asked == DATA[1:length].tolist()


def test_batches_that_cannot_be_made_are_refused() -> None:
    with pytest.raises(UserError, match="--batch-size 6 cannot be shared evenly by 4"):
        Batches(DATA, batch_size=6, seq_len=8, seed=0, share=Share(0, 4))
    assert len(Batches(DATA, batch_size=1, seq_len=1000, seed=0)[0][0]) == 1
    assert len(list(Passage(DATA, batch_size=1, seq_len=1000))) == 1
    with pytest.raises(UserError, match="--seq-len 1001 needs at least 1002 bytes to learn from, and there are 1001"):
        Batches(DATA, batch_size=1, seq_len=1001, seed=0)
    with pytest.raises(UserError, match="--seq-len 1001 needs at least 1002 bytes to hold out"):
        Passage(DATA, batch_size=1, seq_len=1001)


def counted(train: bytes, held_out: bytes, context: int) -> float:
    """Cross-entropy in bits per byte, by counting in plain Python."""
    seen = Counter(train[i - context : i + 1] for i in range(context, len(train)))
    before = Counter(train[i - context : i] for i in range(context, len(train)))
    bits = [
        -math.log2((seen[held_out[i - context : i + 1]] + START) / (before[held_out[i - context : i]] + 256 * START))
        for i in range(1, len(held_out))
    ]
    return sum(bits) / len(bits)


def test_entropies_agree_with_plain_counting() -> None:
    words = random.Random(0).choices(["to be", "or", "not", "that is", "the question"], k=2000)
    train, held_out = " ".join(words).encode(), " ".join(reversed(words[:200])).replace("to", "two").encode()
    tensors = torch.tensor(list(train), dtype=torch.uint8), torch.tensor(list(held_out), dtype=torch.uint8)
    assert order_0(*tensors) == pytest.approx(counted(train, held_out, 0), rel=1e-5)
    assert order_1(*tensors) == pytest.approx(counted(train, held_out, 1), rel=1e-5)


def test_entropies_of_texts_that_are_known() -> None:
    often = torch.tensor([7, 7, 7, 9] * 25_000, dtype=torch.uint8)
    assert order_0(often, often) == pytest.approx(2 - 0.75 * math.log2(3), abs=1e-3)
    # After 9 comes 7; after 7 comes 9 in one of three cases: 3/4 of the bytes cost the entropy of (1/3, 2/3).
    assert order_1(often, often) == pytest.approx(0.75 * (math.log2(3) - 2 / 3), abs=1e-3)
    everything = torch.arange(256, dtype=torch.uint8).repeat(4)
    assert order_0(everything, everything) == pytest.approx(8, abs=1e-3)


def test_bz2_counts_the_compressed_bytes() -> None:
    text = b"to be or not to be, " * 50
    assert bz2_bits(torch.tensor(list(text), dtype=torch.uint8)) == 8 * len(bz2.compress(text)) / len(text)


def test_a_digest_tells_where_the_text_is_cut() -> None:
    def digest(cut: int) -> str:
        return Corpus(DATA[:cut], DATA[cut:], (), ()).digest

    assert digest(500) != digest(501)
