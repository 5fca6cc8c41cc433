"""Train a byte-level language model on real text, on one process or, under torchrun, on several.

    torchrun --standalone --nproc-per-node 2 launch/train.py

trains on the source files of Python's standard library, sharded with FSDP2, with SM3, which makes the updates of
matrices orthogonal. `--help` lists the options.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout works without being installed

from launch.job import baselines, capacity, corpus, recipe
from launch.job.alone import alone
from launch.job.batches import IGNORED, Batches, Passage, check_length
from launch.job.checkpointing import Checkpoints
from launch.job.command_line import parse
from launch.job.folder import CHECKPOINTS, CONFIG, METRICS, PICTURE, Folder
from launch.job.identity import identify
from launch.job.leaving import leave, stop_agent
from launch.job.model import GPT, PRESETS, cross_entropy
from launch.job.options import Options
from launch.job.parallel import clip, parallelize, reduce_gradients, strategy
from launch.job.report import Bar, Stopwatch, most_allocated, table
from launch.job.start import Start
from launch.job.stopping import say_stopped
from launch.job.world import UserError, World, join
from sm3_dist.checkpoint import TrainState
from sm3_dist.planner.tables import size


def main(arguments: list[str]) -> int:
    """Run the command line and return the exit status."""
    with join() as world, ExitStack() as held:
        try:
            options = parse(arguments)
            world.agreed(lambda: held.enter_context(alone(options.out if world.leads else None)))
            run = Run(options, world, Console(quiet=not world.leads))
            run.learn()
            run.conclude(run.judge())
        except UserError as error:
            line = f"error: {error}"
            Console(stderr=True, quiet=not world.leads, soft_wrap=True).print(line, markup=False, highlight=False)
            stop_agent(line, world.local_rank)
            return 2
    return 0


class Run:
    """One training run: everything that it needs, ready to go.

    Args:
        options: what to do.
        world: the processes that do it together.
        console: where to tell about it; quiet on all ranks but the first.

    Raises:
        UserError: on every rank. Whatever can be found wrong is found here, before anything is written.
    """

    def __init__(self, options: Options, world: World, console: Console) -> None:
        self.options, self.world, self.console = options, world, console
        self.say = partial(console.print, markup=False, highlight=False, soft_wrap=True)
        self.settings = recipe.settings(options)
        self.device = world.agreed(lambda: world.device(options.device))
        self.text = world.agreed(lambda: corpus.load(options.data, options.held_out_bytes))
        world.same("the corpus", self.text.digest)
        for text, purpose in ((self.text.train, "learn from"), (self.text.held_out, "hold out")):
            check_length(text, options.seq_len, purpose)
        self.start = Start.of(options.start_from, world) if options.start_from is not None else None

        torch.manual_seed(options.seed)
        with torch.device("meta"):
            gpt = GPT(PRESETS[options.model], options.seq_len).to(getattr(torch, options.dtype))
        self.parameters = sum(parameter.numel() for parameter in gpt.parameters())
        self.introduce()
        world.agreed(lambda: capacity.check(options, self.settings, world, self.device, self.parameters))
        self.model, share, shard_over, oss = parallelize(gpt, world, self.device, options)
        self.batches = Batches(self.text.train, options.batch_size, options.seq_len, options.seed, share)
        self.passage = Passage(self.text.held_out, options.batch_size, options.seq_len, share)
        self.optimizer = recipe.build(self.model, self.settings, options, shard_over, oss)
        self.model = reduce_gradients(self.model, self.optimizer)
        if options.step_in_backward:
            recipe.use_in_backward(self.model, self.optimizer, options)
        self.schedule = recipe.schedule(self.optimizer, options)
        self.state = TrainState(self.model, self.optimizer, self.schedule)
        self.checkpoints = self.keep_checkpoints()
        if options.resume == "auto":
            self.checkpoints.resume()
        if self.start is not None and self.state.step == 0:
            self.start.load(self.model)
        self.folder = world.agreed(self.claim_folder)
        self.whole_steps, self.optimizer_steps = Stopwatch(self.device), Stopwatch(self.device)

    def introduce(self) -> None:
        """Say what is about to happen, before anything takes time or memory."""
        options, text = self.options, self.text
        source = options.data or f"the source files of Python's standard library, in {corpus.standard_library()}"
        self.say(
            f"text: {source}: {len(text.train):,} bytes of {len(text.train_files):,} file(s) to learn from, "
            f"{len(text.held_out):,} held out"
        )
        self.say(
            f"{recipe.title(options)} trains {options.model}, {self.parameters:,} parameters: "
            f"{strategy(options, self.world)}, {self.world.size} process(es) on {self.device.type}"
        )
        if self.start is not None:
            self.say(f"its weights are those of {self.start.path}")

    def claim_folder(self) -> Folder:
        """Claim `--out` on rank 0; the others write nothing."""
        if self.options.out is None or not self.world.leads:
            return Folder()
        if self.options.resume == "auto":
            folder = Folder.go_on(self.options.out, self.state.step, self.say)
        else:
            folder = Folder.claim(self.options.out, self.options.overwrite, self.say)
        folder.configure(
            self.options.as_json()
            | asdict(self.settings)
            | {"recipe": recipe.which(self.options), "parallel": strategy(self.options, self.world)}
            | {"world_size": self.world.size}
            | {"parameters": self.parameters, "corpus": self.text.digest}
        )
        return folder

    def keep_checkpoints(self) -> Checkpoints:
        """What saves the run and brings it back."""
        path = self.options.out / CHECKPOINTS if self.options.out is not None else None
        start = self.start.digest if self.start is not None else None
        identity = identify(self.options, self.settings, self.text.digest, start)
        return Checkpoints(path, self.state, self.world, identity, self.options.keep, self.say)

    def learn(self) -> None:
        """Take all the steps."""
        losses: list[Tensor] = []
        with Bar(self.console, self.options.steps) as bar:
            for step in range(self.state.step, self.options.steps):
                with self.whole_steps.running():
                    losses.append(self.take_step(*self.batches[step]))
                if (step + 1) % self.options.log_every == 0 or step + 1 == self.options.steps:
                    record = self.record(step + 1, losses)
                    self.folder.log(record)
                    bar.show(**record)
                    losses.clear()
                self.schedule.step()
                self.state.step = step + 1
                every = self.options.checkpoint_every
                if every is not None and (step + 1) % every == 0:
                    self.save()
        if self.options.checkpoint_every is not None:
            self.save()
            self.checkpoints.finish()

    def save(self) -> None:
        """Save a checkpoint, unless the weights have come to nothing: older ones are removed for it.

        Raises:
            UserError: on every rank, if they have.
        """
        local = (each.to_local() if isinstance(each, DTensor) else each for each in self.model.parameters())
        bad = sum(int((~each.detach().isfinite()).sum()) for each in local)
        if self.world.sum(torch.tensor(bad)):
            self.come_to_nothing("the weights are not finite", self.state.step)
        self.checkpoints.save()

    def come_to_nothing(self, why: str, step: int) -> NoReturn:
        """End a run that is not worth going on with. The last checkpoint that was good is written to its end."""
        self.checkpoints.finish()
        raise UserError(f"{why} after step {step}; pass a lower --lr than {self.settings.lr}")

    def take_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Learn from one batch; return its loss on this rank."""
        loss = cross_entropy(self.model(inputs.to(self.device)), targets.to(self.device))
        loss.backward()
        if math.isfinite(self.options.clip_norm):
            clip(self.model, self.optimizer, self.options.clip_norm)
        with self.optimizer_steps.running():
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def record(self, step: int, losses: list[Tensor]) -> dict[str, Any]:
        """Return what there is to say after ``step`` steps, of which the last had these ``losses`` on this rank.

        Raises:
            UserError: on every rank, if training has come to nothing.
        """
        loss = self.world.sum(torch.stack(losses).mean()).item() / self.world.size
        if not math.isfinite(loss):
            self.come_to_nothing(f"the loss is {loss}", step)
        seconds = sum(self.whole_steps.seconds[-len(losses) :])
        return {
            "step": step,
            "train_bits_per_byte": loss / math.log(2),
            "lr": float(self.schedule.get_last_lr()[0]),
            "tokens_per_second": len(losses) * self.options.batch_size * self.options.seq_len / seconds,
        }

    @torch.no_grad()
    def judge(self) -> float:
        """Return the mean loss, in nats per byte, on all of the held-out bytes.

        Raises:
            UserError: on every rank, if training has come to nothing.
        """
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.device)  # nats, bytes
        self.console.print(f"judging on the {len(self.text.held_out):,} bytes held out", highlight=False)
        with Bar(self.console, len(self.passage), "judging") as bar:
            for inputs, targets in self.passage:
                targets = targets.to(self.device)
                total[0] += cross_entropy(self.model(inputs.to(self.device)), targets, reduction="sum")
                total[1] += (targets != IGNORED).sum()
                bar.advance()
        nats, count = self.world.sum(total).unbind()
        self.model.train()
        loss = float(nats / count)
        if not math.isfinite(loss):
            self.come_to_nothing(f"the validation loss is {loss}", self.state.step)
        return loss

    def conclude(self, loss: float) -> dict[str, Any]:
        """Report the validation loss, in nats per byte, with what there is to compare it to.

        Raises:
            UserError: on every rank, once all is said, if something of the run could not be written.
        """
        bits = loss / math.log(2)
        compared = baselines.all_of(self.text.train, self.text.held_out)
        state = max(self.world.gather(recipe.state_bytes(self.optimizer)))
        adamw = max(self.world.gather(recipe.adamw_bytes(self.optimizer)))
        step_ms, optimizer_ms = self.whole_steps.median_ms(), self.optimizer_steps.median_ms()
        figures = {
            "step": self.options.steps,
            "seconds": sum(self.whole_steps.seconds),
            "validation_loss": loss,
            "validation_bits_per_byte": bits,
            "baselines": compared,
            "state_bytes_per_rank": state,
            "adamw_bytes_per_rank": adamw,
            "step_ms": step_ms,
            "optimizer_ms": optimizer_ms,
        }
        most = max(self.world.gather(most_allocated(self.device) or 0))
        if most:
            figures["most_allocated_bytes_per_rank"] = most
        self.folder.log(figures)
        rows = {"validation loss": f"{loss:.3f} nats per byte", "validation": f"{bits:.3f} bits per byte"}
        rows |= {f"  {name}": f"{value:.3f} bits per byte" for name, value in compared.items()}
        rows |= {"optimizer state per rank": size(state), "  AdamW would hold": size(adamw)}
        if step_ms is not None and optimizer_ms is not None:  # a run resumed after its last step takes none
            after = ", after backward" if self.options.step_in_backward else ""
            rows |= {"time per step": f"{step_ms:.1f} ms", f"  in the optimizer{after}": f"{optimizer_ms:.1f} ms"}
        if most:
            rows["most allocated per rank"] = f"{size(most)}, {most / self.parameters:.2f} bytes per parameter"
        rows |= {"time of all steps": f"{figures['seconds']:.0f} s"}
        self.console.print(table(f"{recipe.title(self.options)} after {self.options.steps} steps", rows))
        if self.options.checkpoint_every is not None:
            self.checkpoints.close()
        self.world.agreed(lambda: self.folder.finish(bits, compared))
        out = self.options.out
        kept = f"{CONFIG}, {METRICS} and {PICTURE}"
        self.say(f"{kept} are in {out}" if out else f"pass --out DIRECTORY to get {kept}")
        return figures


if __name__ == "__main__":
    try:
        status = main(sys.argv[1:])
    except KeyboardInterrupt:  # ranks are not together any more: each leaves at once
        status = say_stopped(signal.SIGINT) if os.environ.get("RANK", "0") == "0" else 1
    leave(status)
