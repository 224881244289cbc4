"""The word problems: right answers, nothing shared between training and validation, and a score for the last number only."""

import re
from collections import Counter

import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mxfp4_rl.tasks import data, word_problems
from mxfp4_rl.tasks.word_problems import KINDS, LEVELS, compute_score, make_problems, write_parquet
from mxfp4_rl.tasks.word_templates import LANGUAGES

# What each story asks for, written from the stories and not from the trees.
SOLVE = {
    "sum": lambda a, b: a + b,
    "difference": lambda a, b: a - b,
    "product": lambda a, b: a * b,
    "missing": lambda a, b: a - b,
    "more and more": lambda a, b, c: a + b + c,
    "more, then less": lambda a, b, c: a + b - c,
    "less, then more": lambda a, b, c: a - b + c,
    "less and less": lambda a, b, c: a - b - c,
    "boxes and more": lambda a, b, c: a * b + c,
    "boxes and less": lambda a, b, c: a * b - c,
    "change": lambda a, b, c: c - a * b,
    "more than": lambda a, b: a + (a + b),
    "times as many": lambda a, b: a + a * b,
    "boxes, more, less": lambda a, b, c, d: a * b + c - d,
    "two prices": lambda a, b, c, d: a * b + c * d,
    "change of two": lambda a, b, c, d: c - a * b - d,
    "shared": lambda a, b, c, d: (a * b - c) / d,
    "days": lambda a, b, c, d: c * (a + b) - d,
}


def score(reply, truth):
    result = compute_score("word_problems_level1", reply, truth, extra_info={"index": 0}, reward_router_address=None)
    assert set(result) == {"score", "acc"} and result["score"] == result["acc"]
    return result["score"]


def texts(problems):
    return [problem.text for problem in problems]


def numbers_in(text, story, language):
    """The letters' values, read from the text by the wording that it matches."""
    for wording in LANGUAGES[language].stories[story]:
        pattern, seen = "", set()
        for part in re.split(r"(\{\w+\})", wording):
            field = part[1:-1] if part.startswith("{") else None
            if field is None:
                pattern += re.escape(part)
            elif field in seen:
                pattern += f"(?P={field})"
            else:
                seen.add(field)
                pattern += rf"(?P<{field}>{'[0-9]+' if len(field) == 1 else '[^ .,0-9]+'})"
        match = re.match(pattern, text)
        if match:
            return {field: int(value) for field, value in match.groupdict().items() if len(field) == 1}
    raise AssertionError(f"no story {story!r} is: {text}")


# -------------------------------------------------------------------------------------------------- the problems


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_every_answer_is_what_the_story_asks_for(language):
    train, val = make_problems(3, levels=LEVELS, train_size=2000, val_size=2000, language=language)
    for p in train + val:
        numbers = numbers_in(p.text, p.kind.story, language)
        assert numbers == p.numbers, p.text
        assert SOLVE[p.kind.story](**numbers) == p.answer, p.text
        assert isinstance(p.answer, int) and p.answer >= 1
        assert re.fullmatch(r"[^{}\n]+[?] (Answer briefly|Antworte kurz)[.]", p.text)
        assert len(re.findall(r"\d+", p.text)) == len(p.numbers)  # no other number but those of the kind
    assert {(p.level, p.kind.story) for p in val} == {(kind.level, kind.story) for kind in KINDS}


@pytest.mark.parametrize("language", sorted(LANGUAGES))
def test_languages_tell_every_story(language):
    words = LANGUAGES[language]
    assert set(words.stories) == {kind.story for kind in KINDS} == set(SOLVE)
    for kind in KINDS:
        for wording in words.stories[kind.story]:
            fields = set(re.findall(r"\{(\w+)\}", wording))
            assert fields >= set(kind.numbers) and fields - set(kind.numbers) <= {"name", "other", "things", "others", "boxes"}
    for pool in (words.names, words.things, words.boxes):
        assert len(set(pool)) == len(pool) >= 3


def test_a_problem_of_each_level_by_hand():
    make = {(kind.level, kind.story): kind for kind in KINDS}
    by_hand = [
        ((1, "difference"), {"a": 7, "b": 3}, 4),
        ((2, "missing"), {"a": 30, "b": 12}, 18),
        ((3, "more, then less"), {"a": 12, "b": 5, "c": 3}, 14),
        ((4, "change"), {"a": 3, "b": 6, "c": 20}, 2),
        ((5, "shared"), {"a": 4, "b": 6, "c": 3, "d": 3}, 7),
    ]
    for kind, numbers, answer in by_hand:
        assert word_problems.Problem(make[kind], numbers, "").answer == answer


