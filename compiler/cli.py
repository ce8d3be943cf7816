"""The command line. Names and `--json` outputs are a contract (README.md); each command imports what it needs when it runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from planc.runtime.errors import InputError, PlancError

DEFAULT_MODEL = "smollm2-135m"

#: Exit statuses: wrong input, and Ctrl-C.
WRONG_INPUT, INTERRUPTED = 2, 130


class _Group(typer.core.TyperGroup):
    """Turns an error of the user into a message and status 2, and Ctrl-C into status 130; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except PlancError as error:
            print(error, file=sys.stderr)
            raise typer.Exit(WRONG_INPUT) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=_Group,
    name="planc",
    help="A compiler for inference plans: rewrite a model, decode it faster, and know how exact the result is.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PlanArg = Annotated[Path, typer.Argument(metavar="PLAN", help="plan file (YAML)", show_default=False)]
PlanOrDir = Annotated[Path, typer.Argument(metavar="PLAN|DIR", help="plan file, or an artifact", show_default=False)]
Model = Annotated[str, typer.Option("--model", "-m", help="a name of `planc models`, a directory, a GGUF file, or a Hugging Face id")]
Json = Annotated[bool, typer.Option("--json", help="print one JSON object last")]
Chat = Annotated[
    bool | None,
    typer.Option("--chat/--raw", help="use the chat template, or take the prompt as it is [default: chat where there is a template]"),
]


def main() -> None:
    """Entry point of the `planc` command."""
    app()


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and leave")] = False) -> None:
    if version:
        import planc

        print(planc.__version__)
        raise typer.Exit


