"""Replace parameters by those of a file.

Matches   parameters by name, as the program calls them        Produces  the same graph over other numbers
Refuses   names that the program does not have, other shapes, and a file that was made for other weights around them
Paper     how a draft model made of a target's own layers (12, 79) gets what its training gave it
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import ClassVar

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from planc.compiler.passbase import Context, Pass, Stage
from planc.compiler.plan_source import nearest
from planc.compiler.program import Program
from planc.runtime.errors import CompileError

FITS = "fits"  #: entry of the file's metadata: `fingerprint` of the parameters that it leaves as they are
VOCABULARY = "vocabulary"  #: a tensor beside the parameters, for `trim_vocab`


class LoadWeights(Pass):
    """Give parameters the values that a safetensors file has for them."""

    stage: ClassVar[Stage] = Stage.STRUCTURE
    file: str = Field(description="safetensors file of named parameters; counts from the folder of the plan")
    only: str = Field("*", description="pattern of the names that are taken, where a file holds more than one program has")

    def apply(self, program: Program, context: Context) -> Program:
        """Check every tensor, then exchange the values."""
        path = context.folder / Path(self.file).expanduser()
        tensors, about = read_tensors(path)
        tensors.pop(VOCABULARY, None)
        tensors = {name: value for name, value in tensors.items() if fnmatchcase(name, self.only)}
        for name, value in tensors.items():
            self._check(program, name, value, path)
        fits = about.get(FITS)
        if fits is not None and fits != fingerprint(program.params, tensors):
            raise CompileError(
                "pass-refused",
                f"{path.name} was made for other weights than this model has",
                where=f"pass {self.key}",
                fix=f"use it with {about.get('model', 'the model it was trained from')} and the passes that its card names",
            )
        done = {name: value.to(program.params[name].dtype) for name, value in tensors.items()}
        if all(torch.equal(value, program.params[name]) for name, value in done.items()):
            return program
        edit = program.edit(self.key)
        edit.params |= done
        return edit.done(len(done), len(done), [path.name])

    def _check(self, program: Program, name: str, value: Tensor, path: Path) -> None:
        own = program.params.get(name)
        if own is None:
            near = ", ".join(nearest(name, program.params)[:2] or sorted(program.params)[:2])
            problem, fix = f"{path.name} has {name}, which is no parameter here", f"parameters are called {near}"
        elif value.shape != own.shape:
            problem, fix = f"{name} is {list(value.shape)} in {path.name} and {list(own.shape)} in the model", "use a file for this model"
        elif not value.is_floating_point() or not bool(torch.isfinite(value).all()):
            problem, fix = f"{name} in {path.name} is not made of finite numbers", "train or convert the file again"
        else:
            return
        raise CompileError("pass-refused", problem, where=f"pass {self.key}", fix=fix)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Tensors and metadata of a safetensors file. Raises CompileError[input-invalid] where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError) as error:
        raise CompileError("input-invalid", f"cannot read {path}: {error}", fix="paths count from the folder of the plan") from error


def fingerprint(params: Mapping[str, Tensor], without: Iterable[str] = ()) -> str:
    """sha256 over names, types, shapes and numbers of parameters but those of `without`."""
    digest = hashlib.sha256()
    for name in sorted(set(params) - set(without)):
        value = params[name].detach().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
