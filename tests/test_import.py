"""What ``import sm3_dist`` costs, and where it works."""

import contextlib
import io
import subprocess
import sys
from pathlib import Path

from harness import Pool

import sm3_dist

ROOT = Path(sm3_dist.__file__).parent.parent

WHAT_IS_IMPORTED = """
import sys, torch
before = set(sys.modules)
import sm3_dist
print(*sorted(set(sys.modules) - before))
"""

# torch.distributed.is_available() asks for what a build without it lacks.
WITHOUT_DISTRIBUTED = """
import sys

class Remove:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.distributed":
            c = sys.modules["torch._C"]
            for made in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init"):
                if hasattr(c, made):
                    delattr(c, made)

sys.meta_path.insert(0, Remove())
import torch
assert not torch.distributed.is_available()
"""

STEPS = """
import torch
from sm3_dist import SM3, plan, step_in_backward

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(70, 5), torch.nn.Linear(5, 3))
for make in (SM3, SM3.adamw_like):
    optimizer = make(model.named_parameters(), lr=1e-2, momentum=0.9)
    for _ in range(2):
        model(torch.randn(4, 70)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
with step_in_backward(model, optimizer):
    model(torch.randn(4, 70)).square().sum().backward()
    optimizer.step()
print(plan(model)[0], [weight.view(torch.int32).sum().item() for weight in model.parameters()])
"""


def run(script: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True, cwd=ROOT
    ).stdout


def run_here(script: str) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(script, {})
    return said.getvalue()


def test_it_imports_nothing_of_size() -> None:
    """No DTensor, FSDP, Triton or sympy, which take as long as torch."""
    imported = {name.partition(".")[0] for name in run(WHAT_IS_IMPORTED).split()}
    assert "sm3_dist" in imported
    assert imported - {"sm3_dist"} <= sys.stdlib_module_names


def test_plain_tensors_are_stepped_where_torch_was_built_without_distributed(workers: Pool) -> None:
    assert workers(1).run(run_here, STEPS) == [run(WITHOUT_DISTRIBUTED + STEPS)]
