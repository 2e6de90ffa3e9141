"""What a training step costs: time, memory and arithmetic of every algorithm, as ratios to backpropagation.

How it is measured, so that the figures can be trusted:

- A step is `zero_grad`, `estimate` and the step of the optimizers that `onward train` makes, on random inputs, with random
  labels that change every step: they cannot be learned, and gradients that fade would fill Adam's averages with slow denormal
  numbers. Freed memory is kept for the next step, as in a process that has loaded data (`memory.keep_freed`).
- Time: candidates take turns within one process (A B C A B C ...), so that a slow spell of the machine hits all. A turn builds
  the network afresh, makes two steps that are not timed (the first allocates, the second fills the caches), then several that
  are. Ratios are taken within a turn; the table has their median, least and greatest.
- Memory: the median over three fresh processes of the growth of the largest resident size over three steps: network, gradients
  and optimizer are in it, the interpreter and what a first step of any network loads are not. On a GPU, the most that tensors
  took. `state_bytes` is what outlives a step (parameters, gradients, buffers, feedback, the optimizers' averages).
- Parts: one more step in each turn, with a clock on every forward pass of the network (`primal`), the rules of forward mode and
  the random directions (`tangent`), every call of autograd's engine (`backward`: gradients inside one block or head, and what
  checkpointing runs again, included) and the optimizers (`optimizer`). `other` is what remains: heads, error signals, feedback,
  sums over samples, losses. A part that never ran is empty. A part is counted without the others that run inside it.
- FLOPs: of one `estimate`, by the formulas of `torch.utils.flop_counter`: matrix products, convolutions, attention.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import multiprocessing
import platform
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, partial
from multiprocessing import forkserver
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import onward
from onward.derivatives import directions
from onward.derivatives.tangents import Tangents
from onward.errors import UsageError, unknown
from onward.estimators.forward_gradient import forward
from onward.lab.networks import models
from onward.lab.report import figures as plots
from onward.lab.run import algorithms
from onward.lab.run.training import choose_device, describe, make_optimizers
from onward.lab.settings import Backprop, Bench, Heads, Network, Train
from onward.lab.system import disk, generators, interrupt, memory

Row = dict[str, Any]
BASELINES = ("bp", "bp:checkpoint=true")
"""Always measured: what every other row is a ratio to."""
PHASES = ("primal", "tangent", "backward", "optimizer", "other")
INPUTS = {"mlp": (1, 28, 28), "alexnet": (3, 224, 224)}
"""Of a network, the shape of its inputs if none is asked for; 3x32x32 for the others."""
SWEEPS = {"depth": "blocks of --network.layers", "width": "--network.width", "batch": "--batch-size"}
OPTIONS = {"depth": "layers", "width": "width"}
"""Of the network, what a sweep sets."""
PROCESSES = 3
"""In which memory is measured, one after the other."""
SECONDS = 0.5
"""That backpropagation's part of a turn should take."""


