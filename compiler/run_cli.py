"""What `planc run` prints and reports: an answer as it comes, or the classes of images."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from planc.compiler.colours import Painter
from planc.runtime.executable import Executable, Generation
from planc.runtime.vision import Classifier


def answer_prompt(exe: Executable, text: str, settings: dict[str, Any], compare: bool, verbose: int) -> dict[str, Any]:
    """Stream an answer, and run the plain plan on the same prompt beside it; what is to be told of both."""
    plain = exe.plain() if compare and exe.decode.speculative is not None else None
    if plain is not None:
        plain.generate(text, **{**settings, "max_new_tokens": 4})  # both sides of the pair run warm
    answer = _stream(exe, text, settings, verbose)
    reference = plain.generate(text, **settings) if plain is not None else None
    assert not isinstance(reference, list)
    result = _run_result(exe, answer, reference, settings["temperature"])
    print(f"\n{_run_line(result)}", flush=True)
    return result


def classify_images(exe: Classifier, images: list[str]) -> dict[str, Any]:
    """Print the five likeliest classes of every image; what is to be told of them."""
    found = exe.classify(images)
    for name, best in zip(images, found, strict=True):
        print(f"{name}:" if len(images) > 1 else "", end="\n" if len(images) > 1 else "")
        for prediction in best:
            print(f"{prediction.probability:7.1%}  {prediction.label}")
    ms = exe.seconds * 1e3 / len(images)
    changes = ", ".join(f"{effect.name} ({effect.declared})" for effect in exe.contract.effects)
    print(f"\n{len(images)} images | {ms:.1f} ms each | {changes}")
    answers = [{"image": name, "classes": [vars(p) for p in best]} for name, best in zip(images, found, strict=True)]
    return {"images": answers, "ms_per_image": round(ms, 3)}


def _stream(exe: Executable, prompt: str, settings: dict[str, Any], verbose: int = 0) -> Generation:
    """Print the answer as it comes and return it; verbose, tell who guessed what, and from 2 on show every pass before the whole answer."""
    speculative = exe.decode.speculative
    painter = Painter([part.key for part in speculative.drafter] if verbose and speculative is not None else [], Console())
    if painter.styles and painter.coloured:
        print(painter.legend())
    answer: Generation | None = None
    whole = list[str]()
    for number, chunk in enumerate(exe.stream(prompt, **settings)):
        painted = painter.answer(chunk) if painter.styles else chunk.text
        whole.append(painted)
        print(painter.round(number, chunk, exe.text) if verbose > 1 else painted, end="\n" if verbose > 1 else "", flush=True)
        answer = chunk.generation or answer
    assert answer is not None
    if verbose > 1:
        print("\n" + "".join(whole), end="")
    if painter.styles:
        print(f"\n{painter.tally(answer.stats)}", end="")
    return answer


def _run_result(exe: Executable, answer: Generation, reference: Generation | None, temperature: float | None) -> dict[str, Any]:
    report, stats = exe.report(temperature), answer.stats
    result: dict[str, Any] = {
        "text": answer.text,
        "ids": answer.ids,
        "prompt_tokens": answer.prompt_tokens,
        "tokens": stats.tokens,
        "finish_reason": answer.finish_reason,
        "tokens_per_s": round(stats.end_to_end_tokens_per_s, 2),
        "decode_tokens_per_s": round(stats.tokens_per_s, 2),
        "tokens_per_pass": round(stats.tokens_per_pass, 4),
        "ttft_ms": round(stats.ttft_ms, 2),
        "host_ms_per_step": round(stats.host_ms_per_pass, 4),
        "exactness": report["exactness"],
        "exactness_line": report["exactness_line"],
        "ratio": None,
        "plain_tokens_per_s": None,
        "identical": None,
    }
    if reference is not None:
        speed = reference.stats.end_to_end_tokens_per_s
        result |= {
            "ratio": round(stats.end_to_end_tokens_per_s / speed, 4) if speed else None,
            "plain_tokens_per_s": round(speed, 2),
            "identical": answer.ids == reference.ids,
        }
    return result


def _run_line(result: dict[str, Any]) -> str:
    parts = [f"{result['tokens']} tokens", f"{result['tokens_per_s']:.1f} tokens/s", f"first token after {result['ttft_ms']:.0f} ms"]
    parts.append(f"{result['tokens_per_pass']:.2f} tokens per pass")
    if result["ratio"] is not None:
        other = "another sample" if result["exactness"] == "distribution" else "OTHER TOKENS"
        same = "the same tokens" if result["identical"] else other
        parts.append(f"{result['ratio']:.2f}x the plain plan ({result['plain_tokens_per_s']:.1f} tokens/s, {same})")
    parts.append(f"exactness {result['exactness'] or 'not measured'}")
    return " | ".join(parts)
