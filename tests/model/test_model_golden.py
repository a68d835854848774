"""Every family and rotary type against transformers: logits to 1e-4 relative in float32, packed as one by one."""

import pytest
import torch
from golden import build, read, stream

from enginepost.model import ModelSpec
from enginepost.model.layout import layout

CASES, PLACES, LOGITS = read()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("key", ["config", "saved_config"])
def test_logits_agree_with_transformers(name, key):
    case = CASES[name]
    model = build(case[key])
    with torch.no_grad():
        logits = model.logits(model.hidden(*stream(case["ids"])))
    wanted = LOGITS[name]
    assert (logits[PLACES] - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize("name", CASES)
def test_names_and_shapes_are_those_of_transformers(name):
    case = CASES[name]
    assert {e.name: list(e.shape) for e in layout(ModelSpec.from_config(case["config"]))} == case["parameters"]


@pytest.mark.parametrize("name", CASES)
def test_packed_as_one_by_one(name):
    case = CASES[name]
    model = build(case["config"])
    sequences = [case["ids"][:1], case["ids"], case["ids"][3:17], case["ids"][5:23]]
    with torch.no_grad():
        packed = model.hidden(*stream(*sequences))
        alone = torch.cat([model.hidden(*stream(s)) for s in sequences])
    assert (packed - alone).abs().max() <= 2e-6 * alone.abs().max()