def bench(config: Bench) -> list[Row]:
    """Measure every algorithm and print a table; returns its rows. With a sweep: at each of its values, with the slopes.

    An algorithm that fails or runs out of memory has a row that says so in `error`.

    Raises:
        UsageError: something that was asked for cannot work.
    """
    points = _points(config)
    device = choose_device(config.device)
    picture = None
    if config.sweep:
        picture = Path(config.plot or f"bench-{algorithms.folder_name(config.model)}-{config.sweep[0]}.png")
    for flag, path in (("--json", config.json and Path(config.json)), ("--plot", picture)):
        if path and not path.absolute().parent.is_dir():
            raise UsageError(f"{flag} {path}: there is no folder {path.parent}, create it or name another")
        if path and path.is_dir():
            raise UsageError(f"{flag} {path}: this is a folder, name a file in it")
        if path and (path.is_file() or not path.exists()):
            try:
                disk.try_out(path.absolute().parent)
            except OSError as error:
                raise UsageError(f"{flag} {path} cannot be written ({error.strerror}): name a file elsewhere") from error
    if picture and picture.suffix.lower() not in (known := plots.formats()):
        raise UsageError(f"--plot {picture}: a picture has a name that ends in one of {', '.join(known)}")
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # a path may have brackets in it
    environment = {
        "device": describe(device),
        "threads": torch.get_num_threads(),
        "onward": onward.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    rows = [row for point in points for row in measure(point, device, console)]
    report: dict[str, Any] = {"config": dataclasses.asdict(config), "environment": environment, "rows": rows}
    if config.sweep:
        report["slopes"] = slopes(rows)
    try:
        if config.json:
            disk.write_text(Path(config.json), json.dumps(report, indent=2) + "\n")
    finally:  # neither a full disk nor a closed terminal takes the figures along
        if config.sweep:
            show_sweep(report["slopes"], rows, config, environment["device"], console)
        else:
            shape = ",".join(map(str, shape_of(config)))
            show(rows, f"{config.model}, input {shape}, batch {config.batch_size}, {environment['device']}", console)
    if config.json:
        console.print(f"figures: {config.json}")
    if picture:
        plots.draw({picture: lambda path: draw_sweep(path, report["slopes"], rows, config)})
    return rows


def measure(config: Bench, device: torch.device, console: Console) -> list[Row]:
    """One row for each algorithm of the configuration."""
    runs = candidates(config)
    shape = shape_of(config)
    prepare = {name: partial(Learner.of, run, shape, config.classes, device) for name, run in runs.items()}
    rows: dict[str, Row] = {name: {"algorithm": name, "error": None} for name in runs}
    if config.sweep:
        for row in rows.values():
            row.update(sweep=config.sweep[0], value=swept(config))
    threads = torch.get_num_threads()
    gc.collect()
    gc.freeze()  # so that collecting what the candidates leave behind is quick
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(runs) * (1 + config.turns))
        for name in runs:
            progress.update(task, description=f"memory of {name}")
            arguments = (runs[name], shape, config.classes, str(device), threads)
            gc.collect()
            with _failure_into(rows[name]):
                # A GPU counts what tensors take; a processor's peak is that of a whole process.
                if device.type == "cuda":
                    found = [peak(*arguments)]
                else:
                    found = [in_a_fresh_process(peak, *arguments) for _ in range(PROCESSES)]
                peaks = sorted(measured for measured, _ in found)
                rows[name]["peak_bytes"] = statistics.median(peaks)
                rows[name]["peak_bytes_range"] = [peaks[0], peaks[-1]]
                rows[name]["state_bytes"] = found[0][1]
            progress.advance(task)
        memory.keep_freed()
        turns: dict[str, list[Turn]] = {name: [] for name in runs}
        steps = config.steps
        for index in range(config.turns):
            for name in runs:
                progress.update(task, description=f"time of {name}", advance=1)
                if rows[name]["error"]:
                    continue
                gc.collect()
                with _failure_into(rows[name]):
                    done = take_turn(prepare[name](), device, steps, count=index == 0)
                    steps = steps or done.steps
                    turns[name].append(done)
    gc.unfreeze()
    bases = [base for base in BASELINES if not rows[base]["error"]]
    for name, row in rows.items():
        if not row["error"]:
            row.update(summary(turns[name], {base: turns[base] for base in bases}))
            row.update({f"memory / {base}": _ratio(row["peak_bytes"], rows[base]["peak_bytes"]) for base in bases})
    return list(rows.values())


def candidates(config: Bench) -> dict[str, Train]:
    """The two baselines and the algorithms asked for, by name."""
    shared = {entry.name: getattr(config, entry.name) for entry in dataclasses.fields(config) if entry.name in _SHARED}
    base = Train(**shared)
    plain = dataclasses.replace(base, backprop=Backprop(), low_memory=False)
    return {name: algorithms.variant(name, plain) for name in BASELINES} | {
        name: algorithms.variant(name, base) for name in config.algorithms if name not in BASELINES
    }


def shape_of(config: Bench) -> tuple[int, ...]:
    """The shape of one input."""
    if config.input:
        return models.parse_shape(config.input)
    if config.model not in models.MODELS:
        raise UsageError(f"--model {config.model}: say what its inputs look like, such as --input 3,32,32")
    return INPUTS.get(config.model, (3, 32, 32))


