"""`planc bench`: plans, their plain forms and other libraries on the same prompts in one run.

Every system lives in a process of its own and is warm; for each prompt the systems take turns in rotating order, and only one of them computes
at a time, so that a slow spell of the machine hits all alike. Speed is generated tokens by wall seconds of the whole call, prompt included.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planc.compiler.files import write
from planc.compiler.peers import LOAD_SECONDS, OURS, PEERS, PeerError, PeerMissing, Worker, unknown_peer
from planc.compiler.quality import WINDOW, perplexity, read_windows
from planc.compiler.store import Stored, cache_dir, obtain
from planc.runtime.contract import hardware
from planc.runtime.errors import InputError, PlanError

PAUSE = 0.05  #: seconds between two systems: threads of the last one stop spinning meanwhile
WARM_TOKENS = 16
_LINE = 150  # of the JSON in a file
WARM_TEXT = "Name three rivers and say in one sentence each where they flow."  # in no prompt set, so that nothing useful is learned from it

QUALITY_TOKENS = 8192  #: of the text, by default

FORMS = ("plan", "plain", "plain_one_row")


@dataclass(frozen=True)
class Prompt:
    """A user message of the prompt set."""

    id: str
    category: str
    text: str


@dataclass(frozen=True)
class Run:
    """What one system did with one prompt."""

    ids: list[int]
    seconds: float  # wall time of the whole call
    ttft_ms: float | None = None
    peak_rss_mb: float = 0.0  # of the process, so far
    tokens_per_pass: float | None = None
    passes: int | None = None
    host_ms_per_step: float | None = None
    # counts as in `GenerationStats`; their keys came through JSON and are text. Empty for a peer, which cannot tell
    purposes: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    accepted: dict[str, int] = field(default_factory=dict)
    drafted_by: dict[str, int] = field(default_factory=dict)
    accepted_by: dict[str, int] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return len(self.ids) / self.seconds if self.seconds > 0 else 0.0


@dataclass
class System:
    """One column of the race: a form of a plan, or a peer."""

    name: str
    worker: Worker
    form: str | None = None  # one of FORMS; None for a peer
    runs: list[Run] = field(default_factory=list)

    def run(self, ids: list[int], max_new_tokens: int, eos: list[int]) -> Run:
        """Generate once."""
        extra: dict[str, Any] = {} if self.form is None else {"form": self.form}
        answer = self.worker.ask("generate", ids=ids, max_new_tokens=max_new_tokens, eos=eos, **extra)
        return Run(**{name: answer[name] for name in Run.__dataclass_fields__ if name in answer})


@dataclass(frozen=True)
class Options:
    """What the command line asked for."""

    model: str
    max_new_tokens: int = 96
    peers: tuple[str, ...] = ()
    peer_python: str = ""
    quality: Path | None = None  # the text to measure it on
    quality_tokens: int = QUALITY_TOKENS
    chat: bool | None = None
    progress: bool = True


# ---- prompts -----------------------------------------------------------------------------------------------------------------------


def load_prompts(source: str, limit: int | None = None) -> list[Prompt]:
    """Prompts of a file. `.jsonl`: {"id", "category", "turns": [...]} or {"prompt": ...} a line; anything else: a prompt a line.

    `limit` takes the same number from every category, the first ones of each; what cannot be shared evenly goes to the first categories.
    """
    path = Path(source).expanduser()
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError("input-invalid", f"the prompts {source} cannot be read: {error}", where="--prompts") from error
    json_lines = path.suffix in (".jsonl", ".ndjson")
    prompts = [_json_prompt(path, number, line) if json_lines else Prompt(str(number), "all", line) for number, line in enumerate(lines, 1)]
    if not prompts:
        raise InputError("prompt-empty", f"{source} holds no prompts", where="--prompts")
    return prompts if limit is None else _evenly(prompts, limit)


def _json_prompt(path: Path, number: int, line: str) -> Prompt:
    try:
        data = json.loads(line)
        text = data["turns"][0] if "turns" in data else data["prompt"]
        if not isinstance(text, str) or not text:
            raise TypeError("the prompt is not a text")
    except (ValueError, LookupError, TypeError) as error:
        fix = 'write {"id": 1, "category": "chat", "turns": ["Hello"]}'
        raise InputError("input-invalid", f"not a prompt: {error or type(error).__name__}", where=f"{path}:{number}", fix=fix) from error
    return Prompt(str(data.get("id", number)), str(data.get("category", "all")), text)


def _evenly(prompts: Sequence[Prompt], limit: int) -> list[Prompt]:
    if limit < 1:
        raise InputError("input-invalid", f"--limit {limit} leaves no prompt", where="--limit", fix="give a number above 0")
    left: dict[str, int] = dict.fromkeys((prompt.category for prompt in prompts), 0)
    available = {category: sum(prompt.category == category for prompt in prompts) for category in left}
    while limit and any(left[category] < available[category] for category in left):
        for category in left:
            if limit and left[category] < available[category]:
                left[category] += 1
                limit -= 1
    taken: list[Prompt] = []
    for prompt in prompts:
        if left[prompt.category]:
            left[prompt.category] -= 1
            taken.append(prompt)
    return taken


# ---- the race ----------------------------------------------------------------------------------------------------------------------


def race(
    systems: Sequence[System],
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int,
    eos: list[int],
    warm: list[int],
    pause: float = PAUSE,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Every system on every prompt (token ids), prompt by prompt, the order rotated by one each time; fills `System.runs`."""
    for system in systems:
        system.run(warm, WARM_TOKENS, eos)
    done, total = 0, len(systems) * len(prompts)
    for turn, ids in enumerate(prompts):
        first = turn % len(systems)
        for system in (*systems[first:], *systems[:first]):
            time.sleep(pause)
            system.runs.append(system.run(ids, max_new_tokens, eos))
            done += 1
            if progress is not None:
                progress(done, total)


