"""Drafters: one file each. Importing this package registers them under the plan kind `drafter`."""

from __future__ import annotations

from planc.runtime.drafters.base import Context, Drafter, DrafterPart, Host, Loaded, Verified
from planc.runtime.drafters.draft_head import DraftHead
from planc.runtime.drafters.draft_model import DraftModel
from planc.runtime.drafters.ngram_model import NgramModel
from planc.runtime.drafters.ngram_table import NgramTable
from planc.runtime.drafters.prompt_lookup import PromptLookup
from planc.runtime.drafters.retrieval import Retrieval
from planc.runtime.drafters.self_skip import SelfSkip
from planc.runtime.drafters.token_recycling import TokenRecycling

__all__ = [
    "Context",
    "DraftHead",
    "DraftModel",
    "Drafter",
    "DrafterPart",
    "Host",
    "Loaded",
    "NgramModel",
    "NgramTable",
    "PromptLookup",
    "Retrieval",
    "SelfSkip",
    "TokenRecycling",
    "Verified",
]
