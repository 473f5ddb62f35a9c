"""From a model's free text to the letter of an option, by two rules that are always both reported.

Suites disagree about the score of the same predictions, because they disagree about what a sentence answers. So
this gives two numbers:

`vlmevalkit` follows, without a judge model, the rules of VLMEvalKit (`vlmeval/utils/matching_util.py`, as of August
2026), so a score can be compared with published ones. It keeps their faults: "The answer is dog" answers D because the
pattern for "answer is X" ignores case and does not ask whether the letter ends a word. Its refusal letter is "Z".
Not reproduced are the effects of VLMEvalKit's way through a spreadsheet (an empty prediction read back as "nan").

`strict` is this project's own. A letter counts where it stands alone, is not the article "A", the pronoun "I" or
negated ("not B", "B is wrong"), and nothing else in the answer contradicts it; an option's text counts as a whole
phrase, not negated ("not a dog") nor part of a longer number ("2" in "2.5"). Full-width letters are letters. Options
that the answer repeats at its start ("A: a cat / B: a dog / Answer: B") are skipped. In order:

1. The whole answer is one option's text: "Both A and B". (A lone letter is the letter, even if it is another's text.)
2. The answer begins with, or is, a letter: "B", "b", "(B)", "**B.**", "B: a dog". Text after it that is exactly another
   option's contradicts it, and so do further letters ("A, B", "A, or maybe B"): no answer. An answer that goes through
   the options ("A: a cat, no. / B: a dog, yes. / …") does not begin with a letter in this sense.
3. It says so: "the answer is B", "the correct option would be (b).", "option B", "(b) is correct", "答案：B", "选B".
   Two different such letters, or further ones ("B, but it might be C"): no answer.
4. Exactly one letter stands alone somewhere and no other option's text is mentioned; or exactly one option's text is
   mentioned and no other letter. A text inside a longer one ("dog" in "hot dog") is not a mention of its own; where
   yes and no are options, only the first word counts if it is one of them.

Several letters, by 2 to 4, are an answer if one option joins them in the same way ("The answer is A and B").

Anything else counts as no answer, that is, as wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

Extractor = Callable[[str, Mapping[str, str]], str | None]

REFUSED = "Z"


def extract_strict(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that `answer` gives, by our rules; None if it gives none or more than one."""
    answer = answer.translate(_HALF_WIDTH).strip()
    whole = [letter for letter, text in options.items() if _plain(text) and _plain(text) == _plain(answer)]
    if len(whole) == 1 and _plain(answer).upper() not in options:
        return whole[0]
    answer = _without_repeated_options(answer, options)
    rules = (_stated_letter,) if _goes_through(answer, options) else (_leading_letter, _stated_letter)
    found = next(filter(None, (set(rule(answer, options)) for rule in rules)), None)
    candidates = found or _lone_letters(answer, options) | _mentioned_texts(answer, options)
    return candidates.pop() if len(candidates) == 1 else _joining_option(answer, candidates, options)