def bench(plans: Sequence[Path], prompts: Sequence[Prompt], options: Options, note: Callable[[str], None] = print) -> dict[str, Any]:
    """Run the benchmark; the result is what `planc bench --json` prints. `note` is told about peers that are skipped."""
    for name in options.peers:
        if name not in PEERS:
            raise unknown_peer(name)
    names = _names(plans)
    stored = {name: obtain(plan, options.model, progress=options.progress) for name, plan in zip(names, plans, strict=True)}
    with ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, OURS, {"artifact": str(item.directory)})) for name, item in stored.items()}
        loaded = {name: worker.ask("load", seconds=LOAD_SECONDS) for name, worker in workers.items()}
        about = {name: worker.ask("about") for name, worker in workers.items()}
        first = workers[names[0]]
        eos = about[names[0]]["eos"]
        ids = [first.ask("encode", text=prompt.text, chat=options.chat)["ids"] for prompt in prompts]
        warm = first.ask("encode", text=WARM_TEXT, chat=options.chat)["ids"]
        longest = max(map(len, ids)) + options.max_new_tokens
        peers, versions, skipped = _start_peers(stack, options, longest, note)
        ours = [System(name, worker, form) for name, worker in workers.items() for form in FORMS]
        others = [System(name, worker) for name, worker in peers.items()]
        with _bar("measuring", options.progress) as show:
            race([*ours, *others], ids, max_new_tokens=options.max_new_tokens, eos=eos, warm=warm, progress=show)
        live = {name: worker.ask("memory")["live_mb"] for name, worker in {**workers, **peers}.items()}
        scores = _quality(options, first, {**workers, **peers}) if options.quality else {}
    by_form = {name: {system.form: system.runs for system in ours if system.name == name} for name in names}
    categories = [prompt.category for prompt in prompts]
    peer_rows = [{"name": s.name, **summary(s.runs, categories), "version": versions[s.name]["version"]} for s in others]
    fastest = max(peer_rows, key=lambda row: row["tokens_per_s"], default=None)
    plan_rows = []
    for name, plan in zip(names, plans, strict=True):
        row = {"name": name, "plan": str(plan), **compare(by_form[name], categories), **_facts(about[name], loaded[name], stored[name])}
        row["ratio_to_fastest_peer"] = round(row["tokens_per_s"] / fastest["tokens_per_s"], 4) if fastest else None
        plan_rows.append(row)
    for row, runs in zip([*plan_rows, *peer_rows], [*(by_form[name]["plan"] for name in names), *(s.runs for s in others)], strict=True):
        row["requests"] = [request(prompt, run) for prompt, run in zip(prompts, runs, strict=True)]
        started = {**loaded, **versions}[row["name"]]
        row |= {"load_s": started["load_s"], "file_bytes": started["file_bytes"], "live_mb": live[row["name"]]}
        row["quality"] = scores.get(row["name"])
    return {
        "model": options.model,
        "prompts": len(prompts),
        "categories": {name: categories.count(name) for name in dict.fromkeys(categories)},
        "max_new_tokens": options.max_new_tokens,
        "plans": plan_rows,
        "peers": peer_rows,
        "skipped_peers": skipped,
        "fastest_peer": fastest and fastest["name"],
        "ratio_to_fastest_peer": {row["name"]: row["ratio_to_fastest_peer"] for row in plan_rows},
        "quality": {"file": str(options.quality), "window": WINDOW, "reference": "the model without passes"} if scores else None,
        "hardware": hardware(),
        "threads": threads(),
        "settings": {"pause_s": PAUSE, "warm_up_tokens": WARM_TOKENS, "decoding": "greedy", "repeats": 1},
    }


