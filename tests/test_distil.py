"""The example that trains a draft model: what it writes is what a plan reads, and the file that is committed fits the plans that name it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from models_tiny import VOCAB, close, make
from safetensors import safe_open

import planc
from planc.backends.reference import probe
from planc.compiler.compile import rewrite
from planc.passes.load_weights import FITS, VOCABULARY
from planc.runtime.drafters import DraftModel
from planc.runtime.errors import CompileError

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
COMMITTED = EXAMPLES / "drafts/smollm2-135m-draft.safetensors"
LAYERS = [0, 2]


@pytest.fixture(scope="module")
def distil() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("distil", EXAMPLES / "drafts/distil.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["distil"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["distil"]


@pytest.fixture(scope="module")
def trained(distil: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny target, texts of it, and a draft after two runs of two steps."""
    folder = tmp_path_factory.mktemp("distil")
    target = make("llama", num_hidden_layers=3, tie_word_embeddings=True)
    target.save_pretrained(folder / "target")
    rng, chats = np.random.default_rng(0), []
    for length in rng.integers(8, 24, 60):
        chat = distil.Chat(rng.integers(3, VOCAB, length).tolist())
        with torch.no_grad():
            logits = target(torch.tensor([chat.tokens])).logits[0, :-1]
        values, top = logits.topk(distil.TEACHER)
        chat.expect(top.int().numpy(), (values - logits.logsumexp(1, keepdim=True)).half().numpy())
        chat.start = 4
        chats.append(chat)
    distil.save_texts(folder / "texts-000000.npz", chats)
    for steps in (2, 4):
        options = {
            "--work": folder,
            "--model": folder / "target",
            "--out": folder / "d.safetensors",
            "--keep": 40,
            "--steps": steps,
            "--tokens": 256,
        }
        distil.main(["train", *(str(word) for option in options.items() for word in option), "--layers", *map(str, LAYERS)])
    return folder


def test_a_second_run_goes_on_where_the_first_stopped(trained: Path) -> None:
    assert torch.load(trained / "d.pt", weights_only=True)["step"] == 4
    with safe_open(trained / "d.safetensors", "pt") as file:
        assert file.metadata()["steps"] == "4" and json.loads(file.metadata()["layers"]) == LAYERS


def test_a_plan_reads_what_training_wrote(distil: ModuleType, trained: Path) -> None:
    """The draft in the plan computes what the student computed, over the tokens that it chooses from."""
    passes = [{"skip_layers": {"keep": LAYERS}}, {"load_weights": {"file": "d.safetensors"}}, {"trim_vocab": {"file": "d.safetensors"}}]
    (trained / "plan.yaml").write_text(json.dumps({"passes": passes}))
    ids = torch.tensor([[5, 9, 5, 30]])
    logits = probe(rewrite(str(trained / "target"), trained / "plan.yaml").program, ids)["logits"]
    state = torch.load(trained / "d.pt", weights_only=True)
    student = distil.Student(make("llama", num_hidden_layers=3, tie_word_embeddings=True), LAYERS, state["keep"])
    with torch.no_grad():
        for name, value in student.weights().items():
            assert not torch.equal(value, state["weights"][name]), "every parameter was trained"
            value.copy_(state["weights"][name].half())
        want = student.body(ids, use_cache=False).last_hidden_state @ student.head.T
    assert len(state["keep"]) == 40
    close(logits[..., state["keep"]], want)


def test_another_target_is_refused(trained: Path) -> None:
    make("llama", seed=1, num_hidden_layers=3, tie_word_embeddings=True).save_pretrained(trained / "other")
    passes = [{"skip_layers": {"keep": LAYERS}}, {"load_weights": {"file": str(trained / "d.safetensors")}}]
    with pytest.raises(CompileError) as caught:
        rewrite(str(trained / "other"), {"passes": passes})
    assert caught.value.code == "pass-refused" and "other weights" in caught.value.message


def test_a_perfect_student_has_no_divergence(distil: ModuleType, trained: Path) -> None:
    target, texts = make("llama", num_hidden_layers=3, tie_word_embeddings=True), distil.read_texts(trained)
    perfect = distil.Student(target, [0, 1, 2], torch.arange(VOCAB))
    batch = distil.batch_of(texts, [0, 1, 2])
    with torch.no_grad():
        loss, same, overlap = distil.divergence(perfect, batch, 0.2)
        worse, _, less = distil.divergence(
            distil.Student(make("llama", seed=3, num_hidden_layers=3), [0, 1, 2], torch.arange(VOCAB)), batch, 0.2
        )
    assert float(loss) < 1e-2 < float(worse) and same > 0.9  # the student computes in bfloat16
    assert overlap == pytest.approx(float(batch.logp[batch.answer].exp().sum(1).mean()), abs=0.01) and less < overlap - 0.1


def test_the_committed_draft_fits_the_plans_that_name_it() -> None:
    with safe_open(COMMITTED, "pt") as file:
        about, names = file.metadata(), set(file.keys())
        kept = file.get_tensor(VOCABULARY)
        assert all(bool(torch.isfinite(file.get_tensor(name)).all()) for name in names - {VOCABULARY})
    assert about["model"] == "smollm2-135m" and len(about[FITS]) == 64 and COMMITTED.stat().st_size < 16 << 20
    layers = json.loads(about["layers"])
    assert {name.split(".")[2] for name in names if name.startswith("model.layers.")} == {str(layer) for layer in layers}
    assert names - {VOCABULARY} > {f"model.layers.{layer}.mlp.up_proj.weight" for layer in layers} and "model.norm.weight" in names
    assert bool((kept[1:] > kept[:-1]).all()) and int(kept[0]) >= 0 and int(kept[-1]) < 49152
    users = [path for path in EXAMPLES.rglob("*.yaml") if COMMITTED.name in path.read_text(encoding="utf-8")]
    assert len(users) >= 3
    for path in users:
        plan = planc.Plan.from_yaml(path)
        assert plan.decode.speculative is not None
        (part,) = [part for part in plan.decode.speculative.drafter if isinstance(part, DraftModel)]
        options = {item.key: item for item in part.passes}
        assert list(options["skip_layers"].keep) == layers  # type: ignore[attr-defined]
        for key in ("load_weights", "trim_vocab"):
            assert (path.parent / options[key].file).resolve() == COMMITTED  # type: ignore[attr-defined]
