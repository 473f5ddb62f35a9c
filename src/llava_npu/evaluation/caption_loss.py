"""Mean loss on held-out captions, with the right image and with a wrong one.

If a model sees, the right image makes the right caption likelier. The difference to the loss under a wrong image is
free of how well the language model writes captions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from llava_npu.data.conversation.turns import IMAGE_MARK, Turn
from llava_npu.data.formats.parsing import Record
from llava_npu.data.image_sources import ImageFile, UnreadableImageError
from llava_npu.errors import UserError
from llava_npu.evaluation.ablations import GIVEN, NONE, SHUFFLED, unknown_mode, wrong_partners
from llava_npu.evaluation.statistics.accuracy import ScoreSample
from llava_npu.evaluation.statistics.bootstrap import ratio_interval
from llava_npu.inference.engine import offline_engine
from llava_npu.inference.features import FeatureCache
from llava_npu.inference.likelihood import AnsweredPrompt, LogProbability, answer_log_probabilities
from llava_npu.models.loaded import LoadedModel


@dataclass(frozen=True)
class CaptionLoss:
    """Mean negative log-likelihood per supervised token, in nats, with its 95 % interval (bootstrap over records).

    Attributes:
        images: as given, none or shuffled.
        value, low, high: the loss.
        num_tokens, num_records: of how many.
        sample: each record's loss and number of tokens, by its place, so that it can be set against another model's.
    """

    images: str
    value: float
    low: float
    high: float
    num_tokens: int
    num_records: int
    sample: ScoreSample


def caption_loss(
    loaded: LoadedModel,
    records: Sequence[Record],
    images: str = GIVEN,
    *,
    concepts: Sequence[str] | None = None,
    batch_size: int = 16,
    features: FeatureCache | None = None,
) -> CaptionLoss:
    """Measures the loss of the records' answers.

    Args:
        loaded: the model, as `llava_npu.load` returns it.
        records: held-out records with images.
        images: "given"; "none", without the image; "shuffled", each with the image of a record of another concept.
        concepts: what each record shows, so that a wrong image is one of something else; by default its last answer.
        batch_size: records in one forward.
        features: shared with other measurements of a model with the same tower and preprocessing.

    Raises:
        UserError: an image cannot be read, or there are too few records to shuffle.
    """
    if not records:
        raise UserError("caption loss: no records.")
    items = _prepare(records, images, concepts or [record.conversations[-1].text.casefold() for record in records])
    order = sorted(range(len(items)), key=lambda place: _length(items[place]))  # batches of like length
    cache = features or FeatureCache(loaded)
    engine = offline_engine(loaded, batch_size, cache)
    losses: list[LogProbability] = []
    for start in range(0, len(items), batch_size):
        batch = [items[place] for place in order[start : start + batch_size]]
        found, errors = cache.load([image for item in batch for image in item.images])
        if errors:
            raise UnreadableImageError("caption loss: " + "; ".join(errors.values()))
        losses += answer_log_probabilities(engine, batch, found)
    totals, counts = [-loss.total for loss in losses], [loss.num_tokens for loss in losses]
    low, high = ratio_interval(totals, counts)
    of_records = {("", str(place)): each for place, *each in sorted(zip(order, totals, counts, strict=True))}
    sample = ScoreSample("ratio", {key: (total, float(count)) for key, (total, count) in of_records.items()})
    return CaptionLoss(images, sum(totals) / sum(counts), low, high, sum(counts), len(records), sample)


def _length(item: AnsweredPrompt) -> int:
    return sum(len(turn.text) for turn in item.conversations)


def _prepare(records: Sequence[Record], images: str, concepts: Sequence[str]) -> list[AnsweredPrompt]:
    sources = [tuple(ImageFile(path, record.name) for path in record.image_paths) for record in records]
    turns = [record.conversations for record in records]
    if images == NONE:
        sources = [()] * len(records)
        turns = [tuple(_without_marks(turn) for turn in conversation) for conversation in turns]
    elif images == SHUFFLED:
        if len(records) < 2:
            raise UserError("caption loss: images 'shuffled' needs at least two records.")
        partners = wrong_partners(concepts, [tuple(image.key for image in of_one) for of_one in sources])
        sources = [sources[partner] for partner in partners]
    elif images != GIVEN:
        raise unknown_mode(images)
    return [
        AnsweredPrompt(conversation, of_one, record.name)
        for conversation, of_one, record in zip(turns, sources, records, strict=True)
    ]


def _without_marks(turn: Turn) -> Turn:
    return replace(turn, text=turn.text.replace(IMAGE_MARK, "").strip())
