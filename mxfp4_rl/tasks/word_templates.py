"""The words of the word problems: for each language its names, things and a few stories for every kind of problem.

A story has fields for the numbers of its kind (``{a}`` to ``{d}``; `word_problems.KINDS` says which and what is computed) and
for words: ``{name}`` and ``{other}`` (two people), ``{things}`` and ``{others}`` (two plurals) and ``{boxes}`` (a plural, what
things come in). Numbers are at least 2, so that every noun is a plural; nothing but the fields makes a number.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LANGUAGES", "Language"]


@dataclass(frozen=True)
class Language:
    """Words of one language; ``stories`` maps a kind's story to its wordings."""

    instruction: str
    names: tuple[str, ...]
    things: tuple[str, ...]
    boxes: tuple[str, ...]
    stories: dict[str, tuple[str, ...]]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_ENGLISH = Language(
    instruction="Answer briefly.",
    names=_words("Anna Ben Carla David Emma Felix Grace Henry Ivy Jack Kate Leo Mia Noah Olivia Paul Rosa Sam Tom Zoe"),
    things=_words(
        "apples pencils marbles books stickers coins cards cookies shells stamps balloons oranges toys flowers beads buttons "
        "eggs pens candies tickets"
    ),
    boxes=("boxes", "bags", "baskets", "packs"),
    stories={
        "sum": (
            "{name} has {a} {things} and gets {b} more. How many {things} does {name} have now?",
            "There are {a} {things} in one box and {b} in another. How many {things} are there in all?",
            "{name} finds {a} {things} and {other} finds {b}. How many {things} do they find together?",
            "What is {a} plus {b}?",
        ),
        "difference": (
            "{name} has {a} {things} and gives away {b}. How many {things} are left?",
            "There were {a} {things} on a table. {name} took {b} of them. How many {things} are still on the table?",
            "What is {a} minus {b}?",
        ),
        "product": (
            "{name} has {a} {boxes} with {b} {things} in each. How many {things} does {name} have?",
            "{name} buys {a} {things} for {b} dollars each. How many dollars does {name} pay?",
            "What is {a} times {b}?",
        ),
        "missing": (
            "{name} has {b} {things} and needs {a}. How many more {things} does {name} need?",
            "{name} has {b} {things} and {other} has {a}. How many more {things} does {other} have than {name}?",
            "What number must be added to {b} to get {a}?",
        ),
        "more and more": (
            "{name} has {a} red, {b} green and {c} blue {things}. How many {things} does {name} have?",
            "{name} finds {a} {things} on Monday, {b} on Tuesday and {c} on Wednesday. How many {things} does {name} find?",
            "What is {a} plus {b} plus {c}?",
        ),
        "more, then less": (
            "{name} has {a} {things}, buys {b} more and gives away {c}. How many {things} does {name} have now?",
            "There are {a} people on a bus. {b} people get on and {c} get off. How many people are on the bus now?",
            "{name} has {a} {things}. {other} gives {name} {b} more, then {name} loses {c}. How many {things} are left?",
            "What is {a} plus {b} minus {c}?",
        ),
        "less, then more": (
            "{name} has {a} {things}, gives {b} to {other} and finds {c} more. How many {things} does {name} have now?",
            "A shop has {a} {things}, sells {b} and gets {c} new ones. How many {things} does the shop have now?",
            "What is {a} minus {b} plus {c}?",
        ),
        "less and less": (
            "{name} has {a} {things}, gives {b} to {other} and loses {c}. How many {things} are left?",
            "A shop has {a} {things}. It sells {b} in the morning and {c} in the afternoon. How many {things} are left?",
            "What is {a} minus {b} minus {c}?",
        ),
        "boxes and more": (
            "{name} has {a} {boxes} with {b} {things} in each and {c} more {things}. How many {things} does {name} have?",
            "{name} has {c} {things} and buys {a} {boxes} of {b} {things}. How many {things} does {name} have now?",
            "What is {a} times {b} plus {c}?",
        ),
        "boxes and less": (
            "{name} has {a} {boxes} with {b} {things} in each and gives away {c} {things}. How many {things} are left?",
            "A shop gets {a} {boxes} of {b} {things} and sells {c} {things}. How many {things} are left?",
            "What is {a} times {b} minus {c}?",
        ),
        "change": (
            "{name} buys {a} {things} for {b} dollars each and pays with {c} dollars. How many dollars does {name} get back?",
            "{name} has {c} dollars and buys {a} {things} for {b} dollars each. How many dollars are left?",
        ),
        "more than": (
            "{name} has {a} {things}. {other} has {b} more than {name}. How many {things} do they have together?",
            "{name} finds {a} {things} and {other} finds {b} more than that. How many {things} do they find together?",
        ),
        "times as many": (
            "{name} has {a} {things}. {other} has {b} times as many. How many {things} do they have together?",
            "{name} finds {a} {things} and {other} finds {b} times as many. How many {things} do they find together?",
        ),
        "boxes, more, less": (
            "{name} has {a} {boxes} with {b} {things} in each, finds {c} more {things} and gives {d} to {other}. "
            "How many {things} does {name} have now?",
            "A shop has {c} {things}, gets {a} {boxes} of {b} {things} and sells {d} {things}. How many {things} are left?",
            "What is {a} times {b} plus {c} minus {d}?",
        ),
        "two prices": (
            "{name} buys {a} {things} for {b} dollars each and {c} {others} for {d} dollars each. "
            "How many dollars does {name} pay?",
            "{name} buys {a} {things} and {other} buys {c} {others}. The {things} cost {b} dollars each, the {others} cost "
            "{d} dollars each. How many dollars do they pay together?",
            "What is {a} times {b} plus {c} times {d}?",
        ),
        "change of two": (
            "{name} has {c} dollars, buys {a} {things} for {b} dollars each and a bag for {d} dollars. "
            "How many dollars are left?",
            "{name} buys {a} {things} for {b} dollars each and a lamp for {d} dollars and pays with {c} dollars. "
            "How many dollars does {name} get back?",
        ),
        "shared": (
            "{name} has {a} {boxes} with {b} {things} in each, keeps {c} {things} and shares the rest equally "
            "among {d} friends. How many {things} does each friend get?",
        ),
        "days": (
            "Every day {name} makes {a} {things} and {other} makes {b}. After {c} days they sell {d} {things}. "
            "How many {things} are left?",
            "Every week a shop gets {a} {things} from {name} and {b} from {other}. In {c} weeks it sells {d} {things}. "
            "How many {things} are left?",
        ),
    },
)

