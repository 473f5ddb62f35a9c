"""A model together with the processor that prepares its inputs."""

from __future__ import annotations

import copy
from typing import NamedTuple

from llava_npu.models.modeling import LlavaNpuForConditionalGeneration
from llava_npu.models.processing import LlavaNpuProcessor


class LoadedModel(NamedTuple):
    """A model and its processor, as `load` and `compose` return them.

    Neither works without the other, so functions that use a model take both as one argument. It unpacks as a pair:
    `model, processor = load(folder)`.
    """

    model: LlavaNpuForConditionalGeneration
    processor: LlavaNpuProcessor

    def with_template(self, template: str | None) -> LoadedModel:
        """The same model prompted with another conversation template; None keeps its own."""
        if template is None or template == self.processor.template:
            return self
        processor = copy.copy(self.processor)
        processor.template = template
        return self._replace(processor=processor)
