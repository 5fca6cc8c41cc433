"""The files that start jobs on several machines: what they give to torchrun, and two hosts of which one is lost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.run import parse_args

import launch
from launch.job.command_line import parse

CLUSTER = Path(launch.__file__).parent / "cluster"
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"


def test_the_slurm_script_starts_an_agent_on_each_node(tmp_path: Path) -> None:
    for name, script in {"srun": 'printf "%s\\n" "$@"', "scontrol": "printf 'a1\\na2\\n'"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(CLUSTER.parents[1])}
    environment |= {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7"}
    command = [str(CLUSTER / "slurm.sh"), "--model", "medium", "--out", "runs/one", "--checkpoint-every", "100"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    srun, *arguments = done.stdout.splitlines()
    assert (srun, arguments[0]) == ("--kill-on-bad-exit=1", "torchrun")
    agent = parse_args(arguments[1:])
    assert (agent.nnodes, agent.nproc_per_node, agent.max_restarts) == ("2", "8", 100)
    assert (agent.rdzv_backend, agent.rdzv_endpoint, agent.rdzv_id) == ("c10d", "a1:29400", "7")
    assert agent.training_script == "launch/train.py"
    options = parse(agent.training_script_args)
    assert (options.model, options.checkpoint_every, options.resume) == ("medium", 100, "auto")


def test_the_manifest_says_what_the_slurm_script_says() -> None:
    """Read line by line: there is no YAML among what the tests need."""
    text = (CLUSTER / "pytorchjob.yaml").read_text()
    assert "\t" not in text
    program, script, *arguments = re.findall(
        r"- (\S+)$", text.split("command:")[1].split("resources:")[0], re.MULTILINE
    )
    assert (program, script) == ("torchrun", "launch/train.py")
    options = parse(arguments)
    assert options.checkpoint_every
    assert options.resume == "auto"
    assert SHARED_STORE in text
    assert SHARED_STORE in (CLUSTER / "slurm.sh").read_text()
    assert int(re.findall(r"maxRestarts: (\d+)", text)[0]) == 100


def namespaces() -> bool:
    """Whether this process may make network namespaces."""
    try:
        made = subprocess.run(["ip", "netns", "add", f"trial-{os.getpid()}"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False
    return made and subprocess.run(["ip", "netns", "delete", f"trial-{os.getpid()}"]).returncode == 0


@pytest.mark.exhaustive
@pytest.mark.timeout(600)
def test_a_host_is_lost_and_comes_back(tmp_path: Path) -> None:
    if not namespaces():
        pytest.skip("needs root, Linux and iproute2, for network namespaces")
    options = "--model tiny --steps 60 --batch-size 8 --seq-len 32 --held-out-bytes 3000".split()
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [str(CLUSTER / "two_hosts.sh"), str(tmp_path / "run"), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("--- host 1 is lost", "--- host 1 is back", "resumed from", "sm3 (muon-like) after 60 steps"):
        assert said in done.stdout