@app.command()
def run(
    plan: PlanOrDir,
    prompt: Annotated[list[str], typer.Argument(help="the prompt (- reads it from standard input), or image files", show_default=False)],
    model: Model = DEFAULT_MODEL,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="most tokens to make [default: the plan's]")] = None,
    temperature: Annotated[float | None, typer.Option(min=0.0, help="0 is greedy [default: the plan's]")] = None,
    top_k: Annotated[int | None, typer.Option(min=0)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.0)] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="the same seed gives the same text")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="text that ends the answer; may be repeated")] = None,
    chat: Chat = None,
    compare: Annotated[bool, typer.Option("--compare/--no-compare", help="run the plain plan too, for the ratio")] = True,
    verbose: Annotated[int, typer.Option("--verbose", "-v", count=True, help="colour what each drafter guessed; -vv: every pass")] = 0,
    trace: Annotated[bool, typer.Option("--trace", help="masked slots: show the canvas after every pass")] = False,
    picture: Annotated[
        list[Path] | None, typer.Option("--png", "--gif", help="masked slots: draw when each was written and how surely; may be repeated")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compile the plan (once), stream an answer, and say how fast and how exact it was. DIR runs an artifact without torch."""
    from planc._load import text_only
    from planc.compiler.run_cli import answer_prompt, classify_images
    from planc.compiler.store import open_any
    from planc.runtime.filler import Filler
    from planc.runtime.vision import Classifier

    opened, stored = open_any(plan, model)
    made = {"artifact": str(stored.directory), "compile_s": stored.compile_s, "cached": stored.cached}
    if isinstance(opened, Classifier):
        classes = classify_images(opened, prompt)
        if as_json:
            _print_json({**classes, **made})
        return
    if len(prompt) > 1:
        raise InputError("input-invalid", f"there are {len(prompt)} prompts", fix="quote the prompt")
    text = sys.stdin.read() if prompt[0] == "-" else prompt[0]
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": stop or None,
        "chat": chat,
    }
    if isinstance(opened, Filler):
        from planc.compiler.masked_cli import fill

        result = fill(opened, text, settings, compare=compare, trace=trace, pictures=picture or ())
    else:
        result = answer_prompt(text_only(opened), text, settings, compare, verbose)
    if as_json:
        _print_json({**result, **made})


@app.command("compile")
def compile_plan(
    plan: PlanArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="directory to write the artifact to", show_default=False)],
    model: Model = DEFAULT_MODEL,
    disable: Annotated[list[str] | None, typer.Option(help="leave out this pass; may be repeated")] = None,
    as_json: Json = False,
) -> None:
    """Compile a model with a plan and write the artifact."""
    import time

    from planc.compiler.compile import compile as compile_model
    from planc.compiler.plan import Plan

    start = time.perf_counter()
    exe = compile_model(model, Plan.from_yaml(plan), out=out, disable=tuple(disable or ()), progress=True)
    seconds = time.perf_counter() - start
    report = exe.report()
    print(f"{out}: {report['bytes'] / 2**20:.1f} MiB in {seconds:.1f} s, exactness {report['exactness_line']}")
    if as_json:
        _print_json({"artifact": str(out), "model": model, "plan": str(plan), "compile_s": round(seconds, 2), **report})


@app.command()
def export(
    plan: PlanOrDir,
    out: Annotated[Path, typer.Option("--out", "-o", help="directory to write", show_default=False)],
    target: Annotated[str, typer.Option(help="edge: a folder for ONNX Runtime on devices and in browsers")] = "edge",
    model: Model = DEFAULT_MODEL,
    ort_format: Annotated[
        bool, typer.Option("--ort-format", help="also write the graph in ONNX Runtime's flat format, for phones")
    ] = False,
    as_json: Json = False,
) -> None:
    """Compile a plan (once), or take an artifact, and write a folder that runs without planc: with onnxruntime and numpy, or in a browser."""
    from planc.compiler.store import obtain

    if target != "edge":
        raise InputError("input-invalid", f"there is no target {target!r} to export to", fix="--target edge")
    try:
        from planc.backends.onnx.edge.export import describe, export_edge
    except ModuleNotFoundError as error:
        raise InputError("backend-missing", f"exporting needs {error.name}", fix="pip install 'planc[compile]'") from error
    stored = obtain(plan, model)
    made = export_edge(stored.directory, out, ort_format=ort_format, note=lambda line: print(line, file=sys.stderr))
    print("\n".join(describe(out, made)))
    if as_json:
        files = {name: entry.bytes for name, entry in made.files.items()}
        _print_json({"out": str(out), "task": made.task, "files": files, "bytes": sum(files.values()), **made.extra["edge"]})


@app.command()
def bench(
    plans: Annotated[list[Path], typer.Argument(metavar="PLAN...", help="plan files or artifacts", show_default=False)],
    prompts: Annotated[
        str | None, typer.Option(help='file: JSON lines {"id", "category", "turns"}, or a prompt a line', show_default=False)
    ] = None,
    suite: Annotated[str | None, typer.Option(help="tasks that can be judged, in place of --prompts: parallelbench")] = None,
    model: Model = DEFAULT_MODEL,
    limit: Annotated[int | None, typer.Option(help="prompts in all, evenly from every category")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 96,
    peer: Annotated[list[str] | None, typer.Option(help="compare with this library too; may be repeated")] = None,
    peer_python: Annotated[
        Path | None, typer.Option(help="interpreter that has the peers [default: PLANC_PEERS_PYTHON, ~/.cache/planc-peers, this one]")
    ] = None,
    quality: Annotated[bool, typer.Option("--quality", help="also compare each system with the model without passes, on a text")] = False,
    quality_text: Annotated[
        Path | None, typer.Option(help="that text; implies --quality [default: a short one that comes with planc]")
    ] = None,
    quality_tokens: Annotated[int, typer.Option(min=2, help="tokens of that text")] = 8192,
    chat: Chat = None,
    output: Annotated[Path | None, typer.Option(help="also write the JSON here")] = None,
    as_json: Json = False,
) -> None:
    """Measure plans against their plain form and against other libraries, on the same prompts in one run."""
    from planc.compiler import bench as race
    from planc.compiler.peers import peer_python as find_python
    from planc.compiler.quality import BUNDLED

    errors = Console(stderr=True)
    if suite is not None or prompts is None:
        from planc.compiler.masked_cli import suite_of

        columns, rows, judged = suite_of(suite, plans, model, limit, lambda line: errors.print(line, markup=False, highlight=False))
        if output is not None:
            race.save(judged, output)
        _print_table(columns, rows)
        if as_json:
            _print_json(judged)
        return
    options = race.Options(
        model=model,
        max_new_tokens=max_new_tokens,
        peers=tuple(dict.fromkeys(peer or ())),
        peer_python=find_python(peer_python),
        quality=quality_text or (BUNDLED if quality else None),
        quality_tokens=quality_tokens,
        chat=chat,
    )
    result = race.bench(plans, race.load_prompts(prompts, limit), options, lambda line: errors.print(line, markup=False, highlight=False))
    if output is not None:
        race.save(result, output)
    console = _console()
    console.print(race.table(result))
    if len(result["categories"]) > 1:
        console.print(race.category_table(result))
    if result["quality"]:
        console.print(race.quality_table(result))
    if as_json:
        _print_json(result)


@app.command()
def fit(
    plan: PlanArg,
    model: Model = DEFAULT_MODEL,
    prompts: Annotated[
        str | None,
        typer.Option(
            help="file of prompts to learn from, as for `bench`; left out: drafters learn from questions that the model writes itself",
            show_default=False,
        ),
    ] = None,
    suite: Annotated[str | None, typer.Option(help="learn from examples of these tasks: parallelbench")] = None,
    limit: Annotated[int, typer.Option(min=1, help="prompts in all")] = 400,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    work: Annotated[
        Path | None, typer.Option(help="draft_head, ngram_model: folder from which an interrupted run goes on [default: FILE.fit]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="draft_head, ngram_model: file to write [default: the one that the plan names]")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="draft_head, ngram_model: tokens that the target writes to learn from")] = 150_000,
    steps: Annotated[int, typer.Option(min=1, help="draft_head: steps of training")] = 400,
    minutes: Annotated[
        float | None, typer.Option(min=0.01, help="draft_head: minutes of training instead of `steps`; the rate falls with the time left")
    ] = None,
    unroll: Annotated[
        int, typer.Option(min=1, max=8, help="draft_head with a decoder layer: guesses deep that it is fed its own estimates in training")
    ] = 3,
    rate: Annotated[float, typer.Option(min=0.0, help="draft_head: highest learning rate")] = 1e-3,
    png: Annotated[Path | None, typer.Option(help="draft_head: draw the loss here")] = None,
    as_json: Json = False,
) -> None:
    """Learn what parts of a plan need from data, and write the files that they name beside the plan."""
    from planc.compiler.fit_cli import fit_parts, texts_of
    from planc.compiler.heads.train import Options
    from planc.compiler.plan import Plan

    read = Plan.from_yaml(plan)
    texts = texts_of(model, prompts, suite, limit, seed)
    options = Options(steps=steps, minutes=minutes, rate=rate, unroll=unroll, seed=seed)
    found = fit_parts(model, read, texts, options, work=work, out=out, tokens=tokens, png=png)
    if as_json:
        _print_json({"plan": str(plan), "model": model, "fitted": found})


@app.command()
def check(plan: PlanArg, as_json: Json = False) -> None:
    """Validate a plan and print its passes, with those that it demands, in the order in which they run."""
    from planc.compiler.compile import demanded
    from planc.compiler.pipeline import ordered
    from planc.compiler.plan import Plan

    checked = Plan.from_yaml(plan)
    named = {item.key for item in checked.passes}
    rows = [
        {"name": item.key, "stage": item.stage.name.lower(), "options": item.item()[item.key], "demanded": item.key not in named}
        for item in ordered(demanded(checked))
    ]
    for number, row in enumerate(rows, 1):
        options = ", ".join(f"{name}={value}" for name, value in row["options"].items())
        print(f"{number}. {row['stage']:<10} {row['name']}{f' ({options})' if options else ''}{' (demanded)' if row['demanded'] else ''}")
    speculative = checked.decode.speculative
    drafters = ", ".join(drafter.key for drafter in speculative.drafter) if speculative is not None else ""
    if checked.decode.masked is not None:
        filled = ", ".join(f"{name} {hook.key}" for name, hook in checked.decode.masked.by_name.items() if hook is not None)
        print(f"decode: masked slots, {filled}")
    else:
        print(f"decode: {f'speculative with {drafters}' if drafters else 'one token a pass'}")
    if checked.search is not None:
        print(f"search: {', '.join(space.key for space in checked.search.space)}; `planc search` settles it")
    print(f"target: {checked.target.backend} on {checked.target.device}")
    print(f"{plan}: the plan is valid")
    if as_json:
        _print_json({"valid": True, "plan": checked.to_dict(), "passes": rows})


@app.command()
def search(
    plan: PlanArg,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="plan file to write; several budgets give OUT-1, OUT-2, ...", show_default=False)
    ],
    model: Model = DEFAULT_MODEL,
    budget: Annotated[
        list[str] | None,
        typer.Option(help="`75% params`, `60 MB`, `4.0 ms`, `26 attention, 26 mlp`; may be repeated [default: the plan's]"),
    ] = None,
    text: Annotated[Path | None, typer.Option(help="text to compare on [default: a short one that comes with planc]")] = None,
    png: Annotated[Path | None, typer.Option(help="also draw the plans tried and found")] = None,
    seed: Annotated[int, typer.Option(min=0, help="the same seed finds the same plan")] = 0,
    generations: Annotated[int | None, typer.Option(min=1, help="[default: the plan's]")] = None,
    workers: Annotated[int, typer.Option(min=1, help="processes, or with --ray actors, that score candidates")] = 1,
    ray: Annotated[bool, typer.Option("--ray", help="run the workers on a Ray cluster (planc[ray])")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from OUT.search.json, which every generation writes")] = False,
    as_json: Json = False,
) -> None:
    """Settle what the section `search` of a plan leaves open, within a budget, and write the best plan."""
    from planc.compiler import files
    from planc.compiler.plan import Plan
    from planc.compiler.search import run as searching
    from planc.runtime.profile import progress_bar

    with progress_bar("searching") as show:
        result = searching.search(
            model,
            Plan.from_yaml(plan),
            budget or (),
            text=text,
            seed=seed,
            generations=generations,
            workers=workers,
            ray=ray,
            state=out.with_suffix(".search.json"),
            resume=resume,
            note=lambda line: print(line, file=sys.stderr),
            progress=lambda done, total: show(100 * done // total, 100),
        )
    written = [out if len(result.found) == 1 else out.with_stem(f"{out.stem}-{number}") for number in range(1, len(result.found) + 1)]
    for file, found in zip(written, result.found, strict=True):
        files.write(file, found.plan.to_yaml().encode())
        print(f"{file}: {found.reached}, KL {found.kl:.4g} (the best random start: {found.start_kl:.4g})")
    if png is not None:
        files.write(png, searching.picture_of(result, f"{plan.stem} on {model}"))
    if as_json:
        plans = [{"file": str(file), **found.as_dict()} for file, found in zip(written, result.found, strict=True)]
        _print_json({"model": model, "plans": plans, "png": str(png) if png else None})


@app.command()
def schema() -> None:
    """Print the JSON Schema of plans, for editors."""
    from planc.compiler.plan import Plan

    print(json.dumps(Plan.schema(), indent=2))


@app.command()
def models(as_json: Json = False) -> None:
    """List the models that can be had by name."""
    from planc.compiler.models import models as known

    rows = [vars(model) for model in known()]
    _print_table(("name", "state", "megabytes", "licence", "about"), rows)
    if as_json:
        _print_json({"models": rows})


@app.command()
def passes(as_json: Json = False) -> None:
    """List what a plan can name: passes, drafters and builders."""
    from importlib import import_module

    from planc.compiler.plan import Plan
    from planc.runtime.registry import kinds, parts

    Plan()  # registers every part
    import_module("planc.runtime.drafters")
    import_module("planc.runtime.builders")
    rows: list[dict[str, Any]] = []
    for kind in kinds():
        for key, part in sorted(parts(kind).items(), key=lambda entry: (getattr(entry[1], "stage", 0), entry[0])):
            about = (part.__doc__ or "").strip().split("\n")[0]
            stage = getattr(part, "stage", None)
            rows.append(
                {
                    "name": key,
                    "kind": kind,
                    "stage": stage.name.lower() if stage is not None else "",
                    "options": list(part.model_fields),
                    "about": about,
                }
            )
    _print_table(("name", "kind", "stage", "options", "about"), rows)
    if as_json:
        _print_json({"passes": rows})


@app.command()
def papers(
    run_checks: Annotated[bool, typer.Option("--run", help="run the checks and write benchmarks/results/papers.json")] = False,
    only: Annotated[list[int] | None, typer.Option(help="with --run: only this paper; may be repeated")] = None,
    as_json: Json = False,
) -> None:
    """List the 87 methods: plan, state, and what was measured."""
    from planc.compiler import papers as catalogue

    fine = not run_checks or catalogue.run(only or None, lambda line: print(line, file=sys.stderr))
    rows = catalogue.listing()
    _print_table(("number", "name", "status", "plan", "summary"), rows)
    counts = {status: sum(row["status"] == status for row in rows) for status in catalogue.STATUSES}
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
    if as_json:
        _print_json({"papers": rows, "counts": counts})
    if not fine:
        raise typer.Exit(1)


@app.command()
def profile(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="artifact", show_default=False)],
    seconds: Annotated[float, typer.Option(min=0.1, help="time for measuring")] = 6.0,
    write: Annotated[bool, typer.Option("--write/--no-write", help="store the new table in the manifest")] = True,
    as_json: Json = False,
) -> None:
    """Measure what a pass costs on this machine and store it in the artifact."""
    from planc._load import load_text
    from planc.runtime.artifact import write_manifest
    from planc.runtime.contract import hardware
    from planc.runtime.profile import cost_rows, measure_cost, progress_bar

    exe = load_text(directory)
    assert exe.manifest is not None
    with progress_bar("measuring passes") as show:
        cost = measure_cost(exe.engine, batch=exe.decode.batch_sizes, capacity=min(exe.capacity, 1024), seconds=seconds, progress=show)
    contract = exe.contract.model_copy(update={"cost": cost, "hardware": hardware()})
    if write:
        write_manifest(directory, exe.manifest.model_copy(update={"contract": contract}))
    _console().print(cost_rows(cost))
    print(f"exactness {exe.report()['exactness_line']}")
    if as_json:
        _print_json({"artifact": str(directory), "written": write, "contract": contract.model_dump(mode="json")})


@app.command()
def explain(
    plan: PlanArg,
    model: Model = DEFAULT_MODEL,
    html: Annotated[Path | None, typer.Option(help="also write a page with pictures of it")] = None,
    prompt: Annotated[str | None, typer.Option(help="with --html: answer this (compiles once) and show who guessed which token")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="with --prompt [default: the plan's]")] = None,
    as_json: Json = False,
) -> None:
    """Show what every pass of a plan does to a model: nodes, parameters, bytes and FLOPs before and after."""
    from planc.compiler import explain as explaining
    from planc.compiler.plan import Plan
    from planc.compiler.store import compiled, open_plan
    from planc.compiler.told import tell
    from planc.runtime.artifact import read_artifact

    if prompt is not None and html is None:
        raise InputError("input-invalid", "the answer to a prompt is shown on the page", fix="name a file with --html")
    steps = explaining.explain(model, Plan.from_yaml(plan))
    title = f"{plan.stem} on {model}"
    _console().print(explaining.table(steps, title))
    if chart := explaining.memory_chart(steps):
        print(chart)
    if html is not None:
        told = None if prompt is None else tell(open_plan(plan, model)[0], prompt, max_new_tokens)
        artifact = compiled(plan, model)
        contract = None if artifact is None else read_artifact(artifact, verify=False).contract
        explaining.write_html(html, steps, title, contract, told)
    if as_json:
        _print_json({"plan": str(plan), "model": model, "steps": [step.as_dict() for step in steps]})


# ---- output ------------------------------------------------------------------------------------------------------------------------


def _console() -> Console:
    """For tables on stdout: as wide as the terminal, and never cut when the output goes to a file."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=200)


def _print_table(columns: tuple[str, ...], rows: Iterable[dict[str, Any]]) -> None:
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_text(row.get(column)) for column in columns))
    _console().print(table)


def _text(value: Any) -> Text:
    if value is None:
        return Text("")
    return Text(", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value))  # a `[` in a text is no markup


def _print_json(value: dict[str, Any]) -> None:
    """The last line of stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


if __name__ == "__main__":
    main()