def test_the_key_knows_no_order():
    def key(story, **numbers):
        return word_problems.Problem(next(k for k in KINDS if k.story == story), numbers, "").key

    assert key("sum", a=3, b=4) == key("sum", a=4, b=3) != key("difference", a=4, b=3)
    assert key("difference", a=9, b=4) == key("missing", a=9, b=4) != key("difference", a=4, b=9)
    assert key("more, then less", a=12, b=5, c=3) == key("less, then more", a=12, b=3, c=5)
    assert key("less and less", a=12, b=5, c=3) == key("less and less", a=12, b=3, c=5)
    assert (
        key("two prices", a=2, b=3, c=4, d=5) == key("two prices", a=5, b=4, c=3, d=2) != key("two prices", a=2, b=4, c=3, d=5)
    )
    assert key("days", a=2, b=3, c=4, d=5) == key("days", a=3, b=2, c=4, d=5) != key("days", a=2, b=4, c=3, d=5)
    assert key("boxes and more", a=2, b=3, c=6) != key("boxes and more", a=2, b=6, c=3)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    other=st.integers(0, 10**6),
    levels=st.dictionaries(st.sampled_from(LEVELS), st.sampled_from([1, 2, 0.5]), min_size=1),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 200)),
)
def test_train_and_validation_are_disjoint_unique_and_deterministic(seed, other, levels, sizes):
    options = {"levels": levels, "train_size": sizes[0], "val_size": sizes[1]}
    train, val = make_problems(seed, **options)
    assert (len(train), len(val)) == sizes
    assert not {p.key for p in train} & {p.key for p in val}
    assert len(set(texts(train + val))) == len(train) + len(val)
    assert (train, val) == make_problems(seed, **options)
    # What is held out does not depend on sizes, levels or language.
    more = make_problems(seed, levels=[1, 2, 3, 4, 5], train_size=300, val_size=300, language="de")
    assert not {p.key for p in train} & {p.key for p in more[1]} and not {p.key for p in more[0]} & {p.key for p in val}
    if seed != other:
        assert texts(make_problems(other, **{**options, "train_size": 100})[0]) != texts(
            make_problems(seed, **{**options, "train_size": 100})[0]
        )


@pytest.mark.parametrize("levels", [None, [1], [5], [1, 2, 3, 4, 5]])
def test_validation_can_have_thousands_of_distinct_problems(levels):
    train, val = make_problems(levels=levels, val_size=5000)
    assert len(set(texts(val))) == 5000 and len(set(texts(train))) == word_problems.DEFAULT_TRAIN_SIZE
    assert not {p.key for p in train} & {p.key for p in val}


def test_a_longer_list_goes_on_where_a_shorter_one_ends():
    short, long = make_problems(train_size=64, val_size=40), make_problems(train_size=256, val_size=400)
    assert long[0][:64] == short[0] and long[1][:40] == short[1]


def test_levels_have_their_shares_in_any_beginning():
    train, _ = make_problems(levels={1: 1, 3: 2, 5: 1}, train_size=400)
    for end in (4, 100, 400):
        counts = Counter(p.level for p in train[:end])
        assert all(abs(counts[level] - share * end) <= 1 for level, share in {1: 0.25, 3: 0.5, 5: 0.25}.items())
    assert Counter(p.level for p in make_problems()[1]) == {1: 64, 2: 32, 3: 16, 4: 16}


def test_instruction_and_language():
    assert all(text.endswith("?") for text in texts(make_problems(instruction="", train_size=8)[0]))
    assert all(text.endswith("? Think first.") for text in texts(make_problems(instruction=" Think first. ", train_size=8)[0]))
    assert all(text.endswith("Antworte kurz.") for text in texts(make_problems(language="de", train_size=8)[0]))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1.5}, "seed=1.5"),
        ({"levels": []}, "levels=[]"),
        ({"levels": [0, 1]}, "[0, 1]"),
        ({"levels": [1, 1]}, "each once"),
        ({"levels": "12"}, "levels='12'"),
        ({"levels": 3}, "levels=3"),
        ({"levels": ["1"]}, "levels=['1']"),
        ({"levels": [[1]]}, "levels=[[1]]"),
        ({"levels": [True]}, "True"),
        ({"levels": {1: 0}}, "positive"),
        ({"levels": {1: float("nan")}}, "nan"),
        ({"train_size": 0}, "train_size=0"),
        ({"train_size": None}, "train_size=None"),
        ({"val_size": True}, "val_size=True"),
        ({"val_size": 10**7}, "val_size=10000000"),
        ({"language": "fr"}, "['de', 'en']"),
        ({"instruction": "Use 2 words."}, "without digits"),
        ({"instruction": 5}, "instruction=5"),
    ],
)
def test_bad_options_are_named(options, said):
    with pytest.raises(ValueError) as error:
        make_problems(**options)
    assert said in str(error.value)


def test_a_level_without_enough_problems_is_named(monkeypatch):
    monkeypatch.setattr(word_problems, "KINDS", [word_problems.Kind(1, "sum", ("+", "a", "b"), {"a": [2], "b": [3]})])
    with pytest.raises(ValueError, match=r"level 1 has no 9 distinct problems for (train|val) \(found 0\): lower \w+_size"):
        make_problems(levels=[1], train_size=9, val_size=9)