def threads() -> int:
    """Threads that peers are given: every core that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _names(plans: Sequence[Path]) -> list[str]:
    names: list[str] = []
    for plan in plans:
        stem = plan.stem if plan.suffix in (".yaml", ".yml", ".json") else plan.name or str(plan)
        if stem in names:
            raise PlanError(
                "input-invalid", f"two plans are called {stem!r}", where=str(plan), fix="rename one of the files, or name it once"
            )
        names.append(stem)
    return names


def _start_peers(
    stack: ExitStack, options: Options, longest: int, note: Callable[[str], None]
) -> tuple[dict[str, Worker], dict[str, dict[str, Any]], dict[str, str]]:
    """Load every peer, one after another. A peer that is not installed, or cannot take this model, is skipped with a line."""
    workers: dict[str, Worker] = {}
    loaded: dict[str, dict[str, Any]] = {}
    skipped: dict[str, str] = {}
    if not options.peers:
        return workers, loaded, skipped
    hf, gguf = locate_files(options.model)
    home = cache_dir() / "peers" / hf.name
    home.mkdir(parents=True, exist_ok=True)
    config = {"hf": str(hf), "gguf": gguf and str(gguf), "cache": str(home), "threads": threads(), "context": -(-longest // 256) * 256}
    for name in options.peers:
        peer = PEERS[name]
        if peer.gguf and gguf is None:
            skipped[name] = "it reads GGUF files, and the model is not one"
        else:
            worker = stack.enter_context(Worker(name, peer.file, config, python=options.peer_python, install=peer.install))
            try:
                loaded[name] = worker.ask("load", seconds=LOAD_SECONDS)
                workers[name] = worker
            except PeerMissing as error:
                skipped[name] = f"{error.message}; {error.fix}"
            except PeerError as error:
                skipped[name] = f"{error.message}\n         {error.where or ''}".rstrip()
        if name in skipped:
            note(f"skipping {name}: {skipped[name]}")
    return workers, loaded, skipped


def locate_files(model: str) -> tuple[Path, Path | None]:
    """The model's directory in the layout of transformers, and its GGUF file if that is where the weights came from."""
    from planc.compiler.models import locate

    return locate(model)


def _quality(options: Options, encoder: Worker, workers: dict[str, Worker]) -> dict[str, dict[str, Any]]:
    """Every system on the same windows of a text against the model that no pass has touched; null where a system hands out no logits."""
    assert options.quality is not None
    windows = read_windows(options.quality, lambda text: encoder.ask("encode", text=text, chat=False)["ids"], tokens=options.quality_tokens)
    answers: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
    with tempfile.TemporaryDirectory(prefix="planc-quality-") as folder:
        plan, logits = Path(folder, "unrewritten.yaml"), str(Path(folder, "logits.npy"))
        plan.write_text("planc: 1\n")
        artifact = obtain(plan, options.model, progress=options.progress).directory
        with Worker("unrewritten", OURS, {"artifact": str(artifact)}) as reference, _bar("quality", options.progress) as show:
            reference.ask("load", seconds=LOAD_SECONDS)
            for index, window in enumerate(windows):  # the logits of one window at a time: they take a gigabyte in the largest vocabularies
                reference.ask("write_logits", ids=window, path=logits)
                for turn, (name, worker) in enumerate(workers.items(), 1):
                    answers[name].append(worker.ask("score", ids=window, reference=logits))
                    show(index * len(workers) + turn, len(workers) * len(windows))
    return {name: _score(scored) for name, scored in answers.items()}


