"""Loading a tokenizer by itself, for looking at data without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llava_npu.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; of the latter no weights are fetched.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    from llava_npu.models.hubs import local_folder

    try:
        return AutoTokenizer.from_pretrained(local_folder(name, "--tokenizer", weights=False))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"--tokenizer {name}: no tokenizer could be loaded from there: {reason}") from error
