"""How long a step of Sadam and SAMSGrad takes beside AdamW and its kin: time, bandwidth and memory, on CPU or GPU.

Every optimizer takes steps, with fixed random gradients, on the tensors of BERT-base (199, 109.5 million parameters),
of ViT-S/16 (200, 22 million) and of ResNet-50 in channels-last layout (161, 25.6 million), on 2,000 of 1,000 elements,
and on BERT-base's embeddings as they are after 2,000 steps of 2,048 tokens drawn by Zipf's law: many of their rows have
not been seen for long, and have first moments that are subnormal numbers. What we measured is in docs/speed.md.

Run it:
  sadam run step_speed                              everything, in runs/step_speed
  sadam run step_speed --smoke                      a look at everything in seconds, on small tensors
  sadam run step_speed --workloads vit --optimizers SadamW --threads 1
  sadam run step_speed --device cuda --compiled     on a GPU, with what torch.compile makes of a step
  sadam run step_speed --instruction_set avx2       the CPU kernel held to less than this CPU can do

How it is measured. Each optimizer is paired with a baseline: torch's fused AdamW, or fused AMSGrad for SAMSGradW. In
every round both take one step, in random order, on the same parameters and gradients, each with its own state; the
ratio is of the two times of one round, so that what slows the machine down for a while slows both. AdamW fused is also
measured against a second copy of itself, which shows how far chance reaches: the true ratio is 1. beta is "auto" and
settled; no measured step is one at which it is measured anew.

How to read it:
  ratio        Below 1 is faster than the baseline. Differences within the quartiles mean little.
  ms           The median step. On a GPU there are two: by the wall clock, the GPU idle before the step and waited for
               after it; and by CUDA events behind work that keeps the GPU busy meanwhile, which hides the host's part.
  B/param      What a step has to move at least: the parameter read and written, the gradient read, each tensor of the
               state read and written. GB/s is this over the time; passes that an implementation adds are not in it.
  of floor     GB/s as a share of what is measured beside it: on a GPU a copy, on a CPU our kernel with its arithmetic
               left out (without a kernel, an addition in place).
  extra MB     The most memory a step takes above what was there before it.
  first ms     Building the optimizer and its first step, which allocates the state, loads a kernel, or compiles.

Of the peers, bitsandbytes, torchao, flashoptim, heavyball and optimi are measured if they are installed and run on the
device; --compiled adds torch.compile'd steps and the libraries that compile theirs. Measure on an idle machine.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib.metadata
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _workloads import WORKLOADS, Workload
from torch import Tensor

from sadam_integrations import recipe
from sadam_integrations.backends.cpu import bare, force, instruction_set
from sadam_integrations.factory import OPTIMIZERS, create_optimizer, optimizer_class
from sadam_integrations.plots.speed import speed_figure
from sadam_integrations.recipe import RecipeError

WARM_UP = 3
SETTLED = 2.0**20  # as many steps are behind the optimizer: the next at which beta is measured is as many away


@dataclass(frozen=True)
class Contestant:
    """An optimizer as it is measured; its step may be compiled "here", or by its library "itself"."""

    optimizer: str
    arguments: dict[str, Any] = field(default_factory=dict)
    baseline: str = "AdamW fused"
    compiled: str = ""

    @property
    def optional(self) -> bool:
        """Whether it may be missing: of another library, or in need of a compiler."""
        return bool(self.compiled) or not (self.optimizer in OPTIMIZERS or self.optimizer.startswith("torch."))


ADAMW = "torch.optim.AdamW"
CONTESTANTS = {
    "SadamW": Contestant("sadamw"),
    "SAMSGradW": Contestant("samsgradw", baseline="AMSGrad fused"),
    "AdamW fused": Contestant(ADAMW, {"fused": True}),
    "AMSGrad fused": Contestant(ADAMW, {"fused": True, "amsgrad": True}),
    "AdamW foreach": Contestant(ADAMW, {"foreach": True}),
    "AdamW for-loop": Contestant(ADAMW, {"foreach": False}),
    "bitsandbytes AdamW": Contestant("bitsandbytes.optim.AdamW"),
    "bitsandbytes AdamW8bit": Contestant("bitsandbytes.optim.AdamW8bit"),
    "flashoptim FlashAdamW": Contestant("flashoptim.FlashAdamW"),
    "optimi AdamW": Contestant("optimi.AdamW"),
    "heavyball AdamW": Contestant("heavyball.AdamW", compiled="itself"),
    "torchao AdamW8bit": Contestant("torchao.optim.AdamW8bit", compiled="itself"),
    "AdamW compiled": Contestant(ADAMW, {"foreach": True}, compiled="here"),
    "SadamW compiled": Contestant("sadamw", compiled="here"),
}
LIBRARIES = ("bitsandbytes", "flashoptim", "torch-optimi", "heavyball", "torchao", "triton")


@dataclass
class Config:
    """Everything that can be set; ``None`` is what the command line's help calls the default."""

    output_dir: str = "runs/step_speed"
    overwrite: bool = False
    smoke: bool = False
    workloads: list[str] | None = None
    optimizers: list[str] | None = None
    device: str = "auto"
    threads: list[int] | None = None
    rounds: int = 30
    compiled: bool = False
    instruction_set: str | None = None

    def __post_init__(self) -> None:
        for key, given, least, most in ("rounds", [self.rounds], 3, 9999), ("threads", self.threads or [1], 1, 1024):
            if wrong := [value for value in given if not least <= value <= most]:
                raise RecipeError(f"{key}: {wrong[0]} is not valid, it is from {least} to {most}")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise RecipeError("device: 'cuda' is not available here: take cpu, or a torch that is built for the GPU")


