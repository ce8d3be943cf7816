"""The command line on a toy engine: what it prints, what it returns, and what it must not import."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from typer.testing import CliRunner, Result

import planc
from planc.compiler import cli, store
from planc.compiler.store import Stored
from planc.runtime.contract import Contract, CostTable, Exactness
from planc.runtime.decode import Decode
from planc.runtime.errors import ModelError
from planc.runtime.executable import Executable
from planc.runtime.text import Text

ROOT = Path(__file__).resolve().parents[2]
SOURCE = str(Path(next(iter(planc.__path__))).absolute().parent)
WORDS = {f"w{number}": number for number in range(23)}


def toy_engine() -> Any:
    """The numpy engine of the runtime's tests; its top-k ids make drafts."""
    name = "planc_tests_toy_engine"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "tests/runtime/toy_engine.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name].ToyEngine(len(WORDS), predictable=1.0)


def executable(speculative: bool = True) -> Executable:
    tokenizer = Tokenizer(WordLevel(WORDS, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    data: dict[str, Any] = {"max_new_tokens": 20}
    if speculative:
        data["speculative"] = {"drafter": ["prompt_lookup", "token_recycling"], "tree": {"budget": 4}}
    exactness = Exactness(level="bitwise", chains="bitwise", trees="bitwise", min_rows=2)
    cost = CostTable(rows=(1, 8), past=(16,), measured=(((1.0, 1.1),),))
    return Executable(toy_engine(), Text(tokenizer), Decode.model_validate(data), Contract(exactness=exactness, cost=cost))


@pytest.fixture
def exe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Executable:
    made = executable()
    monkeypatch.setattr(store, "open_any", lambda plan, model: (made, Stored(tmp_path, 1.5, False)))
    return made


def planc_command(*arguments: str, **options: Any) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], **options)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": SOURCE, **environment}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, timeout=120, check=False)


# ---- run ---------------------------------------------------------------------------------------------------------------------------


def test_run_streams_then_tells(exe: Executable) -> None:
    result = planc_command("run", "plan.yaml", "w1 w2 w3", "--json")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    answer = json.loads(lines[-1])
    reference = exe.plain().generate("w1 w2 w3")
    assert not isinstance(reference, list)
    assert answer["ids"] == reference.ids
    assert lines[0] == answer["text"] == reference.text
    assert answer["identical"] is True
    assert answer["ratio"] > 0
    assert answer["tokens_per_pass"] > 1, "the toy model is predictable enough for drafts"
    assert (answer["exactness"], answer["compile_s"], answer["cached"]) == ("bitwise", 1.5, False)
    assert f"{answer['tokens']} tokens | " in lines[-2]
    assert "the same tokens" in lines[-2]