class Learner(NamedTuple):
    """A network that learns: what makes a step."""

    estimator: onward.Estimator
    optimizers: Sequence[Optimizer]
    x: Tensor
    classes: int

    @classmethod
    def of(cls, config: Train, shape: Sequence[int], classes: int, device: torch.device) -> Learner:
        generators.seed(config.seed)
        model = models.build(config.model, shape, classes, config.network).to(device)
        x = torch.randn(config.batch_size, *shape, device=device)
        estimator = algorithms.build(model, config, x[:2])
        estimator.check = False  # a look at the network, once before it is trained, is no part of a step
        return cls(estimator, list(make_optimizers(config, estimator).values()), x, classes)

    def step(self, clock: Callable[[str], AbstractContextManager[object]] = lambda phase: nullcontext()) -> None:
        y = torch.randint(self.classes, (len(self.x),), device=self.x.device)
        with clock("optimizer"):
            for optimizer in self.optimizers:
                optimizer.zero_grad()
        self.estimator.estimate(self.x, y)
        with clock("optimizer"):
            for optimizer in self.optimizers:
                optimizer.step()

    def state_bytes(self) -> int:
        """Bytes of what outlives a step."""
        held = [t for p in self.estimator.parameters() for t in (p, p.grad) if t is not None]
        held += self.estimator.buffers()
        held += [t for o in self.optimizers for state in o.state.values() for t in state.values() if isinstance(t, Tensor)]
        return sum(t.numel() * t.element_size() for t in held)


class Turn(NamedTuple):
    """What one turn of a candidate measured; seconds are of one step."""

    steps: int
    seconds: float
    parts: dict[str, float]
    flops: int | None
    engine: str


