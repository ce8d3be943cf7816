"""Errors a user can cause. Each has a stable code, says where it happened and how to mend it (docs/errors.md lists them all)."""

from __future__ import annotations

#: code -> what it means. `docs/errors.md` is checked against this table.
CODES: dict[str, str] = {
    # plan
    "plan-not-found": "the plan file does not exist or cannot be read",
    "plan-syntax": "the plan is not valid YAML or not a mapping",
    "plan-version": "the plan is written for another schema version",
    "plan-unknown-field": "a field that the plan schema does not know",
    "plan-unknown-name": "no pass, drafter or policy has this name",
    "plan-bad-value": "a field has the wrong type or an impossible value",
    "plan-conflict": "two parts of the plan exclude each other",
    "plan-requires": "a part of the plan needs another part that is missing",
    "search-open": "the plan leaves choices to a search",
    "search-infeasible": "no plan of a search is within the budget",
    "draft-mismatch": "the draft model does not fit the target",
    # models
    "model-not-found": "no model has this name, path or id",
    "model-hash": "a downloaded file does not have the pinned hash",
    "model-download": "a download failed",
    "model-load": "the model's files cannot be read",
    "model-unsupported": "the model holds something that planc does not understand",
    # compile
    "trace-failed": "the model could not be traced",
    "raise-missing": "an expected structure was not found in the traced graph",
    "skip-out-of-range": "a layer number that the model does not have",
    "pass-refused": "a pass cannot be applied to this model",
    "pass-no-match": "a pass found nothing to do",
    "calibration-short": "there is too little text to calibrate on",
    "calibration-not-finite": "a value holds NaN or infinity on the calibration text",
    "prune-frozen": "nothing that may be removed: the graph ties these channels to an operation that needs them all",
    "prune-budget": "so much cannot be removed from what may be removed",
    "residual-form": "the hidden state is written or read in a way that does not allow a change of its basis",
    "prune-pattern": "a pattern of N kept in M does not divide the weights",
    "verify-failed": "a program broke an invariant after a pass",
    "equality-failed": "a pass declared exact changed the outputs",
    "fit-diverged": "a training diverged",
    "lower-unsupported": "an operation has no lowering on this backend",
    "backend-missing": "a library that the backend needs is not installed",
    # artifacts
    "artifact-not-found": "the directory holds no artifact",
    "artifact-corrupt": "a file of the artifact is missing, truncated or changed",
    "artifact-path": "the manifest names a file outside the artifact",
    "artifact-version": "the artifact is written for another schema version",
    "artifact-exists": "the output directory exists and is not an artifact",
    "artifact-write": "the artifact cannot be written: no space or no permission",
    "export-refused": "the artifact cannot run without planc",
    # running
    "prompt-empty": "the prompt has no tokens",
    "prompt-too-long": "the prompt does not fit into the cache",
    "tokenizer-missing": "text was given or asked for, but the artifact holds no tokenizer",
    "chat-template": "the chat template is missing, faulty or refused the messages",
    "input-invalid": "an argument of a call or command is not usable",
    "kernel-unsupported": "a GPU kernel does not take tensors of this device, type or shape",
    "output-missing": "a loop needs an output that the artifact was not compiled with",
    "decode-stuck": "policies of the decode section make no progress",
    "server-closed": "a prompt was given to a server that is closed",
    "peer-failed": "a system to compare with could not be run",
}


class PlancError(Exception):
    """A failure with a stable `code`, the place (`plan`, `node`, `where`) and a `fix`."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        plan: str | None = None,
        node: str | None = None,
        where: str | None = None,
        fix: str | None = None,
    ) -> None:
        assert code in CODES, f"unregistered error code {code!r}"
        super().__init__(message)
        self.code, self.message = code, message
        self.plan, self.node, self.where, self.fix = plan, node, where, fix

    def __str__(self) -> str:
        lines = [f"{type(self).__name__}[{self.code}]: {self.message}"]
        places = {label: getattr(self, label) for label in ("plan", "node", "where", "fix")}
        lines += [f"  {label:<6} {place}" for label, place in places.items() if place]
        return "\n".join(lines)


class PlanError(PlancError):
    """The plan is wrong or asks for what cannot be had."""


class ModelError(PlancError):
    """The model cannot be found, loaded or understood."""


class CompileError(PlancError):
    """Tracing, a pass, the verifier or a lowering failed."""


class ArtifactError(PlancError):
    """An artifact on disk cannot be read or written."""


class InputError(PlancError):
    """A call at run time got arguments that it cannot use."""