# ---------------------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize(
    "reply",
    ["23", "= 23", "=23", "23.", "+23", "**23**", "$23", "\\$23", "$23$", "23<|im_end|>", "(23)", "\\boxed{23}", "_23_", "`23`"]
    + ["23.00", "23 apples", "23, because it is so", "The answer is 23.", "Answer: 23", "Step 2: 23", "- 23", "* 23"]
    + ["12 + 14 - 3 = 23", "12 + 14 = 26. 26 - 3 = 23 apples are left.", "20 or 23", "6 x 4 - 1 = 23", "first\n- 23 apples"],
)
def test_right_replies_score(reply):
    assert score(reply, "23") == score(reply, 23) == 1.0
    assert score(reply, "24") == score(reply, "-23") == 0.0


@pytest.mark.parametrize(
    "reply",
    ["", " ", "twenty-three", "23 or 24", "23\n24", "-23", "= -23", "23.5", ".23", "023", "23rd", "x23", "23x", "23%", "23/1"]
    + ["46/23", "20 + 23", "4 * 23", "4 x 23", "4 times 23", "30 - 23", "30-23", "12 apples - 23", "8:23", "2^23", "2^{23}"]
    + ["46 \\div 23", "12 + (23)", "23e0", "2,3", "1,23", "\u0662\u0663", "23\u00b2", "123", "231", "23 = 20 + 3", "0,023"],
)
def test_wrong_or_unfinished_replies_do_not_score(reply):
    assert score(reply, "23") == 0.0


@pytest.mark.parametrize(
    ("reply", "truth", "expected"),
    [
        ("-7", "-7", 1.0),
        ("\u22127", -7, 1.0),
        ("3 - 10 = -7", "-7", 1.0),
        ("The answer is -$7.", "-7", 1.0),
        ("7", "-7", 0.0),
        ("-0", "0", 1.0),
        ("1,234", "1234", 1.0),
        ("so 1,234.00 dollars", "1234", 1.0),
        ("1234", "1,234", 1.0),
        ("12,34", "1234", 0.0),
        ("1234,567", "1234567", 0.0),
    ],
)
def test_signs_zeros_and_separators(reply, truth, expected):
    assert score(reply, truth) == expected


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 1000), language=st.sampled_from(sorted(LANGUAGES)))
def test_answers_score_and_the_question_does_not(seed, language):
    for p in make_problems(seed, levels=LEVELS, train_size=5, val_size=5, language=language)[0]:
        assert score(f"{p.answer}", str(p.answer)) == score(f"It is {p.answer:,}.", str(p.answer)) == 1.0
        assert score(f"{p.answer + 1}", str(p.answer)) == score(f"{p.answer} {p.answer + 1}", str(p.answer)) == 0.0


anything = st.one_of(st.none(), st.text(), st.integers(), st.floats(), st.binary(), st.lists(st.text()), st.booleans())


@settings(max_examples=300)
@given(solution=anything, truth=anything, extra=anything)
def test_the_score_never_raises(solution, truth, extra):
    assert compute_score(None, solution, truth, extra)["score"] in (0.0, 1.0)


@pytest.mark.parametrize("reply", ["9" * 100_000, "- " * 50_000, "1 + " * 50_000, "1," * 50_000, "<|" * 50_000, "a." * 50_000])
def test_degenerate_replies_are_cheap(reply):
    assert score(reply, "9") == 0.0  # a pattern that backtracks badly would hang here


def test_a_ground_truth_that_is_no_integer_is_logged(caplog):
    assert score("7", "some of them") == 0.0
    assert "some of them" in caplog.text


# ----------------------------------------------------------------------------------------- the Parquet and its name


def test_parquet_has_verls_schema(tmp_path):
    task = data.resolve_task("word_problems", tmp_path, seed=2, train_size=50, val_size=20)
    assert task[:2] == write_parquet(tmp_path, 2, train_size=50, val_size=20)
    assert task[2:] == ("mxfp4_rl.tasks.word_problems", "compute_score")
    for path, split, problems in zip(task[:2], ("train", "val"), make_problems(2, train_size=50, val_size=20), strict=True):
        rows = pyarrow.parquet.read_table(path).to_pylist()
        assert rows == [
            {
                "data_source": f"word_problems_level{p.level}",
                "prompt": [{"role": "user", "content": p.text}],
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": str(p.answer)},
                "extra_info": {"index": index, "split": split, "level": p.level, "kind": p.kind.story},
            }
            for index, p in enumerate(problems)
        ]
        data.check_parquet(path)
    assert write_parquet(tmp_path, 3, train_size=50, val_size=20)[0] != task.train_path
    with pytest.raises(ValueError, match="did you mean 'word_problems'"):
        data.resolve_task("word_problem", tmp_path)


def test_lengths_that_cut_the_problems_are_told():
    from omegaconf import OmegaConf

    from mxfp4_rl.launch.preflight import _check_lengths
    from mxfp4_rl.settings import Settings

    def warnings(task, prompt, response):
        lengths = OmegaConf.create({"data": {"max_prompt_length": prompt, "max_response_length": response}})
        return _check_lengths(lengths, Settings(task={"name": task}))

    assert "word_problems, which wants 104 and 48" in warnings("word_problems", 48, 12)[0]
    assert not warnings("word_problems", 104, 48) and not warnings("arithmetic", 48, 12)