_GERMAN = Language(
    instruction="Antworte kurz.",
    names=_words("Anna Ben Clara David Emma Felix Greta Hans Ida Jonas Klara Leo Mia Noah Olga Paul Rosa Sami Tom Zoe"),
    things=_words("Äpfel Stifte Murmeln Bücher Karten Kekse Muscheln Marken Ballons Orangen Blumen Perlen Eier Nüsse"),
    boxes=("Kisten", "Tüten", "Schachteln"),
    stories={
        "sum": (
            "{name} hat {a} {things} und bekommt {b} dazu. Wie viele {things} hat {name} jetzt?",
            "{name} findet {a} {things} und {other} findet {b}. Wie viele {things} finden beide zusammen?",
        ),
        "difference": (
            "{name} hat {a} {things} und verschenkt {b}. Wie viele {things} sind übrig?",
            "Auf einem Tisch lagen {a} {things}. {name} nahm {b} davon weg. Wie viele {things} liegen noch da?",
        ),
        "product": ("{name} hat {a} {boxes} mit je {b} Stück darin. Wie viele Stück hat {name}?",),
        "missing": ("{name} hat {b} {things} und braucht {a}. Wie viele {things} fehlen {name} noch?",),
        "more and more": ("{name} hat {a} rote, {b} grüne und {c} blaue {things}. Wie viele {things} hat {name}?",),
        "more, then less": ("{name} hat {a} {things}, kauft {b} dazu und verschenkt {c}. Wie viele {things} sind übrig?",),
        "less, then more": ("{name} hat {a} {things}, gibt {other} {b} und findet {c}. Wie viele {things} hat {name} jetzt?",),
        "less and less": ("{name} hat {a} {things}, gibt {other} {b} und verliert {c}. Wie viele {things} sind übrig?",),
        "boxes and more": ("{name} hat {a} {boxes} mit je {b} Stück darin und {c} Stück dazu. Wie viele Stück hat {name}?",),
        "boxes and less": (
            "{name} hat {a} {boxes} mit je {b} Stück darin und verschenkt {c} Stück. Wie viele Stück sind übrig?",
        ),
        "change": (
            "{name} kauft {a} {things} für je {b} Euro und bezahlt mit {c} Euro. Wie viele Euro bekommt {name} zurück?",
        ),
        "more than": ("{name} hat {a} {things}. {other} hat {b} mehr als {name}. Wie viele {things} haben beide zusammen?",),
        "times as many": ("{name} hat {a} {things}. {other} hat {b} mal so viele. Wie viele {things} haben beide zusammen?",),
        "boxes, more, less": (
            "{name} hat {a} {boxes} mit je {b} Stück darin, findet {c} Stück und gibt {other} {d} Stück. "
            "Wie viele Stück hat {name} jetzt?",
        ),
        "two prices": (
            "{name} kauft {a} {things} für je {b} Euro und {c} {others} für je {d} Euro. Wie viele Euro bezahlt {name}?",
        ),
        "change of two": (
            "{name} hat {c} Euro, kauft {a} {things} für je {b} Euro und eine Tasche für {d} Euro. Wie viele Euro sind übrig?",
        ),
        "shared": (
            "{name} hat {a} {boxes} mit je {b} Stück darin, behält {c} Stück und teilt den Rest gerecht unter {d} Kindern auf. "
            "Wie viele Stück bekommt jedes Kind?",
        ),
        "days": (
            "Jeden Tag macht {name} {a} {things} und {other} macht {b}. Nach {c} Tagen verkaufen sie {d} {things}. "
            "Wie viele {things} sind übrig?",
        ),
    },
)

LANGUAGES = {"en": _ENGLISH, "de": _GERMAN}
