"""Train a small draft model out of its target: a few of the target's own decoder layers, taught to guess what the target writes next.

    python examples/drafts/distil.py texts --work DIR            the target writes answers; its 32 likeliest tokens per position are kept
    python examples/drafts/distil.py train --work DIR --out FILE  the layers learn from them; goes on where it stopped
    python examples/drafts/distil.py score --work DIR             how often the draft guesses the target's token on texts it has not seen

Embedding and output layer stay the target's own, so that FILE holds the decoder layers and the last norm alone. It enters a plan as
`draft_model: {passes: [skip_layers: {keep: LAYERS}, load_weights: {file: FILE}, trim_vocab: {file: FILE}]}`: FILE also lists the tokens that the
draft chooses from, the most frequent ones in what the target wrote (papers/48). The recipe is FastDraft's last stage (papers/79) with
distillation of the whole distribution in place of its sequences (papers/12).

Prompts come from files (`--prompts`, one JSON object with `turns` or `prompt` a line, of which the first `--hold-out` of every category are
never used), from passages of plain text (`--passages`, its first half), from the docstrings of Python's own library, and from the target
itself, which continues the empty turn of a user.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import planc
from planc.compiler.compile import rewrite
from planc.compiler.models import load_model
from planc.passes.load_weights import FITS, VOCABULARY, fingerprint
from planc.runtime.engine import Cache, Outputs, Step

TEACHER = 32  # tokens of the target's distribution kept per position; the rest is one lump
PROMPT, ANSWER = 320, 160  # longest of either, in tokens
LANES, BATCH, CHUNK = 32, 96, 128  # conversations in a pass, and in a file; rows of a pass that reads a prompt
TEMPERATURES = (0.0, 0.0, 0.7, 1.0)  # of answers, in turn
PYTHON = (
    "collections itertools functools statistics string textwrap random os shutil json csv datetime re"  # modules that prompts are about
)
MARK = "\u2603"
PLAN = {  # the target: rows of all conversations share its products
    "passes": ["smooth", {"quantize_weights": {"format": "int8"}}],
    "decode": {"batching": {"sequences": LANES}},
}


@dataclass(frozen=True)
class Texts:
    """Conversations of the target. `top` and `logp` [tokens - 1, TEACHER]: what it expected behind each token; answers begin at `starts`."""

    tokens: list[np.ndarray]
    starts: list[int]
    top: list[np.ndarray]
    logp: list[np.ndarray]


# ---- prompts -----------------------------------------------------------------------------------------------------------------------


def file_prompts(path: Path, hold_out: int) -> list[str]:
    """First turns of a prompt file without the first `hold_out` of every category, which are for measuring."""
    seen: Counter[str] = Counter()
    prompts = []
    for line in path.read_text(encoding="utf-8").splitlines():
        data = json.loads(line)
        seen[data.get("category", "")] += 1
        if seen[data.get("category", "")] > hold_out:
            prompts += data["turns"] if "turns" in data else [data["prompt"]]
    return prompts


def passage_prompts(path: Path, number: int, rng: random.Random) -> list[str]:
    """Tasks about passages of the first half of a text."""
    text = path.read_text(encoding="utf-8")
    passages = [p.strip() for p in text[: len(text) // 2].split("\n") if 300 < len(p) < 1200]
    tasks = (
        "Summarize: {}",
        "{}\n\nWhat is this text about?",
        "Rewrite this text in simple words.\n\n{}",
        "{}\n\nList three facts from it.",
    )
    return [rng.choice(tasks).format(p) for p in rng.sample(passages, min(number, len(passages)))]


def python_prompts(number: int, rng: random.Random) -> list[str]:
    """Tasks about functions of the standard library, by their docstrings."""
    tasks = (
        "Write a Python function for this: {1}",
        "What does `{0}` in Python do? Give an example.",
        "Explain this documentation of `{0}`:\n{1}",
    )
    found = [
        (f"{module}.{name}", inspect.cleandoc(member.__doc__)[:600])
        for module in PYTHON.split()
        for name, member in inspect.getmembers(import_module(module), callable)
        if not name.startswith("_") and member.__doc__
    ]
    return [rng.choice(tasks).format(*pair) for pair in rng.sample(found, min(number, len(found)))]


def own_prompts(target: Target, number: int, noise: np.random.Generator) -> Iterator[str]:
    """What the target writes where a user would: it was trained on such turns and knows what they look like (Magpie)."""
    header, _, _ = target.text.render_chat([{"role": "user", "content": MARK}]).partition(MARK)
    ids = target.text.encode(header, special=False)
    for chat in target.write([ids] * max(0, number), [1.0] * number, 64, noise):
        question = target.text.decode(chat.tokens[len(ids) :]).strip()
        if question:
            yield question


# ---- the target writes -------------------------------------------------------------------------------------------------------------


class Target:
    """The target as it will be drafted for, in 8 bits; prompts of any length share its passes."""

    def __init__(self, model: str) -> None:
        self._exe = planc.compile(model, {**PLAN, "target": {"threads": torch.get_num_threads()}}, measure=False)
        self.text, self._eos = self._exe.text, set(self._exe.eos_ids)

    def write(self, prompts: list[list[int]], temperatures: list[float], longest: int, rng: np.random.Generator) -> list[Chat]:
        """Continue every prompt (token ids) by up to `longest` tokens; at most `LANES` at a time, the next begins where one ends."""
        cache = self._exe.engine.new_cache(LANES, max(map(len, prompts)) + longest)
        chats = [Chat(prompt) for prompt in prompts]
        waiting, lanes = list(range(len(prompts))), dict[int, int]()  # lane -> conversation
        while waiting or lanes:
            for lane in range(LANES):
                if lane not in lanes and waiting:
                    lanes[lane] = waiting.pop(0)
                    cache.rollback(lane, 0)
                    self._read(cache, lane, chats[lanes[lane]], temperatures[lanes[lane]], rng)
            live = sorted(lanes)
            step = Step(
                np.array([[chats[lanes[lane]].tokens[-1]] for lane in live]), sequences=np.array(live), counts=np.ones(len(live), np.int64)
            )
            top, logp = _expected(self._exe.engine.forward(cache, step, logits=True))
            for row, lane in enumerate(live):
                cache.keep(lane, np.array([0]))
                chat = chats[lanes[lane]]
                chat.add(top[row : row + 1], logp[row : row + 1], temperatures[lanes[lane]], rng)
                if chat.tokens[-1] in self._eos or chat.written == longest:
                    del lanes[lane]
        return chats

    def _read(self, cache: Cache, lane: int, chat: Chat, temperature: float, rng: np.random.Generator) -> None:
        """Feed a prompt and write the first token."""
        for first in range(0, chat.start, CHUNK):
            part = np.array([chat.tokens[first : first + CHUNK]])
            top, logp = _expected(self._exe.engine.forward(cache, Step(part, sequences=np.array([lane])), logits=True))
            cache.keep(lane, np.arange(part.shape[1]))
            chat.expect(top, logp)
        chat.draw(temperature, rng)


class Chat:
    """A conversation, and what the target expected behind each of its tokens."""

    def __init__(self, prompt: list[int]) -> None:
        self.tokens, self.start = list(prompt), len(prompt)
        self.top, self.logp = list[np.ndarray](), list[np.ndarray]()

    @property
    def written(self) -> int:
        """Tokens after the prompt."""
        return len(self.tokens) - self.start

    def add(self, top: np.ndarray, logp: np.ndarray, temperature: float, rng: np.random.Generator) -> None:
        """What follows the last token, and a token that follows."""
        self.expect(top, logp)
        self.draw(temperature, rng)

    def expect(self, top: np.ndarray, logp: np.ndarray) -> None:
        """The likeliest tokens [n, TEACHER] after the next n tokens, with log-probabilities."""
        self.top.append(top)
        self.logp.append(logp)

    def draw(self, temperature: float, rng: np.random.Generator) -> None:
        """Append a token: the likeliest at temperature 0, else a sample of the listed ones."""
        scores = self.logp[-1][-1].astype(np.float64)
        noise = rng.gumbel(size=scores.shape) * temperature
        self.tokens.append(int(self.top[-1][-1][np.argmax(scores + noise)]))


def _expected(outputs: Outputs) -> tuple[np.ndarray, np.ndarray]:
    """The likeliest tokens of all rows of a pass, [n, TEACHER] int32 by falling probability, and their log-probabilities, float16."""
    logits = torch.from_numpy(outputs.logits).flatten(0, 1)
    values, top = logits.topk(TEACHER)
    return top.int().numpy(), (values - logits.logsumexp(1, keepdim=True)).half().numpy()


def write_texts(args: argparse.Namespace) -> None:
    """Answers of the target, a file per batch; batches that exist are not written again."""
    args.work.mkdir(parents=True, exist_ok=True)
    target, rng = Target(args.model), random.Random(0)
    noise = np.random.default_rng(0)
    listed = args.work / "prompts.json"
    if not listed.exists():
        prompts = [p for path in args.prompts for p in file_prompts(path, args.hold_out)] * args.repeat
        for path in args.passages:
            prompts += passage_prompts(path, args.number // 8, rng)
        prompts += python_prompts(args.number // 8, rng)
        prompts += own_prompts(target, args.number - len(prompts), noise)
        rng.shuffle(prompts)
        listed.write_text(json.dumps(prompts))
    prompts = json.loads(listed.read_text())
    frame = len(target.text.apply_chat([{"role": "user", "content": ""}]))
    for first in range(0, len(prompts), BATCH):
        path, start = args.work / f"texts-{first:06}.npz", time.perf_counter()
        if path.exists():
            continue
        asked = []
        for prompt in prompts[first : first + BATCH]:
            cut = target.text.decode(target.text.encode(prompt, special=False)[: PROMPT - frame])
            asked.append(target.text.apply_chat([{"role": "user", "content": cut}]))
        chats = target.write(asked, [TEMPERATURES[i % len(TEMPERATURES)] for i in range(len(asked))], ANSWER, noise)
        save_texts(path, chats)
        written, seconds = sum(chat.written for chat in chats), time.perf_counter() - start
        print(
            f"{path.name}: {written} tokens after {sum(chat.start for chat in chats)} of prompts, {written / seconds:.0f} a second",
            flush=True,
        )


def save_texts(path: Path, chats: list[Chat]) -> None:
    """Conversations in one file."""
    partial = path.with_suffix(".partial.npz")
    np.savez(
        partial,
        tokens=np.concatenate([chat.tokens for chat in chats]).astype(np.int32),
        lengths=np.array([len(chat.tokens) for chat in chats]),
        starts=np.array([chat.start for chat in chats]),
        top=np.concatenate([part for chat in chats for part in chat.top]),  # one row less than tokens in each conversation
        logp=np.concatenate([part for chat in chats for part in chat.logp]),
    )
    partial.rename(path)


def read_texts(work: Path) -> Texts:
    """All texts that were written so far."""
    texts = Texts([], [], [], [])
    for path in sorted(work.glob("texts-??????.npz")):
        with np.load(path) as data:
            lengths = data["lengths"]
            texts.tokens.extend(np.split(data["tokens"], np.cumsum(lengths)[:-1]))
            texts.starts.extend(data["starts"].tolist())
            texts.top.extend(np.split(data["top"], np.cumsum(lengths - 1)[:-1]))
            texts.logp.extend(np.split(data["logp"], np.cumsum(lengths - 1)[:-1]))
    if not texts.tokens:
        sys.exit(f"no texts in {work}: run `distil.py texts` first")
    return texts


# ---- the draft learns --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Tokens and mask [B, L]; the teacher's ids and log-probabilities [B, L, TEACHER] of what follows; which of that is answer [B, L]."""

    tokens: Tensor
    mask: Tensor
    top: Tensor
    logp: Tensor
    answer: Tensor