def extract_vlmevalkit(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter that VLMEvalKit's exact matching finds in `answer`, "Z" for a refusal; None if it finds none."""
    return _vlmevalkit_letter(answer, options) or _vlmevalkit_text(answer, options)


EXTRACTORS: dict[str, Extractor] = {"strict": extract_strict, "vlmevalkit": extract_vlmevalkit}


# --- strict -----------------------------------------------------------------------------------------------------------

# A letter or digit that would make a neighbouring letter part of a word. Chinese, Japanese and Korean characters do
# not: "选B吧" names option B.
_WORD = r"[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]"
_ALONE = rf"(?<!{_WORD})(?<!{_WORD}['’-])([A-Z])(?!{_WORD})(?!['’]{_WORD})"
_EITHER_CASE = _ALONE.replace("A-Z", "A-Za-z") + r"(?!\.[A-Za-z]\.)"  # not the start of "i.e."
_OPENING, _CLOSING = r"[\s*_`\"'“‘(\[（【]*", r"[\s*_`\"'”’)\]）】.,:;!。，：；、！]*"
_ONLY_LETTER = re.compile(rf"{_OPENING}([A-Za-z]){_CLOSING}")
_FIRST_LETTER = re.compile(
    rf"{_OPENING}([A-Z])(?:[*_`]*\s*[.):\]）】。：、,，]|[*_`]*\s*\n|[*_`]+)(?P<rest>.*)",
    re.DOTALL,
)
_RIGHT = r"(?i:\s+(?:is|would\s+be)\s+(?:the\s+)?(?:correct|right|best)\b)"
_ENDED = r"[.,:;!?。，：；！？、]|\s*$|\s*\n|[^\x00-\x7f]"
_STATEMENT = re.compile(
    r"(?:(?i:\b(?:answer|option|choice)\b(?:\s+to\s+(?:the|this|your)\s+question|\s+here|\s+among\s+(?:these|them))?"
    r"(?:\s+(?:is|would\s+be|should\s+be))?)|答案(?:是|为)?|选项?(?:是|为)?|选择)"
    rf"\s*[:：=]?\s*(?i:(?:option|choice)\s+)?[*_`\"'“(\[（【]*{_EITHER_CASE}"
    rf"(?=[*_`\"'”)\]）】]*(?:{_ENDED}|\s+(?i:because|since)\b|{_RIGHT}))"
)
_CONFIRMED = re.compile(rf"(?:^[*_`\"'“]*|[(\[（])([A-Za-z])[*_`\"'”)\]）]*{_RIGHT}")  # "(b) is correct"
_HALF_WIDTH = {ord("Ａ") + place: ord("A") + place for place in range(58)}  # Ａ … Ｚ, a few marks, ａ … ｚ
_NEGATED = re.compile(
    r"(?i:\b(?:not|cannot|neither|nor|rather\s+than|instead\s+of)|n['’]t)(?i:\s+be)?\s*"
    r"(?i:(?:the|an|a|correct|right|best|option|answer|choice)\s+)*[(\[（]?$"
    r"|(?i:\b(?:incorrect|wrong)\s+(?:(?:option|answer|choice)(?:\s+(?:is|would\s+be))?\s*)?)[(\[（]?$"
    r"|不(?:是|选)?(?:选项?)?\s*[(\[（]?$"
)
_DENIED = re.compile(r"[*_`\"'”)\]）]*\s+(?i:(?:is|are)(?:\s+(?:not|incorrect|wrong|false)\b|n['’]t\b))")
# Behind a letter: "or B", ", maybe B", "/B", ", but it could also be B". The letter, and nothing that would make it a
# word.
_FURTHER = re.compile(
    rf"[*_`\"'”’)\]）】]*\s*(?:(?:[,，、;；/&.]|或者?|和|与|及|"
    rf"(?i:or|and|but|either|alternatively|maybe|possibly|perhaps|it|could|might|may|also|be)\b)\s*)+"
    rf"(?i:option\s+)?[*_`\"'“(\[（【]*{_EITHER_CASE}(?=[*_`\"'”)\]）】]*(?:[/&]|{_ENDED}|\s+(?i:or|and)\b))"
)
# "A dog", "I think": an article, a pronoun.
_OPTION_LINE = re.compile(rf"{_OPENING}-?\s*{_OPENING}([A-Z])[*_`]*\s*[.):\]）】。：、]")
_YES_OR_NO = re.compile(r"\W*(yes|no)\b")
_JOINING = {"and": "and", "和": "and", "与": "and", "及": "and", "or": "or", "或": "or", "或者": "or", "nor": "nor"}
_NOT_A_LABEL = {"A": re.compile(r"\s+(?!(?:or|and|is)\b)[a-z0-9]"), "I": re.compile(r"(?:\s+[a-z]|['’])")}


def _leading_letter(answer: str, options: Mapping[str, str]) -> list[str]:
    whole = _ONLY_LETTER.fullmatch(answer)
    if whole:
        return [whole[1].upper()] if whole[1].upper() in options else []
    match = _FIRST_LETTER.match(answer)
    if not match or match[1] not in options:
        return []
    rest = _plain(match["rest"])
    if rest == _plain(options[match[1]]):
        return [match[1]]
    others = [letter for letter, text in options.items() if letter != match[1] and rest == _plain(text)]
    own = re.compile(rf"\s*{re.escape(options[match[1]].strip())}", re.IGNORECASE).match(answer, match.start("rest"))
    further = [_further_letters(answer, end, options) for end in (match.end(1), own.end() if own else len(answer))]
    return sorted({match[1], *others}.union(*further))


def _stated_letter(answer: str, options: Mapping[str, str]) -> list[str]:
    stated = set()
    for match in (*_STATEMENT.finditer(answer), *_CONFIRMED.finditer(answer)):
        cut_article = match[1] in "ai" and match.end(1) == len(answer)  # "The answer is a", and no token was left
        if not cut_article and not _NEGATED.search(answer, 0, match.start()):
            rest = _plain(answer[match.end(1) :].strip("*_`\"'”)]）】:： "))
            others = {letter for letter, text in options.items() if rest and rest == _plain(text)}
            stated |= {match[1].upper(), *others, *_further_letters(answer, match.end(1), options)}
    return sorted(stated & options.keys())


def _further_letters(answer: str, place: int, options: Mapping[str, str]) -> set[str]:
    """Letters that are joined to the one that ends at `place`."""
    found = set()
    while match := _FURTHER.match(answer, place):
        found.add(match[1].upper())
        place = match.end(1)
    return found & options.keys()


def _without_repeated_options(answer: str, options: Mapping[str, str]) -> str:
    """The answer without the options at its start, if it repeats at least two of them, each with its letter."""
    place = 0
    repeated = set()
    forms = {
        letter: re.compile(
            rf"{_OPENING}{letter}{_CLOSING}{re.escape(text.strip())}(?!{_WORD})[\s.,;。，；]*", re.IGNORECASE
        )
        for letter, text in options.items()
        if text.strip()
    }
    while found := [(letter, match) for letter, form in forms.items() if (match := form.match(answer, place))]:
        letter, match = max(found, key=lambda each: each[1].end())  # "A: hot dog", not "A: hot"
        if letter in repeated:
            break
        repeated.add(letter)
        place = match.end()
        if place >= len(answer):
            break
    return answer[place:] if len(repeated) > 1 else answer


def _goes_through(answer: str, options: Mapping[str, str]) -> bool:
    """Whether the answer begins with A, and a later line with B: it discusses one option after the other."""
    letters = [match[1] for line in answer.splitlines() if (match := _OPTION_LINE.match(line))]
    return letters[:2] == list(options)[:2]


def _joining_option(answer: str, candidates: set[str], options: Mapping[str, str]) -> str | None:
    """The one option that joins the same letters as the answer, and in the same way, if it says nothing else."""
    said = _joined(answer, options)
    found = {letter for letter, text in options.items() if said[1] and _joined(text, options) == said}
    return found.pop() if len(found) == 1 and candidates <= said[0] | found else None


def _joined(text: str, options: Mapping[str, str]) -> tuple[set[str], str]:
    """The letters in a text, and the word that joins them: "" if something else stands between them."""
    places = [match for match in re.finditer(_ALONE, text) if match[1] in options]
    letters = {match[1] for match in places}
    if len(letters) < 2:
        return letters, ""
    between = re.sub(_ALONE, " ", text[places[0].start() : places[-1].end()])
    words = {word.casefold() for word in re.findall(r"\w+", between)} - {"option", "options"} or {"and"}
    return letters, _JOINING.get(words.pop(), "") if len(words) == 1 else ""


def _lone_letters(answer: str, options: Mapping[str, str]) -> set[str]:
    found = set()
    for match in re.finditer(_ALONE, answer):
        letter = match[1]
        other_word = _NOT_A_LABEL.get(letter)
        negated = _NEGATED.search(answer, 0, match.start()) or _DENIED.match(answer, match.end())
        if letter in options and not negated and not (other_word and other_word.match(answer, match.end())):
            found.add(letter)
    return found


def _mentioned_texts(answer: str, options: Mapping[str, str]) -> set[str]:
    haystack = _plain(answer)
    by_text = {_plain(text): letter for letter, text in options.items()}
    if (opening := _YES_OR_NO.match(haystack)) and {"yes", "no"} <= by_text.keys():
        return {by_text[opening[1]]}  # "Yes, there is no dog"
    spans = [
        (match.start(), match.end(), letter)
        for letter, text in options.items()
        if _plain(text)
        for match in re.finditer(_phrase(_plain(text)), haystack)
        if not _NEGATED.search(haystack, 0, match.start())
    ]
    return {
        letter
        for start, end, letter in spans
        if not any(s <= start and end <= e and e - s > end - start for s, e, _ in spans)
    }


def _phrase(text: str) -> str:
    before = rf"(?<!{_WORD})" if re.match(_WORD, text[0]) else ""
    after = rf"(?!{_WORD})" if re.match(_WORD, text[-1]) else ""
    if text[0].isdecimal():
        before += r"(?<!\d[.,:/])(?<!(?<![\w)])[-−])"
    if text[-1].isdecimal():
        after += r"(?![.,:/]\d)"
    return before + re.escape(text) + after


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).strip(" .。*")