def test_run_says_that_tested_draws_give_another_sample(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = executable()
    assert made.decode.speculative is not None
    tested = made.decode.speculative.model_copy(update={"acceptance": "recursive"})
    made.decode = made.decode.model_copy(update={"speculative": tested})
    monkeypatch.setattr(store, "open_any", lambda plan, model: (made, Stored(tmp_path, 1.5, False)))
    for arguments, exactness in (((), "bitwise"), (("--temperature", "1"), "distribution")):
        result = planc_command("run", "plan.yaml", "w1 w2 w3", "--json", *arguments)
        assert json.loads(result.stdout.splitlines()[-1])["exactness"] == exactness
        assert f"exactness {exactness}" in result.stdout.splitlines()[-2] and "OTHER TOKENS" not in result.stdout


def test_run_without_comparison(exe: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Executable, "plain", lambda self: pytest.fail("the plain plan was made"))
    result = planc_command("run", "plan.yaml", "w1", "--no-compare", "--max-new-tokens", "5", "--json")
    answer = json.loads(result.stdout.splitlines()[-1])
    assert (answer["tokens"], answer["ratio"], answer["identical"]) == (5, None, None)
    assert "plain" not in result.stdout.splitlines()[-2]


def test_run_of_a_plain_plan_has_nothing_to_compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(store, "open_any", lambda plan, model: (executable(False), Stored(tmp_path, None, True)))
    result = planc_command("run", "plan.yaml", "w1", "--json")
    assert json.loads(result.stdout.splitlines()[-1])["ratio"] is None


def test_run_says_when_tokens_differ(exe: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    other = executable(False)
    other.engine.seed = 5  # type: ignore[attr-defined]
    monkeypatch.setattr(Executable, "plain", lambda self: other)
    result = planc_command("run", "plan.yaml", "w1 w2", "--json")
    assert "OTHER TOKENS" in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["identical"] is False


def test_run_passes_settings_on(exe: Executable, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []
    stream = Executable.stream
    monkeypatch.setattr(
        Executable, "stream", lambda self, prompt, **options: seen.append({"prompt": prompt, **options}) or stream(self, prompt, **options)
    )
    options = shlex.split(
        "--temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.01 --seed 3 --repetition-penalty 1.1 --raw --max-new-tokens 4 --stop w9"
    )
    result = planc_command("run", "plan.yaml", "-", "--no-compare", *options, input="w4 w5")
    assert result.exit_code == 0, result.output
    expected = {"prompt": "w4 w5", "temperature": 0.7, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "seed": 3, "repetition_penalty": 1.1}
    assert seen == [{**expected, "chat": False, "max_new_tokens": 4, "stop": ["w9"]}]


@pytest.mark.parametrize("colours", [True, False])
def test_run_tells_who_guessed(exe: Executable, colours: bool) -> None:
    environment = {"TERM": "xterm", "FORCE_COLOR": "1" if colours else "", "NO_COLOR": "" if colours else "1"}
    quiet, told, rounds = (
        planc_command("run", "plan.yaml", "w1 w2 w3", "--no-compare", "--json", *options, env=environment)
        for options in ([], ["-v"], ["-vv"])
    )
    assert rounds.exit_code == 0, rounds.output
    text = json.loads(quiet.stdout.splitlines()[-1])["text"]
    assert "\x1b" not in quiet.stdout
    for result in (told, rounds):
        assert ("\x1b[32m" in result.stdout) == colours
        shown = re.sub(r"\x1b\[[0-9;]*m", "", result.stdout).splitlines()
        assert text in shown
        assert json.loads(shown[-1])["text"] == text
        assert "the model's own" in "".join(shown[:1] if colours else shown)
    told_rounds = [line for line in re.sub(r"\x1b\[[0-9;]*m", "", rounds.stdout).splitlines() if re.match(r" *\d+ +\d+/\d", line)]
    accepted = sum(int(line.split()[1].split("/")[0]) for line in told_rounds)
    assert accepted + len(told_rounds) == json.loads(rounds.stdout.splitlines()[-1])["tokens"]


# ---- errors ------------------------------------------------------------------------------------------------------------------------


def test_an_error_of_the_user_is_a_message_and_status_2(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(plan: Path, model: str) -> None:
        raise ModelError("model-not-found", f"no model {model!r}", fix="use a name")

    monkeypatch.setattr(store, "open_any", refuse)
    result = planc_command("run", "plan.yaml", "hello", "--model", "nope")
    assert result.exit_code == 2
    assert "ModelError[model-not-found]: no model 'nope'" in result.stderr
    assert "use a name" in result.stderr
    assert "Traceback" not in result.output
    assert not result.stdout


def test_an_empty_prompt(exe: Executable) -> None:
    result = planc_command("run", "plan.yaml", "")
    assert result.exit_code == 2
    assert "prompt-empty" in result.stderr


def test_a_failure_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(plan: Path, model: str) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(store, "open_any", fail)
    result = planc_command("run", "plan.yaml", "hello")
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    "arguments",
    [("run",), ("run", "p"), ("bench", "p.yaml"), ("run", "p", "x", "--max-new-tokens", "0"), ("run", "p", "x", "--wrong"), ("other",)],
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = planc_command(*arguments)
    assert result.exit_code == 2
    assert result.stderr


def test_no_plan_or_artifact_there(tmp_path: Path) -> None:
    result = planc_command("run", str(tmp_path / "absent.yaml"), "hello")
    assert (result.exit_code, "plan-not-found" in result.stderr) == (2, True)
    result = planc_command("run", str(tmp_path), "hello")
    assert (result.exit_code, "artifact-not-found" in result.stderr) == (2, True)


def test_ctrl_c_is_status_130() -> None:
    code = """
    import signal, time
    from planc.compiler import cli, store
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with it ignored
    def wait(plan, model):
        print("ready", flush=True)
        time.sleep(60)
    store.open_any = wait
    cli.main()
    """
    env = {**os.environ, "PYTHONPATH": SOURCE}
    command = [sys.executable, "-c", textwrap.dedent(code), "run", "plan.yaml", "hello"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in errors


# ---- what is imported --------------------------------------------------------------------------------------------------------------


def test_importing_the_command_line_imports_no_torch() -> None:
    done = python("import sys, planc.compiler.cli; print(sorted({'torch', 'transformers', 'onnxruntime', 'numpy'} & set(sys.modules)))")
    assert done.stdout.strip() == "[]", done.stderr


def test_running_an_artifact_needs_no_torch(tmp_path: Path) -> None:
    """With torch and transformers refused, everything of `run DIR` but the engine itself is there."""
    done = python(
        f"""
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("torch", "transformers", "onnx", "onnxscript"):
                    raise ImportError(f"{{name}} is refused")
        sys.meta_path.insert(0, Refuse())
        sys.argv = ["planc", "run", {str(tmp_path)!r}, "hello"]
        from planc.compiler import cli
        cli.main()
        """
    )
    assert done.returncode == 2
    assert "artifact-not-found" in done.stderr
    assert "refused" not in done.stderr


# ---- the store ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """`compile` and `load` replaced: an artifact is a directory with a manifest that says how often it was made."""
    import types

    made: list[str] = []

    def compile_plan(model: str, plan: Any, *, out: Path, progress: bool) -> None:
        made.append(model)
        out.mkdir(parents=True, exist_ok=True)
        (out / "manifest.json").write_text(str(len(made)))

    monkeypatch.setenv("PLANC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "planc.compiler.compile", types.SimpleNamespace(compile=compile_plan))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "planc.compiler.plan", types.SimpleNamespace(Plan=types.SimpleNamespace(from_yaml=lambda path: None)))  # type: ignore[arg-type]
    return made


def test_second_run_compiles_nothing(compiler: list[str], tmp_path: Path) -> None:
    plan = tmp_path / "p.yaml"
    plan.write_text("planc: 1\n")
    first = store.obtain(plan, "m")
    second = store.obtain(plan, "m")
    assert (first.cached, second.cached, len(compiler)) == (False, True, 1)
    assert (second.directory, second.compile_s) == (first.directory, first.compile_s)
    plan.write_text("# the same plan, written otherwise\nplanc:   1\n")
    assert store.obtain(plan, "m").cached
    plan.write_text("planc: 1\nname: other\n")
    assert not store.obtain(plan, "m").cached
    assert not store.obtain(plan, "other model").cached
    assert len(compiler) == 3


def test_a_changed_model_or_source_is_another_artifact(compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = tmp_path / "p.yaml", tmp_path / "m.gguf"
    plan.write_text("planc: 1\n")
    model.write_text("weights")
    first = store.key(plan, str(model))
    assert store.key(plan, str(model)) == first
    model.write_text("other weights")
    second = store.key(plan, str(model))
    assert second != first
    monkeypatch.setattr(store, "_sources", lambda: "edited")
    assert store.key(plan, str(model)) != second


@pytest.mark.parametrize(
    "passes", ["passes: [load_weights: {file: w}]", "decode: {speculative: {drafter: [draft_model: {passes: [trim_vocab: {file: w}]}]}}"]
)
def test_a_changed_file_of_a_pass_is_another_artifact(passes: str, tmp_path: Path) -> None:
    """Wherever the pass stands; the file counts from the plan's folder."""
    plan, weights = tmp_path / "p.yaml", tmp_path / "w"
    plan.write_text(passes)
    missing = store.key(plan, "m")
    weights.write_text("one")
    first = store.key(plan, "m")
    weights.write_text("three")
    assert len({missing, first, store.key(plan, "m")}) == 3


def test_a_damaged_artifact_of_the_cache_is_made_again(compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from planc.runtime.errors import ArtifactError

    plan = tmp_path / "p.yaml"
    plan.write_text("planc: 1\n")

    def load(directory: Path) -> str:
        if (directory / "manifest.json").read_text() == "damaged":
            raise ArtifactError("artifact-corrupt", "changed")
        return "executable"

    monkeypatch.setitem(planc.__dict__, "load", load)
    _, stored = store.open_plan(plan, "m")
    (stored.directory / "manifest.json").write_text("damaged")
    assert store.open_plan(plan, "m")[0] == "executable"
    assert len(compiler) == 2
    own = tmp_path / "own"
    own.mkdir()
    (own / "manifest.json").write_text("damaged")
    with pytest.raises(ArtifactError):
        store.open_plan(own, "m")
    assert (own / "manifest.json").read_text() == "damaged"


def test_old_artifacts_go(compiler: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "KEEP", 2)
    plan = tmp_path / "p.yaml"
    plan.write_text("planc: 1\n")
    kept = []
    for number, model in enumerate("abc"):
        kept.append(store.obtain(plan, model))
        os.utime(kept[-1].directory.with_suffix(".json"), (number, number))
    assert [item.directory.is_dir() for item in kept] == [False, True, True]


# ---- the rest ----------------------------------------------------------------------------------------------------------------------


def test_check(tmp_path: Path) -> None:
    plan = tmp_path / "p.yaml"
    plan.write_text("planc: 1\npasses:\n  - quantize_weights: {format: int8}\n  - skip_layers: {layers: [3]}\n")
    result = planc_command("check", str(plan), "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout.splitlines()[-1])["passes"]
    names = [row["name"] for row in rows]
    assert names.index("skip_layers") < names.index("quantize_weights") < names.index("kv_cache")
    assert {row["name"] for row in rows if not row["demanded"]} == {"skip_layers", "quantize_weights"}
    plan.write_text("planc: 1\npasses:\n  - skip_layer: {layers: [3]}\n")
    result = planc_command("check", str(plan))
    assert result.exit_code == 2
    assert "plan-unknown-name" in result.stderr
    assert "p.yaml:3" in result.stderr


def test_schema_is_json_alone() -> None:
    assert json.loads(planc_command("schema").stdout)["title"] == "planc plan"


def test_passes_and_models() -> None:
    names = {row["name"] for row in json.loads(planc_command("passes", "--json").stdout.splitlines()[-1])["passes"]}
    assert {"skip_layers", "quantize_weights", "prompt_lookup", "token_recycling"} <= names
    names = {row["name"] for row in json.loads(planc_command("models", "--json").stdout.splitlines()[-1])["models"]}
    assert "smollm2-135m" in names


def test_papers() -> None:
    result = planc_command("papers", "--json")
    data = json.loads(result.stdout.splitlines()[-1])
    assert len(data["papers"]) == 87
    assert sum(data["counts"].values()) == 87
    assert {"number", "name", "plan", "status", "measured"} <= data["papers"][0].keys()


def test_bench_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from planc.compiler import bench

    prompts = tmp_path / "p.txt"
    prompts.write_text("one\ntwo\nthree\n")
    row = {"name": "a", "plan": "a.yaml", "tokens_per_s": 9.0, "tokens_per_pass": 1.5, "ratio": 1.2, "identical": 2, "prompts": 2}
    row |= {
        "exactness": "bitwise",
        "ttft_ms": 3.0,
        "peak_rss_mb": 70.0,
        "categories": {"all": {"tokens_per_s": 9.0, "ratio": 1.2}},
    }
    fixed = {
        "model": "m",
        "prompts": 2,
        "max_new_tokens": 7,
        "plans": [row],
        "peers": [],
        "fastest_peer": None,
        "quality": None,
        "categories": {"all": 2},
    }
    seen: list[Any] = []
    monkeypatch.setattr(
        bench, "bench", lambda plans, texts, options, note: seen.append((plans, texts, options)) or note("skipping x") or fixed
    )
    arguments = ["bench", "a.yaml", "b.yaml", "--prompts", str(prompts), "--limit", "2", "--max-new-tokens", "7", "--peer", "llama.cpp"]
    result = planc_command(*arguments, "--peer", "transformers", "--output", str(tmp_path / "r.json"), "--json")
    assert result.exit_code == 0, result.output
    (plans, texts, options), *_ = seen
    assert (len(plans), [text.text for text in texts], options.max_new_tokens) == (2, ["one", "two"], 7)
    assert options.peers == ("llama.cpp", "transformers")
    assert json.loads(result.stdout.splitlines()[-1]) == json.loads((tmp_path / "r.json").read_text()) == fixed
    assert [options.quality for _, _, options in seen] == [None]
    planc_command(*arguments, "--quality")
    planc_command(*arguments, "--quality-text", "novel.txt", "--quality-tokens", "512")
    assert seen[1][2].quality.name == "calibration.txt" and seen[1][2].quality.is_file()
    assert (seen[2][2].quality, seen[2][2].quality_tokens) == (Path("novel.txt"), 512)
    assert "skipping x" in result.stderr
    assert "skipping x" not in result.stdout


def test_every_command_of_the_contract() -> None:
    import typer

    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert set(commands) == {
        "run",
        "compile",
        "export",
        "bench",
        "check",
        "schema",
        "models",
        "passes",
        "papers",
        "profile",
        "explain",
        "search",
        "fit",
    }
    for command in commands.values():
        assert command.help


@pytest.mark.parametrize("speculative", [True, False])
def test_the_book_of_an_answer_is_the_answer(speculative: bool) -> None:
    from planc.compiler.told import tell

    told, answer = tell(executable(speculative), "w1 w2 w3"), executable(speculative).generate("w1 w2 w3")
    assert "".join(piece.text for piece in told.pieces) == answer.text
    assert told.tokens == answer.stats.tokens == sum(kept + 1 for _, kept in told.turns)
    assert told.drafters == (("prompt_lookup", "token_recycling") if speculative else ())
    assert (told.drafted, told.accepted) == (answer.stats.drafted_by, answer.stats.accepted_by)
    guessed = [piece for piece in told.pieces if piece.drafters]
    assert bool(guessed) == speculative
    assert all(told.turns[piece.turn][1] > 0 for piece in guessed)
    for name in told.drafters:
        assert sum(name in piece.drafters for piece in guessed) <= told.accepted[name]
