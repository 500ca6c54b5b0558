"""A model measured in a process of its own, so that nothing else is in its resident size.

    parent: job -> file        child: file -> model, twin -> measure -> JSON

The child finds modules where the parent does, and uses as many threads.
"""

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nmkern.memory import sources
from nmkern.memory.measuring import OURS, Footprint, measure, twin_of
from nmkern.memory.meters import ResidentMeter
from nmkern.memory.tasks import task_curve
from nmkern.nn import ModulatedLinear

_START = "import sys; sys.path[:] = {path!r}; from nmkern.memory.process import child; child({folder!r})"


def measure_apart(
    model: "tuple[nn.Module, tuple[Tensor, ...]] | sources.Source", variant: str, optimizer: str
) -> Footprint:
    """``measure`` of a variant in a new process. Raises as ``footprint`` does."""
    return Footprint.from_dict(_run(model, variant=variant, optimizer=optimizer))


def curve_apart(model: "sources.Source", counts: list[int]) -> dict[str, Any]:
    """``task_curve`` in a new process."""
    return _run(model, counts=counts)


def _run(model: Any, **job: Any) -> dict[str, Any]:
    for module in model[0].modules() if isinstance(model, tuple) else ():
        if type(module).__module__ == "__main__":
            raise ValueError(
                f"model: {type(module).__name__} is defined in __main__, where a process of its own cannot "
                "find it: expected a class of a module, or isolated=False"
            )
    with tempfile.TemporaryDirectory() as folder:
        try:
            torch.save(model, Path(folder, "model.pt"))
        except Exception as error:  # whatever pickle says of whatever the model holds
            raise ValueError(f"model: expected one that pickle can save, got {error!r}") from error
        job["threads"] = torch.get_num_threads()
        job["device"] = model.device if isinstance(model, sources.Source) else str(model[1][0].device)
        Path(folder, "job.json").write_text(json.dumps(job))
        start = _START.format(path=[str(each) for each in sys.path], folder=folder)
        done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True)
        answer = Path(folder, "answer.json")
        if done.returncode != 0 or not answer.exists():
            last = " ".join(done.stderr.splitlines()[-1:])
            raise RuntimeError(f"the measuring process ended with {done.returncode}: {last}")
        return json.loads(answer.read_text())


def child(folder: str) -> None:
    """What the new process does with the job in ``folder``."""
    job = json.loads(Path(folder, "job.json").read_text())
    torch.set_num_threads(job["threads"])
    _load_what_is_loaded_once(job["device"])
    resident = ResidentMeter()
    before = resident.size()
    given = torch.load(Path(folder, "model.pt"), weights_only=False)
    model, inputs = given.build() if isinstance(given, sources.Source) else given
    del given
    if "counts" in job:
        answer: dict[str, Any] = task_curve(model, job["counts"])
    else:
        if job["variant"] != OURS:
            model = twin_of(model, job["variant"])
        after = resident.size()
        answer = asdict(measure(model, inputs, job["optimizer"], resident))
        if before is not None and after is not None:
            answer["resident"] = after - before
    Path(folder, "answer.json").write_text(json.dumps(answer))


def _load_what_is_loaded_once(device: str) -> None:
    """The native library, autograd's threads and the profiler, which are no part of a model's footprint.

    On a GPU also what CUDA keeps on the host for a process that uses it.
    """
    layers = nn.Sequential(ModulatedLinear(32, 32, seed=1), nn.Linear(32, 1)).to(device)
    measure(layers, (torch.ones(4, 32, device=device),), "adam")