def paired(own: Sequence[float], baseline: Sequence[float]) -> dict[str, Any]:
    """The ratio of each round's two times, its median and quartiles, and the median time itself."""
    ratios = [a / b for a, b in zip(own, baseline, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {"ratio": middle, "quartiles": [low, high], "milliseconds": 1e3 * statistics.median(own)}


def stored(value: Any) -> int:
    """Bytes of all tensors in an optimizer's state, however they are nested or packed."""
    if isinstance(value, Tensor):
        if type(value) is not Tensor and hasattr(value, "__tensor_flatten__"):
            return sum(stored(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(stored, value.values()))
    return sum(map(stored, value)) if isinstance(value, (list, tuple)) else 0


def traffic(params: Sequence[Tensor], optimizer: Any) -> int:
    """Bytes that a step has to move: parameters and state read and written, gradients read."""
    return 3 * stored(list(params)) + 2 * stored(dict(optimizer.state))


def restore(params: Sequence[Tensor]) -> None:
    """Gives parameters their gradients back, which some optimizers drop after a step."""
    for p in params:
        p.grad = p.gradient  # type: ignore[attr-defined]


def timed(step: Callable[[], Any], params: Sequence[Tensor]) -> dict[str, float]:
    """Seconds that a step takes: by the wall clock and, on a GPU, in a second step, by events behind a busy queue."""
    restore(params)
    finish = torch.cuda.synchronize if params[0].is_cuda else (lambda: None)
    finish()
    start = time.perf_counter()
    step()
    finish()
    wall = time.perf_counter() - start
    if not params[0].is_cuda:
        return {"wall": wall}
    restore(params)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda._sleep(int(4e9 * wall))  # in cycles: longer than the host needs to queue the step
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize()
    return {"wall": wall, "events": events[0].elapsed_time(events[1]) / 1e3}


def extra_memory(step: Callable[[], Any], params: Sequence[Tensor]) -> float | None:
    """The most bytes in use during a step above those before it; None where the system does not tell."""
    restore(params)
    if params[0].is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # hands freed memory back, so that its use is seen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = resident("VmRSS")
        step()
        return max(0, resident("VmHWM") - before)
    except (AttributeError, OSError, TypeError):
        return None


def resident(key: str) -> int:
    """Bytes of this process in memory, now (VmRSS) or at their peak (VmHWM), as Linux tells."""
    return 1024 * int(Path("/proc/self/status").read_text().partition(f"{key}:")[2].split()[0])


def prepare(
    contestant: Contestant, params: Sequence[Tensor], workload: Workload | None = None
) -> tuple[Any, Callable[[], Any], float]:
    """A fresh optimizer after its first step, what takes a step, and the seconds that both took.

    Its state is then taken to where it has settled, and to where the workload is.
    """
    restore(params)
    start = time.perf_counter()
    optimizer = create_optimizer(contestant.optimizer, list(params), lr=1e-4, weight_decay=1e-2, **contestant.arguments)
    step: Callable[[], Any] = optimizer.step
    if contestant.compiled == "here":
        step()  # makes the state, and measures beta, which a compiled step takes as it stands
        settle(contestant, optimizer)
        step = torch.compile(step)
    step()
    if params[0].is_cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    settle(contestant, optimizer)
    if workload is not None:
        workload.age(optimizer, params)
    return optimizer, step, seconds


def settle(contestant: Contestant, optimizer: Any) -> None:
    """Takes an optimizer that measures its beta to a time at which it has settled."""
    if contestant.optimizer in OPTIMIZERS:
        for state in optimizer.state.values():
            state["step"].fill_(SETTLED)


def measure(
    contestant: Contestant,
    params: Sequence[Tensor],
    rounds: int,
    floor: dict[str, float],
    workload: Workload | None = None,
) -> list[dict]:
    """Measures an optimizer against its baseline and returns a row for each of the clocks."""
    optimizer, own, first = prepare(contestant, params, workload)
    _, other, _ = prepare(CONTESTANTS[contestant.baseline], params, workload)
    times: dict[Any, list[dict[str, float]]] = {own: [], other: []}
    for i in range(WARM_UP + rounds):
        for step in random.sample([own, other], 2):
            found = timed(step, params)
            if i >= WARM_UP:
                times[step].append(found)
    extra, moved = extra_memory(own, params), traffic(params, optimizer)
    rows = []
    for clock in times[own][0]:
        row = paired(*([found[clock] for found in times[step]] for step in (own, other)))
        speed = moved / row["milliseconds"] / 1e6
        bandwidth = {"gb_per_s": speed, "floor_gb_per_s": floor[clock], "share_of_floor": speed / floor[clock]}
        memory = {"bytes_per_parameter": moved / sum(p.numel() for p in params), "extra_bytes": extra}
        row |= {"baseline": contestant.baseline, **memory, **bandwidth, "first_step_milliseconds": 1e3 * first}
        rows.append({"clock": clock, **row})
    return rows


def floor_bandwidth(params: Sequence[Tensor], rounds: int) -> dict[str, float]:
    """GB/s, by each clock, of a copy on a GPU; on a CPU of the bare kernel, or without one of an addition in place."""
    cuda, elements = params[0].is_cuda, sum(p.numel() for p in params)
    a, b = (torch.ones(elements, device=params[0].device) for _ in range(2))
    step, moved = (lambda: a.copy_(b)) if cuda else (lambda: a.add_(b)), elements * (8 if cuda else 12)
    if not cuda and instruction_set():
        optimizer, step, _ = prepare(CONTESTANTS["SadamW"], params)
        moved = traffic(params, optimizer)
    with contextlib.nullcontext() if cuda else bare():
        found = [timed(step, params) for _ in range(WARM_UP + rounds)]
    return {clock: moved / 1e9 / statistics.median(one[clock] for one in found[WARM_UP:]) for clock in found[0]}


def skip(skipped: dict[str, str], name: str, error: Exception) -> None:
    """Notes and says why an optimizer is left out."""
    skipped[name] = recipe.reason(error)
    recipe.say(f"skipped: {name}: {skipped[name]}")


def taking_part(config: Config) -> tuple[dict[str, Contestant], dict[str, str]]:
    """The optimizers that can be measured here, and why each of the others is not."""
    chosen: dict[str, Contestant] = {}
    skipped: dict[str, str] = {}
    for name in config.optimizers or CONTESTANTS:
        try:
            if CONTESTANTS[name].compiled and not config.compiled:
                raise RecipeError("it takes long to compile: give --compiled to measure it")
            optimizer_class(CONTESTANTS[name].optimizer)
            chosen[name] = CONTESTANTS[name]
        except Exception as error:  # whatever another library does when it is imported
            skip(skipped, name, error)
    return chosen, skipped


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, a table for each workload and setting."""
    lines: list[str] = []
    heads = ["ratio", "quartiles", "to", "ms", "B/param", "GB/s", "of floor", "extra MB", "first ms"]
    for workload, setting in dict.fromkeys((row["workload"], row["setting"]) for row in rows):
        lines += ["", f"| {' | '.join([f'{workload}, {setting}', *heads])} |", f"|{' --- |' * (1 + len(heads))}"]
        for row in (row for row in rows if (row["workload"], row["setting"]) == (workload, setting)):
            extra = "" if row["extra_bytes"] is None else f"{row['extra_bytes'] / 1e6:.1f}"
            quartiles = "{:.2f} to {:.2f}".format(*row["quartiles"])
            cells = [row["optimizer"], f"{row['ratio']:.2f}", quartiles, row["baseline"]]
            cells += [f"{row['milliseconds']:.3g}", f"{row['bytes_per_parameter']:.1f}", f"{row['gb_per_s']:.3g}"]
            cells += [f"{row['share_of_floor']:.0%}", extra, f"{row['first_step_milliseconds']:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines[1:])


def benchmark(config: Config, device: str, chosen: dict[str, Contestant], skipped: dict[str, str]) -> list[dict]:
    """Measures every optimizer on every workload in every setting; one that fails and may is added to ``skipped``."""
    from tqdm.auto import tqdm

    rows = []
    counts = [torch.get_num_threads()] if device == "cuda" else config.threads or sorted({1, torch.get_num_threads()})
    cases = [WORKLOADS[name] for name in config.workloads or WORKLOADS]
    bar = tqdm(total=len(cases) * len(counts) * len(chosen), unit="optimizer")
    one = Workload("", [(1,)]).tensors(device)
    torch.optim.AdamW(one, fused=True).step()  # loads what torch loads at a process's first step
    for workload in cases:
        workload = workload.cut() if config.smoke else workload
        label, params = workload.label, workload.tensors(device)
        for threads in counts:
            torch.set_num_threads(threads)
            floor = floor_bandwidth(params, config.rounds)
            for name, contestant in chosen.items():
                bar.set_postfix_str(f"{label}, {name}")
                found = []
                try:
                    found = measure(contestant, params, config.rounds, floor, workload) if name not in skipped else []
                except Exception as error:
                    if not contestant.optional:
                        raise
                    skip(skipped, name, error)
                for row in found:
                    setting = f"GPU, {row['clock']}" if device == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
                    rows.append({"workload": label, "setting": setting, "optimizer": name, **row})
                if contestant.compiled:
                    torch.compiler.reset()
                bar.update()
    bar.close()
    return rows


def run(config: Config) -> dict[str, Any]:
    """Measures, writes the run's folder and returns what ``result.json`` holds."""
    recipe.require("matplotlib", "tqdm", "yaml")
    start = time.time()
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    with contextlib.ExitStack() as afterwards:
        afterwards.callback(torch.set_num_threads, torch.get_num_threads())
        afterwards.callback(force, None)
        try:
            force(config.instruction_set)
        except ValueError as error:
            raise RecipeError(str(error)) from None
        folder = recipe.open_run(config, __file__)
        chosen, skipped = taking_part(config)
        rows = benchmark(config, device, chosen, skipped)
        used = instruction_set() if device == "cpu" else None
    recipe.say(f"{table(rows)}\n\ninstruction set of the CPU kernel: {used or 'none, it is not in use'}\n-> {folder}")
    speed_figure(rows, folder / "step_speed.png")
    peers = {found.name: found.version for found in importlib.metadata.distributions() if found.name in LIBRARIES}
    metrics = {"device": device, "instruction_set": used, "skipped": skipped, "peers": peers}
    return recipe.write_result(folder, "step_speed", config, metrics, {"steps": rows}, time.time() - start)


def parse(argv: Sequence[str] | None) -> Config:
    """Reads the command line."""
    about: dict[str, Any] = {"description": __doc__, "formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("sadam run step_speed", argument_default=argparse.SUPPRESS, **about)
    switch: Any = {"type": json.loads, "choices": [True, False], "nargs": "?", "const": True, "metavar": "true"}
    several: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument("--output_dir", help="folder of the run (default: runs/step_speed)")
    parser.add_argument("--overwrite", **switch, help="replace a finished run in output_dir")
    parser.add_argument("--smoke", **switch, help="three rounds on small tensors, to see that it works")
    parser.add_argument("--workloads", choices=WORKLOADS, **several, help=f"of {', '.join(WORKLOADS)} (default: all)")
    parser.add_argument("--optimizers", choices=CONTESTANTS, **several, help=f"of {', '.join(CONTESTANTS)}")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one (default)")
    parser.add_argument("--threads", type=int, nargs="+", metavar="N", help="on a CPU (default: 1 and all)")
    parser.add_argument("--rounds", type=int, metavar="N", help="measured steps of each optimizer (default: 30)")
    parser.add_argument("--compiled", **switch, help="compiled steps too: needs a compiler, and minutes")
    parser.add_argument("--instruction_set", metavar="NAME", help="of the CPU kernel, such as avx2 (default: the best)")
    given = vars(parser.parse_args(argv))
    smoke = {"rounds": 3, "output_dir": f"{Config.output_dir}_smoke"} if given.get("smoke") else {}
    return Config(**{**smoke, **given})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark from the command line and returns the exit code."""
    run(parse(argv))
    return 0


if __name__ == "__main__":
    sys.exit(main())
