"""Records, templates, labels, images and the plan of a run.

The names are loaded on first use: encoding a conversation needs neither torch nor Pillow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llava_npu.data.conversation.labels import IGNORE_INDEX as IGNORE_INDEX
    from llava_npu.data.conversation.labels import IMAGE_PLACEHOLDER as IMAGE_PLACEHOLDER
    from llava_npu.data.conversation.labels import EncodedConversation as EncodedConversation
    from llava_npu.data.conversation.labels import ExpandedConversation as ExpandedConversation
    from llava_npu.data.conversation.labels import encode_conversation as encode_conversation
    from llava_npu.data.conversation.labels import encode_prompt as encode_prompt
    from llava_npu.data.conversation.labels import expand_images as expand_images
    from llava_npu.data.conversation.templates import TEMPLATES as TEMPLATES
    from llava_npu.data.conversation.templates import Template as Template
    from llava_npu.data.conversation.templates import get_template as get_template
    from llava_npu.data.dataset import ConversationDataset as ConversationDataset
    from llava_npu.data.dataset import Sample as Sample
    from llava_npu.data.dataset import collate as collate
    from llava_npu.data.images import load_image as load_image
    from llava_npu.data.images import pad_to_square as pad_to_square
    from llava_npu.data.images import padding_color as padding_color
    from llava_npu.data.plan import Plan as Plan
    from llava_npu.data.plan import micro_batches as micro_batches
    from llava_npu.data.plan import plan_order as plan_order
    from llava_npu.data.records import Record as Record
    from llava_npu.data.records import Source as Source
    from llava_npu.data.records import Turn as Turn
    from llava_npu.data.records import fingerprint as fingerprint
    from llava_npu.data.records import load_records as load_records
    from llava_npu.data.records import open_records as open_records
    from llava_npu.data.records import open_sources as open_sources
    from llava_npu.data.tools.check import CheckOptions as CheckOptions
    from llava_npu.data.tools.check import check_records as check_records
    from llava_npu.data.tools.defects import RecordError as RecordError
    from llava_npu.data.tools.inspect import InspectOptions as InspectOptions
    from llava_npu.data.tools.inspect import inspect_records as inspect_records

_NAMES = {
    "tools.check": ("CheckOptions", "check_records"),
    "dataset": ("ConversationDataset", "Sample", "collate"),
    "tools.defects": ("RecordError",),
    "images": ("load_image", "pad_to_square", "padding_color"),
    "tools.inspect": ("InspectOptions", "inspect_records"),
    "conversation.labels": (
        "IGNORE_INDEX",
        "IMAGE_PLACEHOLDER",
        "EncodedConversation",
        "ExpandedConversation",
        "encode_conversation",
        "encode_prompt",
        "expand_images",
    ),
    "plan": ("Plan", "micro_batches", "plan_order"),
    "records": ("Record", "Source", "Turn", "fingerprint", "load_records", "open_records", "open_sources"),
    "conversation.templates": ("TEMPLATES", "Template", "get_template"),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