def take_turn(learner: Learner, device: torch.device, steps: int | None, *, count: bool) -> Turn:
    """Two steps that are not timed, then `steps` that are; if None, as many as a half second holds, at most 20."""
    learner.step()
    learner.step()
    if steps is None:
        steps = min(20, max(1, round(SECONDS / seconds_of(learner.step, device))))
    seconds = seconds_of(lambda: [learner.step() for _ in range(steps)], device) / steps
    with Clock(device).watching(learner.estimator.model) as clock:
        learner.step(clock)
    return Turn(steps, seconds, clock.seconds, flops(learner) if count else None, learner.estimator.engine)


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """How long it takes, until the device is done."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def flops(learner: Learner) -> int:
    """Of one `estimate`."""

    class Count(TorchDispatchMode):
        # FlopCounterMode itself follows modules by hooks on the graph, which refuse autograd.grad.
        total = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if formula := flop_registry.get(func.overloadpacket):
                self.total += formula(*args, **(kwargs or {}), out_val=out)
            return out

    with Count() as counted:
        learner.estimator.estimate(learner.x, torch.randint(learner.classes, (len(learner.x),), device=learner.x.device))
    return counted.total


class Clock:
    """Seconds in each phase, without the phases within it.

    >>> clock = Clock(torch.device("cpu"))
    >>> with clock("primal"):
    ...     time.sleep(0.01)
    ...     with clock("backward"):
    ...         time.sleep(0.03)
    >>> 0.01 <= clock.seconds["primal"] < clock.seconds["backward"]
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device, self._running, self._since = device, ["other"], time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        self._enter(phase)
        try:
            yield
        finally:
            self._leave()

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[Clock]:
        """Within the block, passes of the network, tangents and calls of autograd are told apart."""

        def timed(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                with self(phase):
                    return function(*args, **kwargs)

            return call

        register = nn.Module.register_forward_hook

        def register_timed(module: nn.Module, hook: Callable[..., Any], **options: Any) -> Any:
            return register(module, timed(hook, "other"), **options)  # error signals are delivered in hooks

        with ExitStack() as stack:
            stack.callback(model.register_forward_pre_hook(lambda *_: self._enter("primal")).remove)
            stack.callback(model.register_forward_hook(lambda *_: self._leave()).remove)
            stack.enter_context(mock.patch.object(nn.Module, "register_forward_hook", register_timed))
            for owner, name, phase in _WATCHED:
                stack.enter_context(mock.patch.object(owner, name, timed(getattr(owner, name), phase)))
            self._since = time.perf_counter()
            yield self
            self._switch()

    def _enter(self, phase: str) -> None:
        self._switch()
        self._running.append(phase)

    def _leave(self) -> None:
        self._switch()
        self._running.pop()

    def _switch(self) -> None:
        _synchronize(self._device)
        now = time.perf_counter()
        phase = self._running[-1]
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._since
        self._since = now


_WATCHED: tuple[tuple[Any, str, str], ...] = (
    (torch.autograd, "backward", "backward"),
    (torch.autograd, "grad", "backward"),
    (Tangents, "_apply", "tangent"),
    (Tangents, "_give", "tangent"),
    (directions, "draw", "tangent"),
    (forward, "draw", "tangent"),
)
_SHARED = {entry.name for entry in dataclasses.fields(Train)} - {"algorithm", "out", "overwrite"}


def peak(config: Train, shape: Sequence[int], classes: int, device: str, threads: int) -> tuple[int, int]:
    """Bytes by which memory grew over three steps, and bytes of what outlives a step."""
    where = torch.device(device)
    if where.type == "cpu":
        torch.set_num_threads(threads)
    # What the first step in a process loads and keeps is no need of the network's.
    tiny = {"model": "mlp", "network": Network(width=0.01), "heads": Heads(), "input": None, "cuts": None, "batch_size": 2}
    Learner.of(dataclasses.replace(config, **tiny), (1, 2, 2), 2, where).step()
    memory.keep_freed()
    memory.reset_peak(where)
    before = memory.peak(where)
    learner = Learner.of(config, shape, classes, where)
    for _ in range(3):
        learner.step()
    return memory.peak(where) - before, learner.state_bytes()


def in_a_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function` returns in a process that has only imported; the first that the system kills if memory runs out."""
    with ProcessPoolExecutor(1, _context(), _first_to_go, (signal.getsignal(signal.SIGINT),)) as pool:
        return pool.submit(function, *arguments).result()


@cache
def _context() -> BaseContext:
    """Ctrl-C waits until the server has imported: from then on it ends in silence when we do."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # the first optimizer would import it
    with interrupt.requests() as asked:
        with interrupt.ours_alone():
            forkserver.ensure_running()
        first = context.Process()
        first.start()
        first.join()
    if asked():
        raise KeyboardInterrupt
    return context


def _first_to_go(on_ctrl_c: Any) -> None:
    if on_ctrl_c is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends at once, and without a traceback
    with contextlib.suppress(OSError):  # where there is no /proc
        Path("/proc/self/oom_score_adj").write_text("1000")


@contextmanager
def _failure_into(row: Row) -> Iterator[None]:
    """Put what goes wrong in the block into the row's `error`, in one line."""
    try:
        yield
    except BrokenProcessPool:
        row["error"] = "its process was killed: out of memory?"
    except Exception as error:
        said = str(error).partition("\n")[0]
        if memory.exhausted(error):
            row["error"] = f"out of memory: {said}"
        else:
            row["error"] = said if isinstance(error, UsageError) else f"{type(error).__name__}: {said}"
    if row["error"]:
        gc.collect()


def summary(turns: Sequence[Turn], bases: Mapping[str, Sequence[Turn]]) -> Row:
    """A row's figures of time: medians, with least and greatest."""
    seconds = [turn.seconds for turn in turns]
    whole = sum(sum(turn.parts.values()) for turn in turns)
    parts = {phase: sum(turn.parts.get(phase, 0.0) for turn in turns) / whole for phase in PHASES}
    row: Row = {
        "engine": turns[0].engine,
        "steps": turns[0].steps,
        "seconds": statistics.median(seconds),
        "seconds_range": [min(seconds), max(seconds)],
        "parts": {phase: share if any(phase in turn.parts for turn in turns) else None for phase, share in parts.items()},
        "flops": turns[0].flops,
    }
    for base, others in bases.items():
        ratios = [turn.seconds / other.seconds for turn, other in zip(turns, others, strict=True)]
        row[f"time / {base}"] = statistics.median(ratios)
        row[f"time / {base} range"] = [min(ratios), max(ratios)]
    return row


def _ratio(value: float, base: float) -> float | None:
    return value / base if base else None


def show(rows: Sequence[Row], title: str, console: Console) -> None:
    """Print what a step costs, and its parts."""
    console.print(title, style="bold")
    good = [row for row in rows if not row["error"]]
    time_of, memory_of, parts_of = (
        _table("algorithm", *columns)
        for columns in (
            ("ms/step", "/ bp", "/ ckpt"),
            ("peak MB", "/ bp", "/ ckpt", "engine"),
            ("GFLOP", *PHASES),
        )
    )
    for row in good:
        name = row["algorithm"]
        times = [_spread(row.get(f"time / {base}"), row.get(f"time / {base} range")) for base in BASELINES]
        peaks = [_spread(row.get(f"memory / {base}")) for base in BASELINES]
        shares = ["" if share is None else f"{100 * share:.0f}" for share in row["parts"].values()]
        time_of.add_row(name, f"{1e3 * row['seconds']:.1f}", *times)
        low, high = row["peak_bytes_range"]
        megabytes = f"{row['peak_bytes'] / 1e6:.0f} ({low / 1e6:.0f}–{high / 1e6:.0f})"
        memory_of.add_row(name, megabytes, *peaks, row["engine"])
        parts_of.add_row(name, f"{row['flops'] / 1e9:.3g}", *shares)
    console.print("\nTime; ratios: median (least–greatest) over turns; ckpt: bp:checkpoint=true", time_of)
    console.print("Peak memory; median (least–greatest) over processes", memory_of)
    console.print("Arithmetic, and parts of the time of a step in %", parts_of)
    _show_failures(rows, console)


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for column in columns:
        named = column in ("algorithm", "engine")
        table.add_column(column, justify="left" if named else "right", no_wrap=not named, overflow="fold")
    return table


def _spread(middle: float | None, extremes: Sequence[float] | None = None) -> str:
    if middle is None:
        return ""
    return f"{middle:.2f}" + (f" ({extremes[0]:.2f}–{extremes[1]:.2f})" if extremes else "")


def _show_failures(rows: Sequence[Row], console: Console) -> None:
    for row in rows:
        if row["error"]:
            at = f" at {row['sweep']} {row['value']:g}" if "sweep" in row else ""
            console.print(f"{row['algorithm']}{at}: {row['error']}", style="red")


def _points(config: Bench) -> list[Bench]:
    """The configurations that are measured: one, or one for each value of the sweep. Checks that they can be."""
    models.check(config.model)
    points = [config]
    if config.sweep:
        what, *values = config.sweep
        if what not in SWEEPS:
            raise unknown("sweep", what, SWEEPS)
        if what in OPTIONS and OPTIONS[what] not in models.options_of(config.model):
            raise UsageError(f"--sweep {what}: {config.model} has no --network.{OPTIONS[what]}, sweep something else")
        points = [_at(config, what, value) for value in values]
        if len(set(map(swept, points))) < 2:
            raise UsageError(f"--sweep {' '.join(config.sweep)}: a slope takes at least two values, such as {what} 8 16 32 64")
    for point in points:
        candidates(point)
        shape = shape_of(point)
        if config.model in models.MODELS:
            with torch.device("meta"):
                models.build(config.model, shape, config.classes, point.network)
        elif point is points[0]:
            models.build(config.model, shape, config.classes, point.network)
    return points


def _at(config: Bench, what: str, value: str) -> Bench:
    """The configuration at one value of a sweep."""
    try:
        number = float(value) if what == "width" else int(value)
    except ValueError:
        kind = "number" if what == "width" else "whole number"
        raise UsageError(f"--sweep {what} {value}: this is no {kind}") from None
    if what == "batch":
        return dataclasses.replace(config, batch_size=number)
    return dataclasses.replace(config, network=dataclasses.replace(config.network, **{OPTIONS[what]: number}))


def swept(config: Bench) -> float:
    """What the quantity that is swept is in this configuration."""
    return {"depth": config.network.layers, "width": config.network.width, "batch": config.batch_size}[config.sweep[0]]


MEASURES: dict[str, tuple[str, Callable[[Row], float]]] = {
    "ms": ("Time of a step", lambda row: 1e3 * row["seconds"]),
    "MB": ("Peak memory", lambda row: row["peak_bytes"] / 1e6),
    "MB above state": (
        "Peak memory above what outlives a step (parameters, gradients, optimizer, feedback)",
        lambda row: (row["peak_bytes"] - row["state_bytes"]) / 1e6,
    ),
}
"""What a sweep fits lines to: by unit, what it is, and where a row has it."""


def slopes(rows: Sequence[Row]) -> list[Row]:
    """For each algorithm, the least-squares line through each measure, and the ratios of its slope to the baselines'."""
    names = dict.fromkeys(row["algorithm"] for row in rows)
    fits: dict[str, Row] = {}
    for name in names:
        good = [row for row in rows if row["algorithm"] == name and not row["error"]]
        values = [row["value"] for row in good]
        fits[name] = {"algorithm": name}
        if len(good) > 1:
            for unit, (_, measured) in MEASURES.items():
                slope, intercept = statistics.linear_regression(values, [measured(row) for row in good])
                fits[name][unit] = {"slope": slope, "intercept": intercept}
    for fit in fits.values():
        for unit in fit.keys() & MEASURES.keys():
            bases = {base: fits[base][unit]["slope"] for base in BASELINES if unit in fits.get(base, {})}
            fit[unit] |= {f"/ {base}": _ratio(fit[unit]["slope"], slope) for base, slope in bases.items()}
    return list(fits.values())


def show_sweep(fits: Sequence[Row], rows: Sequence[Row], config: Bench, device: str, console: Console) -> None:
    """Print every measure over the values of the sweep, with its slope."""
    what = config.sweep[0]
    console.print(f"{config.model} over {what} ({SWEEPS[what]}), {device}", style="bold")
    values = sorted({row["value"] for row in rows})
    for unit, (title, measured) in MEASURES.items():
        found = {(row["algorithm"], row["value"]): f"{measured(row):.1f}" for row in rows if not row["error"]}
        table = _table("algorithm", *(f"{value:g}" for value in values), f"per {what}", "/ bp", "/ ckpt")
        for fit in fits:
            name = fit["algorithm"]
            line = fit.get(unit, {})
            slope = f"{line['slope']:.3g}" if line else ""
            ratios = [_spread(line.get(f"/ {base}")) for base in BASELINES]
            table.add_row(name, *(found.get((name, value), "failed") for value in values), slope, *ratios)
        console.print(f"\n{title} in {unit.partition(' ')[0]}; slope by least squares", table)
    _show_failures(rows, console)


def draw_sweep(path: Path, fits: Sequence[Row], rows: Sequence[Row], config: Bench) -> None:
    """A picture: time and memory over the values of the sweep, each with its line."""
    figure = plots.empty(12, 4.5)
    figure.suptitle(f"{config.model}, batch {config.batch_size}" if config.sweep[0] != "batch" else config.model)
    panels = figure.subplots(1, len(MEASURES))
    for axes, (unit, (_, measured)) in zip(panels, MEASURES.items(), strict=True):
        for index, fit in enumerate(fits):
            good = [row for row in rows if row["algorithm"] == fit["algorithm"] and not row["error"]]
            if not good:
                continue
            values, color = [row["value"] for row in good], f"C{index}"
            axes.plot(values, [measured(row) for row in good], "o", color=color, markersize=4)
            label = fit["algorithm"]
            if unit in fit:
                line = fit[unit]
                label += f" ({line['slope']:.3g})"
                ends = [min(values), max(values)]
                axes.plot(ends, [line["intercept"] + line["slope"] * end for end in ends], color=color, label=label)
        axes.set(xlabel=config.sweep[0], ylabel=unit, ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small", title=f"slope, {unit} per {config.sweep[0]}", title_fontsize="x-small")
    plots.save(figure, path)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
