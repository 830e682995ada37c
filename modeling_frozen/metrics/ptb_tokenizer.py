"""Caption tokenizer of coco-caption in pure Python.

Published caption scores are computed on the tokens of Stanford's Java `PTBTokenizer` (CoreNLP 3.4.1, options
`-preserveLines -lowerCase`) less a list of punctuation tokens. Java must not be asked of a user, and other tokens
give other scores, so this lexer reproduces that tool's output: as there, every rule is tried where the last token
ended and the longest match wins, the earlier rule on a tie. `tests/test_ptb_tokenizer.py` holds it to the tool.

Known to differ, by design: the tool reads all captions as one text, so that the first word of the next one decides on
the full stop after a last single letter ("in a v."), and a line separator inside one shifts all later ones. Here a
caption stands alone, and gives what the tool gives for it alone.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable


# Tokens that coco-caption drops. Brackets are missing from it in effect: its list says "-LRB-", the tool writes
# "-lrb-".
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])

_L = (  # letters, with the marks that combine with them
    "A-Za-z\u00aa\u00b5\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u02c1\u02c6-\u02d1\u0300-\u037d\u037f-\u0386\u0388-\u0588"
    "\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7-\u05f2\u060d-\u0613\u0615-\u061a\u0620-\u0669\u066e-\u06d3\u06d5-\u06ff"
    "\u070e-\u07f5\u07f9-\u0963\u0966-\u0e3e\u0e40-\u0e4e\u0e50-\u1fff\u2c00-\u2dff\u3005-\u3007\u3021-\u302f\u3031-\u3035"
    "\u3038-\u303c\u3041-\u31ff\u3400-\ud7ff\uf900-\ufdff\ufe70-\ufefc\uff10-\uff19\uff21-\uff3a\uff41-\uff5a\uff66-\uffdc"
)
_A = _L + "0-9"
_Q = "(?:['\u2019\u0092]|&apos;)"  # apostrophes
_NOT_IN_WORD = f"(?![{_A}])"

# Abbreviations keep their full stop: any case; with a capital only; lower-case or title; before a number only.
_ABBREVIATIONS = (
    "adj adm adv al ala alex apr ariz asst assn assoc atty attys aug ave bancorp bhd bldg blvd brig bros calif capt"
    " cf cie cmdr co col colo comdr conn corp cos cpl ct dak dec dept det dr drs elec ens esq est etc ext feb fla fri"
    " ft ga gen gov govs hon inc ind insp intl invt jan jos jr jul jun kan kans ky lieut lt ltd maj mar md messrs mich"
    " minn mlle mme mo mon mont mr mrs ms msgr mt natl neb nev nov oct okla penn pfc ph plc ppte ppty pres prof profs"
    " pvt rd rep reps rev rt sen sens sep sept seq sfc sgt spc sq sr st ste supt supts sys tel tenn thu thurs treas"
    " tue tues univ va vs vt wed wis wisc wm wyo"
)
_CAPITAL_ABBREVIATIONS = "ark az del ill la mass miss ore pa tex wash"
_UNSHOUTED_ABBREVIATIONS = "mfg mtg pte ptes pty ptys"
_NUMBERED_ABBREVIATIONS = "art ca fig figs no nos op pp prop"
_SENTENCE_STARTERS = (  # after which a single letter gives up its full stop
    "a about according additionally after an as at but earlier he her here however if in it last many more now once"
    " one other our she since so some such that the their then there these they this we what when while yet you"
)
_FILE_ENDINGS = (
    "bat bmp c cgi class cpp dll doc docx exe gif gz h htm html jar java jpeg jpg mov pdf php pl png ppt ps py sql"
    " tar txt wav x xml zip"
)


def _any_of(words: str) -> str:
    return "|".join(sorted(words.split(), key=len, reverse=True))


def _cased(words: str, *cases: Callable[[str], str]) -> str:
    return _any_of(" ".join(case(words) for case in cases))


_QUOTES = {
    **dict.fromkeys("\u2018\u201b\u2039\u0091", "`"),
    **dict.fromkeys("\u2019\u203a\u0092", "'"),
    **dict.fromkeys("\u201c\u00ab\u0093", "``"),
    **dict.fromkeys("\u201d\u00bb\u0094", "''"),
}
_INSIDE = {"(": "-lrb-", ")": "-rrb-", " ": "\u00a0"}
_CURLY = f"[{''.join(_QUOTES)}]"
_SPACE = "[ \\t\u00a0\u2002-\u200a\u3000]"
_SEGMENT = f"[{_A}]+(?:_[{_A}]+)*"
_SHORT_ARTICLE = f"[dDlLoO]{_Q}[{_A}]"  # d'Angelo, l'horizon, o'clock: at least two letters after the apostrophe
_HYPHENATED = (
    f"(?:(?:{_SHORT_ARTICLE})?{_SEGMENT}(?:-(?:{_SHORT_ARTICLE})?{_SEGMENT})+"
    "|[A-Za-z0-9](?:[A-Za-z0-9.,]|_(?=[A-Za-z0-9]))*"
    f"(?:-(?:(?:[A-Za-z]\\.){{2,}}|(?:{_SHORT_ARTICLE})?[A-Za-z0-9]+(?:_[A-Za-z0-9]+)*))+)"
)
_ADDRESSED = f"[{_L}][{_A}]*(?:[.!?][{_L}][{_A}]*)+"  # aa.bb, Yahoo!aa
_ENDING = "(?:[sSmMdD]|[lL][lL]|[rR][eE]|[vV][eE])"
_SUFFIX = f"(?:'{_ENDING}(?![A-Za-z])|{_Q}{_ENDING})".replace(_Q, _Q.replace("'", ""))
_PATH = r"(?:/[^\s\"<>|()\u00a0{}]*[^\s\"<>|.!?(){},;:'\u00a0-])?"
_TAG_NAME = "[A-Za-z][A-Za-z0-9_:.-]*"
_TAG = f"</?{_TAG_NAME}(?: +{_TAG_NAME}(?: *= *(?:'[^'\\r\\n]*'|\"[^\"\\r\\n]*\"))?)* */?>"


def _straightened(text: str) -> str:
    return re.sub(_Q, "'", text)


def _quoted(text: str) -> str:
    return "".join(_QUOTES.get(character, character) for character in text)


def _unbracketed(text: str) -> str:
    return "".join(_INSIDE.get(character, character) for character in text.replace("&amp;", "&"))


# (pattern, what to write: a fixed token, a function of the text, or None for the text itself). The group `next`
# counts for the length and is not taken.
_RULES: list[tuple[str, str | Callable[[str], str] | None]] = [
    # Markup and addresses
    (r"<[!?][A-Za-z-][^>\r\n]*>", None),
    (_TAG, None),
    ("&(?:amp|AMP);", "&"),
    ("&lt;", "<"),
    ("&gt;", ">"),
    ("&(?:quot|apos);", "'"),
    ("&nbsp;", ""),
    (r"&#[0-9]+;", None),
    (r"https?://[^\s\"<>|()\u00a0{}]*[^\s\"<>|.!?(){},;:'\u00a0-]", None),
    (r"(?:www\.)?(?:[A-Za-z0-9-]+\.)+(?:com|net|org|edu)" + _PATH, None),
    (r"www\.(?:[^\s\"<>|.!?(){},\u00a0]+\.)+[A-Za-z]{2,4}" + _PATH, None),
    (r"<?[A-Za-z0-9][^\s\"<>|()\u00a0{}]*@(?:[^\s\"<>|(){}.\u00a0]+\.)*[^\s\"<>|(){}.\u00a0]+>?", None),
    (r"@[A-Za-z_][A-Za-z0-9_]*", None),
    (f"#[{_L}]+", None),
    (f"[A-Za-z0-9]+(?:\\.[A-Za-z0-9]+)*\\.(?i:{_any_of(_FILE_ENDINGS)})(?=[\\s.?!,]|$)", None),
    # Contractions
    (f"[Cc][Aa][Nn](?P<next>[Nn][Oo][Tt]{_NOT_IN_WORD})", None),
    (f"[Gg][Oo][Nn](?P<next>[Nn][Aa]{_NOT_IN_WORD})", None),
    (f"[Ww][Aa][Nn](?P<next>[Nn][Aa]{_NOT_IN_WORD})", None),
    (f"[Gg][Oo][Tt](?P<next>[Tt][Aa]{_NOT_IN_WORD})", None),
    (f"[Gg][Ii][Mm](?P<next>[Mm][Ee]{_NOT_IN_WORD})", None),
    (f"[Ll][Ee][Mm](?P<next>[Mm][Ee]{_NOT_IN_WORD})", None),
    ("'[Tt](?P<next>[Ii][Ss]|[Ww][Aa][Ss])", None),
    (f"[A-Za-z]+?(?P<next>[nN](?:{_Q}|`)[tT])", None),
    (f"{_SEGMENT}(?P<next>{_SUFFIX})", None),
    (f"[nN](?:{_Q}|`)[tT]", _straightened),
    (_SUFFIX, _straightened),
    # Words with an apostrophe inside or in front
    (_SHORT_ARTICLE + _SEGMENT, None),
    (f"[A-HJ-XZn]{_Q}[{_L}]{{2,}}", None),
    (f"[{_L}]+[aeiouyAEIOUY]{_Q}[aeiouA-Z][{_L}]*", None),
    (f"(?i:[djl]|ol|dunkin|somethin){_Q}|[yY]{_Q}(?=[{_L}])", None),
    (r"(?i:nor'easter|c'mon|c'est|e'er|s'mores|ev'ry|li'l|nat'l|cont'd\.)", None),
    (f"{_Q}(?:[0-9]{{2}}(?=\\s|$)|[2-9]0[sS]|(?i:n{_Q}|em|till?|cause))|'[nN](?=\\s|$)|[\u2019\u0092][nN]", None),
    # Words
    (_SEGMENT, None),
    (_ADDRESSED, None),
    (_HYPHENATED, None),
    (r"[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}(?:\\?/[A-Za-z0-9]+(?:-[A-Za-z]+){0,2}){1,2}", None),
    (r"[A-Z]+(?:(?:&(?:amp;)?|\+)[A-Z]+)+", None),
    (r"[Cc]\+\+|[CcFf]#", None),
    # Abbreviations
    (r"[A-Za-z](?:\.[A-Za-z])*\.|(?i:ph\.d)\.", None),
    (f"[A-Za-z](?P<next>\\. +(?:(?:{_cased(_SENTENCE_STARTERS, str.title, str.upper)})(?=\\s|$)|{_TAG}))", None),
    (f"(?i:{_any_of(_ABBREVIATIONS)})\\.", None),
    (f"(?:{_cased(_CAPITAL_ABBREVIATIONS, str.title, str.upper)})\\.", None),
    (f"(?:{_cased(_UNSHOUTED_ABBREVIATIONS, str.lower, str.title)})\\.", None),
    (
        f"(?:[A-Za-z0-9]|[{_A}](?:[{_A}]|_[{_A}])+|{_SHORT_ARTICLE}{_SEGMENT}|{_HYPHENATED}|{_ADDRESSED})\\.(?=[,;:])",
        None,
    ),
    (f"(?i:{_any_of(_NUMBERED_ABBREVIATIONS)})\\.(?=\\s*[0-9])", None),
    # Numbers
    (r"[-+]?(?:[0-9]*(?:[.,:][0-9]+)+|[0-9]+)", None),
    (f"(?:[0-9]{{1,4}}(?:-|{_SPACE}))?[0-9]{{1,4}}(?:\\\\?/|\u2044)[0-9]{{1,4}}", None),
    (
        f"(?:\\([0-9]{{2,3}}\\){_SPACE}?|(?:\\+\\+?)?(?:[0-9]{{2,4}}(?:-|{_SPACE}))?[0-9]{{2,4}}(?:-|{_SPACE}))"
        f"[0-9]{{3,4}}(?:-|{_SPACE})?[0-9]{{3,5}}",
        None,
    ),
    (r"[A-Z]+\$", None),
    # Faces
    (r"[<>]?[:;=][-o*']?[()DPdpO\\{@|\[\]](?![A-Za-z0-9])", None),
    (r"[-^=~<>']_[-^=~<>']|\([-^=~<>'][_.]?[-^=~<>']\)", None),
    # Punctuation
    (r"-{5,}", None),
    ("-{2,4}|[\u2012-\u2015\u0096\u0097]", "--"),
    ("[?!]{2,}", None),
    (r"\*+|_+|#+|@+|<<|>>", None),
    ("``|''|[\"'`]", "'"),
    (f"{_CURLY}(?:{_CURLY}|`)?|`{_CURLY}", _quoted),
    ("\\.{3,}|[.\u2026\u0085]", "."),
    ("\u00a3", "#"),
    ("[\u20ac\u00a4\u0080]", "$"),
    ("\u00a2", "cents"),
    ("\\(", "-lrb-"),
    ("\\)", "-rrb-"),
    ("\\[", "-lsb-"),
    ("\\]", "-rsb-"),
    ("\\{", "-lcb-"),
    ("\\}", "-rcb-"),
    ("\u00ad", "-"),
    ("\u00bc", "1/4"),
    ("\u00bd", "1/2"),
    ("\u00be", "3/4"),
    ("\u2153", "1/3"),
    ("\u2154", "2/3"),
]

_PLAIN_WORD = re.compile("[A-Za-z]+(?= |$)")
_SPLIT_WORDS = frozenset(["cannot", "gonna", "wanna", "gotta", "gimme", "lemme"])


@functools.cache
def _compiled_rules() -> list[tuple[Callable[[str, int], re.Match[str] | None], bool, str | Callable[[str], str]]]:
    return [
        (re.compile(pattern).match, "?P<next>" in pattern, _unbracketed if written is None else written)
        for pattern, written in _RULES
    ]


def ptb_tokens(text: str) -> list[str]:
    """Lower-cased Penn Treebank tokens of one caption, punctuation included, as the Java tool prints them."""
    tokens: list[str] = []
    rules = _compiled_rules()
    position = 0
    while position < len(text):
        plain = _PLAIN_WORD.match(text, position)
        if plain and plain[0].lower() not in _SPLIT_WORDS:
            tokens.append(plain[0].lower())
            position = plain.end()
            continue
        character = text[position]
        if character == " ":
            position += 1
            continue
        longest, stop, token = position, position + 1, None
        for match_at, looks_ahead, written in rules:
            match = match_at(text, position)
            if match and match.end() > longest:
                longest = match.end()
                stop = match.start("next") if looks_ahead else longest
                token = written if isinstance(written, str) else written(text[position:stop])
        # What no rule knows stands alone if it is a sign, and is dropped if it is not, or beyond the 16 bits the tool
        # reads.
        if token is None and character <= "\uffff" and unicodedata.category(character)[0] in "PSNL":
            token = character
        if token:
            tokens.append(token.lower())
        position = stop
    return tokens


def tokenize_caption(text: str) -> str:
    """The caption as coco-caption scores it: tokens joined by single spaces, lower-case, without punctuation."""
    return " ".join(token for token in ptb_tokens(text) if token not in _DROPPED)