# --- vlmevalkit -------------------------------------------------------------------------------------------------------

_API_FAILURE = "Failed to obtain answer via API"
_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_TO_SPACE = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_LABEL_WITHIN_LAST = 4  # tokens
_ANSWER_IS = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)  # no word boundary: as theirs


def _vlmevalkit_letter(answer: str, options: Mapping[str, str]) -> str | None:
    if _API_FAILURE in answer:
        return None
    if any(refusal in answer for refusal in _REFUSALS):
        return REFUSED
    tokens = answer.translate(_TO_SPACE).split()
    present = [letter for letter in options if letter in tokens]
    if len(present) == 1 and tokens.index(present[0]) >= len(tokens) - _LABEL_WITHIN_LAST:
        return present[0]
    if not present and REFUSED in tokens:
        return REFUSED
    stated = _ANSWER_IS.search(answer)
    if stated and stated[1].upper() in options:
        return stated[1].upper()
    return None


def _vlmevalkit_text(answer: str, options: Mapping[str, str]) -> str | None:
    answer = answer.lower()
    if len(answer) > 2 * sum(len(text) for text in options.values()):
        return None
    found = [letter for letter, text in options.items() if text.lower() in answer]
    return found[0] if len(found) == 1 else None


# --- two rules of LLaVA's scripts -------------------------------------------------------------------------------------
#
# exact       `scripts/convert_seed_for_submission.py`: the answer is the letter and nothing else.
# scienceqa   `llava/eval/eval_science_qa.py`: the letter alone; or at the start, before ". "; or in the only
#             "The answer is X" of the answer, whatever character follows.

_SCIENCEQA_LETTERS = "ABCDE"
_STATED_BY_SCIENCEQA = re.compile(r"The answer is ([A-Z]).")  # the last dot matches any character, as in the original

EXACT_ABOUT = "LLaVA's script: the answer is exactly the letter"
SCIENCEQA_ABOUT = "LLaVA's script: the letter alone, before “. ”, or in the only “The answer is X.”"


def exact(answer: str, options: Mapping[str, str]) -> str | None:
    """The answer, if it is an option's letter."""
    return answer if answer in options else None


def scienceqa(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter by ScienceQA's rules in LLaVA, if there is such an option."""
    if answer and answer in list(_SCIENCEQA_LETTERS):
        found = answer
    elif len(answer) >= 3 and answer[0] in _SCIENCEQA_LETTERS and answer[1:3] == ". ":
        found = answer[0]
    else:
        stated = _STATED_BY_SCIENCEQA.findall(answer)
        found = stated[0] if len(stated) == 1 else ""
    return found if found in options else None