class Student(nn.Module):
    """Some decoder layers of the target between its frozen embedding and the rows `keep` of its frozen output layer."""

    def __init__(self, module: Any, layers: list[int], keep: Tensor) -> None:
        super().__init__()
        self.body, self.layers, self.keep = module.model, layers, keep
        self.body.layers = nn.ModuleList([self.body.layers[i] for i in layers])
        for index, layer in enumerate(self.body.layers):
            layer.self_attn.layer_idx = index
        self.body.config.num_hidden_layers = len(layers)
        self.body.embed_tokens.requires_grad_(False)
        self.head = module.lm_head.weight[keep].detach().clone()
        self.slot = torch.full((module.lm_head.weight.shape[0],), -1)
        self.slot[keep] = torch.arange(len(keep))

    def forward(self, tokens: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """Log-probabilities [n, kept] at the positions `wanted` [B, L] of `tokens` [B, L]."""
        with torch.autocast("cpu", torch.bfloat16):
            hidden = self.body(tokens, attention_mask=mask, use_cache=False).last_hidden_state[wanted]
            logits = functional.linear(hidden, self.head)
        return torch.log_softmax(logits.float(), 1)

    def weights(self) -> dict[str, Tensor]:
        """Trained parameters under the names that the target gives them."""
        named = {}
        for name, value in self.body.named_parameters():
            if value.requires_grad:
                parts = name.split(".")
                if parts[0] == "layers":
                    parts[1] = str(self.layers[int(parts[1])])
                named[".".join(["model", *parts])] = value
        return named


def batch_of(texts: Texts, chosen: list[int]) -> Batch:
    """Conversations [B, L] side by side."""
    width = max(len(texts.tokens[i]) for i in chosen) - 1
    tokens, mask = torch.zeros(len(chosen), width, dtype=torch.long), torch.zeros(len(chosen), width, dtype=torch.long)
    top, logp = torch.zeros(len(chosen), width, TEACHER, dtype=torch.long), torch.zeros(len(chosen), width, TEACHER)
    answer = torch.zeros(len(chosen), width, dtype=torch.bool)
    for row, i in enumerate(chosen):
        size = len(texts.tokens[i]) - 1
        tokens[row, :size], mask[row, :size] = torch.from_numpy(texts.tokens[i][:-1]), 1
        top[row, :size], logp[row, :size] = torch.from_numpy(texts.top[i]), torch.from_numpy(texts.logp[i])
        answer[row, texts.starts[i] - 1 : size] = True
    return Batch(tokens, mask, top, logp, answer)


def divergence(student: Student, batch: Batch, prompts: float) -> tuple[Tensor, float, float]:
    """Kullback-Leibler divergence from the teacher over answers, and over prompts with the weight `prompts`.

    Also, for answers, the share of equal first choices and the mean of sum min(p, q), which is what sampling would accept. Kept tokens of the
    teacher's list count one by one; what it gave to all others is one event.
    """
    wanted = batch.mask.bool() if prompts else batch.answer
    weight = torch.where(batch.answer[wanted], 1.0, prompts)
    q = student(batch.tokens, batch.mask, wanted)
    slot, logp = student.slot[batch.top[wanted]], batch.logp[wanted]
    known = slot >= 0
    p = logp.exp() * known
    q_at = q.gather(1, slot.clamp(min=0))
    rest_p, rest_q = (1 - p.sum(1)).clamp(min=1e-6), (1 - (q_at.exp() * known).sum(1)).clamp(min=1e-6)
    each = (p * (logp - q_at)).sum(1) + rest_p * (rest_p / rest_q).log()
    answer = batch.answer[wanted]
    same = float((q.argmax(1) == slot[:, 0])[answer].float().mean())
    overlap = float(torch.minimum(p, q_at.detach().exp() * known).sum(1)[answer].mean())
    return (each * weight).sum() / weight.sum(), same, overlap


def split(texts: Texts) -> tuple[list[int], list[int]]:
    """Numbers of the conversations to learn from, and of one in twenty to judge by."""
    held = set(range(0, len(texts.tokens), 20))
    return [i for i in range(len(texts.tokens)) if i not in held], sorted(held)


def frequent(texts: Texts, chosen: list[int], number: int, always: tuple[int, ...]) -> Tensor:
    """The tokens that the target expected most often in its answers, ascending; lower numbers first among equals."""
    expected = np.zeros(max(int(texts.top[i].max()) for i in chosen) + 1)
    for i in chosen:
        begin = texts.starts[i] - 1
        np.add.at(expected, texts.top[i][begin:], np.exp(texts.logp[i][begin:].astype(np.float32)))
    expected[list(always)] = np.inf
    return torch.from_numpy(np.sort(np.argsort(-expected, kind="stable")[:number]))


def batches(texts: Texts, chosen: list[int], tokens: int, rng: random.Random) -> Iterator[list[int]]:
    """Conversations of like length in batches of about `tokens`, for ever, in another order each time."""
    while True:
        order = sorted(chosen, key=lambda i: len(texts.tokens[i]) + rng.uniform(-20, 20))
        groups: list[list[int]] = [[]]
        for i in order:
            if (len(groups[-1]) + 1) * len(texts.tokens[i]) > tokens and groups[-1]:
                groups.append([])
            groups[-1].append(i)
        rng.shuffle(groups)
        yield from groups


@torch.no_grad()
def judge(student: Student, texts: Texts, held: list[int]) -> dict[str, float]:
    """Loss, share of equal first choices and overlap on held-out conversations."""
    student.eval()
    figures = [[float(x) for x in divergence(student, batch_of(texts, held[i : i + 8]), 0.0)] for i in range(0, len(held), 8)]
    student.train()
    return dict(zip(("kl", "same", "overlap"), np.mean(figures, 0).round(4).tolist(), strict=True))


def train(args: argparse.Namespace) -> None:
    """Adam with a warm-up and a cosine; a checkpoint every fifty steps, the weights with it."""
    texts = read_texts(args.work)
    chosen, held = split(texts)
    loaded = load_model(args.model)
    saved = args.work / f"{args.out.stem}.pt"
    state = torch.load(saved, weights_only=True) if saved.exists() else None
    keep = frequent(texts, chosen, args.keep, loaded.eos_ids) if state is None else state["keep"]
    torch.manual_seed(0)
    student = Student(loaded.module, args.layers, keep)
    weights = student.weights()
    around = rewrite(args.model, {"passes": [{"skip_layers": {"keep": args.layers}}]}, check=False).program
    fits = fingerprint(around.params, weights)  # of what the draft shares with its target
    optimizer = torch.optim.AdamW(weights.values(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01)
    step = 0
    if state is not None:
        step = state["step"]
        with torch.no_grad():
            for name, value in weights.items():
                value.copy_(state["weights"][name])
        optimizer.load_state_dict(state["optimizer"])
    stream = batches(texts, chosen, args.tokens, random.Random(step))
    tokens = sum(len(texts.tokens[i]) - texts.starts[i] for i in chosen)
    print(f"{len(chosen)} conversations, answers of {tokens} tokens, from step {step}: {judge(student, texts, held)}", flush=True)
    losses, start = [], time.perf_counter()
    while step < args.steps:
        share = min(1.0, (step + 1) / 50) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / args.steps)))
        for group in optimizer.param_groups:
            group["lr"] = args.rate * share
        loss, _, _ = divergence(student, batch_of(texts, next(stream)), args.prompt_weight)
        loss.backward()
        nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        step += 1
        if step % 50 == 0 or step == args.steps:
            figures = judge(student, texts, held)
            print(f"step {step}: loss {np.mean(losses):.4f}, {time.perf_counter() - start:.0f} s, held out {figures}", flush=True)
            losses = []
            partial = saved.with_suffix(".partial")
            torch.save({"step": step, "keep": keep, "weights": weights, "optimizer": optimizer.state_dict()}, partial)
            partial.replace(saved)
            write(student, args, fits, step, figures)