def _score(answers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Figures of one system from the sums over its windows."""
    tokens = sum(answer["tokens"] for answer in answers)

    def mean(name: str) -> float | None:
        values = [answer[name] for answer in answers]
        return sum(values) / tokens if all(value is not None and math.isfinite(value) for value in values) else None

    nll, kl, same = mean("nll"), mean("kl"), mean("same")
    return {
        "perplexity": None if nll is None else round(perplexity(nll, 1), 4),
        "kl": None if kl is None else round(max(kl, 0.0), 6),  # of equal distributions rounding may leave a little less than nothing
        "agreement": None if same is None else round(same, 4),
        "tokens": tokens if nll is not None else 0,
    }


# ---- what the runs say -------------------------------------------------------------------------------------------------------------


def speed(runs: Sequence[Run]) -> float:
    """Tokens per second over all runs: all tokens by all seconds."""
    return sum(len(run.ids) for run in runs) / max(sum(run.seconds for run in runs), 1e-9)


def summary(runs: Sequence[Run], categories: Sequence[str]) -> dict[str, Any]:
    """Fields that every system has."""
    ttft = [run.ttft_ms for run in runs if run.ttft_ms is not None]
    passes = [run for run in runs if run.tokens_per_pass is not None and run.passes]
    host = [run.host_ms_per_step for run in runs if run.host_ms_per_step is not None]
    return {
        "tokens_per_s": round(speed(runs), 2),
        "tokens_per_s_median": round(statistics.median(run.speed for run in runs), 2),
        "tokens_per_pass": round(_per_pass(passes), 4) if passes else None,
        "tokens": sum(len(run.ids) for run in runs),
        "prompts": len(runs),
        "ttft_ms": round(statistics.median(ttft), 2) if ttft else None,
        "peak_rss_mb": max(run.peak_rss_mb for run in runs),
        "host_ms_per_step": round(statistics.fmean(host), 4) if host else None,
        "categories": {
            name: {"tokens_per_s": round(speed([r for r, c in zip(runs, categories, strict=True) if c == name]), 2)}
            for name in dict.fromkeys(categories)
        },
    }


def _per_pass(runs: Sequence[Run]) -> float:
    """Tokens that a decoding pass committed on average over all runs."""
    passes = sum(run.passes or 0 for run in runs)
    return sum((run.tokens_per_pass or 0.0) * (run.passes or 0) for run in runs) / passes


_COUNTS = ("purposes", "widths", "accepted", "drafted_by", "accepted_by")


def request(prompt: Prompt, run: Run) -> dict[str, Any]:
    """One prompt's line of the JSON: what it took, and the counts that are not empty."""
    line = {"id": prompt.id, "tokens": len(run.ids), "seconds": round(run.seconds, 4), "ttft_ms": run.ttft_ms}
    return line | {name: counts for name in _COUNTS if (counts := getattr(run, name))}


def counted(runs: Sequence[Run]) -> dict[str, Any]:
    """The counts of all requests together, with the mean rows of a pass and the share of each drafter's guesses that was accepted."""
    total = {name: sum((Counter(getattr(run, name)) for run in runs), Counter[str]()) for name in _COUNTS}
    passes, drafted = total["widths"].total(), total["drafted_by"]
    return {
        **{name: dict(sorted(counts.items(), key=lambda entry: entry[0].rjust(8))) for name, counts in total.items()},  # numbers ascend
        "rows_per_pass": round(sum(int(rows) * count for rows, count in total["widths"].items()) / passes, 4) if passes else None,
        "acceptance": {name: round(total["accepted_by"][name] / count, 4) for name, count in drafted.items() if count},
    }


def compare(forms: dict[str | None, list[Run]], categories: Sequence[str]) -> dict[str, Any]:
    """A plan against its plain forms: equal tokens with the one of the same minimum of rows, speed with the fastest one."""
    plan, plain = forms["plan"], forms["plain"]
    fastest = max((name for name in forms if name != "plan"), key=lambda name: speed(forms[name]))
    reference = forms[fastest]
    result = summary(plan, categories)
    different = [index for index, (a, b) in enumerate(zip(plan, plain, strict=True)) if a.ids != b.ids]
    result |= {
        "decoding": counted(plan),
        "identical": len(plan) - len(different),
        "different": different,
        "plain": fastest,
        "plain_tokens_per_s": round(speed(reference), 2),
        "plain_same_rows_tokens_per_s": round(speed(plain), 2),
        "ratio": round(speed(plan) / speed(reference), 4),
        "ratio_median": round(statistics.median(a.speed / max(b.speed, 1e-9) for a, b in zip(plan, reference, strict=True)), 4),
    }
    for name, entry in result["categories"].items():
        pairs = [(a, b) for a, b, c in zip(plan, reference, categories, strict=True) if c == name]
        ours, theirs = [a for a, _ in pairs], [b for _, b in pairs]
        passes = [run for run in ours if run.tokens_per_pass is not None and run.passes]
        entry["ratio"] = round(speed(ours) / speed(theirs), 4)
        entry["tokens_per_pass"] = round(_per_pass(passes), 4) if passes else None
        entry["prompts"] = len(pairs)
    return result


def _facts(about: dict[str, Any], loaded: dict[str, Any], stored: Stored) -> dict[str, Any]:
    return {
        "exactness": about["exactness"],
        "exactness_line": about["exactness_line"],
        "min_rows": about["min_rows"],
        "bytes": about["bytes"],
        "torch_imported": about["torch"],
        "version": loaded["version"],
        "load_s": loaded["load_s"],
        "compile_s": stored.compile_s,
        "artifact": str(stored.directory),
    }


# ---- for people --------------------------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> Any:
    """The result as a rich table."""
    from rich.table import Table

    columns = ["tokens/s", "tokens/pass", "vs plain", "vs fastest peer", "identical", "exactness", "first token ms", "peak MB"]
    shown = Table(
        "system", title=f"{result['model']}, {result['prompts']} prompts x {result['max_new_tokens']} tokens", title_justify="left"
    )
    for name in columns:
        shown.add_column(name, justify="right")
    peer = next((row for row in result["peers"] if row["name"] == result["fastest_peer"]), None)
    for row in [*result["plans"], *result["peers"]]:
        ours = "plan" in row
        cells = [
            f"{row['tokens_per_s']:.1f}",
            _cell(row["tokens_per_pass"], ".2f"),
            f"{row['ratio']:.2f}x" if ours else "",
            f"{row['tokens_per_s'] / peer['tokens_per_s']:.2f}x" if peer else "",
            f"{row['identical']}/{row['prompts']}" if ours else "",
            str(row.get("exactness") or ""),
            _cell(row["ttft_ms"], ".0f"),
            f"{row['peak_rss_mb']:.0f}",
        ]
        shown.add_row(row["name"], *cells)
    return shown


def quality_table(result: dict[str, Any]) -> Any:
    """What the speed costs: how far each system is from the model without passes, and its size."""
    from rich.table import Table

    tokens = max(row["quality"]["tokens"] for row in [*result["plans"], *result["peers"]])
    shown = Table("system", title=f"quality on {tokens} tokens of {Path(result['quality']['file']).name}", title_justify="left")
    for name in ("perplexity", "KL to unrewritten", "same argmax", "file MB", "live MB", "tokens/s"):
        shown.add_column(name, justify="right")
    for row in [*result["plans"], *result["peers"]]:
        found = row["quality"]
        figures = [_cell(found["perplexity"], ".2f"), _cell(found["kl"], ".4f"), _cell(found["agreement"], ".1%")]
        sizes = [f"{row['file_bytes'] / 2**20:.0f}", f"{row['live_mb']:.0f}"]
        shown.add_row(row["name"], *figures, *sizes, f"{row['tokens_per_s']:.1f}")
    return shown


def category_table(result: dict[str, Any]) -> Any:
    """Tokens per second by category, with each plan's ratio to plain."""
    from rich.table import Table

    shown = Table("tokens/s (vs plain)")
    for name in result["categories"]:
        shown.add_column(name, justify="right")
    for row in [*result["plans"], *result["peers"]]:
        cells = [f"{e['tokens_per_s']:.1f}" + (f" ({e['ratio']:.2f}x)" if "ratio" in e else "") for e in row["categories"].values()]
        shown.add_row(row["name"], *cells)
    return shown


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


@contextmanager
def _bar(title: str, wanted: bool) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr that takes (done, total)."""
    from rich.console import Console

    from planc.runtime.profile import progress_bar

    with progress_bar(title, Console(stderr=True, quiet=not wanted)) as show:
        yield lambda done, total: show(100 * done // max(1, total), 100)


def _indented(value: Any, indent: str = "") -> str:
    """JSON with what fits on a line on one line."""
    line = json.dumps(value)
    if not isinstance(value, dict | list) or len(indent) + len(line) <= _LINE:
        return line
    inner = indent + "  "
    if isinstance(value, dict):
        parts = [f"{json.dumps(str(name))}: {_indented(item, inner)}" for name, item in value.items()]
    else:
        parts = [_indented(item, inner) for item in value]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return f"{opening}\n{inner}" + f",\n{inner}".join(parts) + f"\n{indent}{closing}"


def save(result: dict[str, Any], output: Path) -> None:
    """Write the result as JSON, complete or not at all."""
    write(output, (_indented(result) + "\n").encode(), "--output")
