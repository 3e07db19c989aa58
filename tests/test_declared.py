from typing import Annotated

import pytest
from pydantic import BaseModel, Field

from sequencer.declared import UndeclaredContent, check_type, parse_json


class Shard(BaseModel):
    url: str
    nsamples: Annotated[int, Field(gt=0, le=10**9)]


class Means(BaseModel):
    mean: tuple[float, ...]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 100_000, "index.json: invalid JSON: it is nested too deeply"),
        ('{"url": "a.tar", "nsamples": "3"}', "index.json: nsamples: input should be a valid integer"),
        ('{"url": 5, "nsamples": 3}', "index.json: url: input should be a valid string"),
        ('{"url": "a.tar", "nsamples": 1e308}', "index.json: nsamples: input should be"),
        ('{"url": "a.tar"}', "index.json: nsamples: field required"),
        ("[1]", "index.json: input should be an object"),
        ('{"url": ', "index.json: invalid JSON"),
    ],
)
def test_a_file_that_breaks_its_declaration_is_refused_by_its_name_and_entry(text, said):
    with pytest.raises(UndeclaredContent) as refused:
        parse_json(Shard, text, "index.json")
    assert str(refused.value).startswith(said)
    assert "\n" not in str(refused.value)


def test_values_are_those_of_the_file():
    assert parse_json(Shard, '{"url": "a.tar", "nsamples": 3}', "index.json") == Shard(url="a.tar", nsamples=3)
    assert check_type(Means, {"mean": (1, 2.5)}, "config").mean == (1.0, 2.5)
    with pytest.raises(UndeclaredContent, match=r"config: mean.1: input should be a valid number"):
        check_type(Means, {"mean": (1, "2.5")}, "config")