def write(student: Student, args: argparse.Namespace, fits: str, step: int, figures: dict[str, float]) -> None:
    """The weights in half precision, with the kept tokens and what they belong to."""
    tensors = {name: value.detach().half().contiguous() for name, value in student.weights().items()}
    about = {"model": args.model, "layers": json.dumps(args.layers), "steps": str(step), "held_out": json.dumps(figures), FITS: fits}
    save_file({**tensors, VOCABULARY: student.keep.int()}, args.out, about)


def score(args: argparse.Namespace) -> None:
    """Figures of the last checkpoint."""
    texts = read_texts(args.work)
    state = torch.load(args.work / f"{args.out.stem}.pt", weights_only=True)
    student = Student(load_model(args.model).module, args.layers, state["keep"])
    with torch.no_grad():
        for name, value in student.weights().items():
            value.copy_(state["weights"][name])
    print(json.dumps({"step": state["step"], **judge(student, texts, split(texts)[1])}))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("texts", "train", "score"))
    parser.add_argument("--work", type=Path, required=True, help="directory for texts and checkpoints")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("smollm2-135m-draft.safetensors"))
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="prompt files (JSON lines)")
    parser.add_argument("--hold-out", type=int, default=16, help="prompts of every category of a file that are never used")
    parser.add_argument("--repeat", type=int, default=2, help="answers per prompt of a file")
    parser.add_argument("--passages", type=Path, nargs="*", default=[], help="plain texts")
    parser.add_argument("--prompt-weight", type=float, default=0.2, help="weight of the prompts' tokens in training")
    parser.add_argument("--number", type=int, default=560, help="prompts in all")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 29], help="decoder layers of the target that the draft starts from")
    parser.add_argument("--keep", type=int, default=8192, help="tokens that the draft chooses from")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per step")
    parser.add_argument("--rate", type=float, default=1e-3, help="highest learning rate")
    args = parser.parse_args(arguments)
    {"texts": write_texts, "train": train, "score": score}[args.task](args)


if __name__ == "__main__":
    main()
