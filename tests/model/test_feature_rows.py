"""Tables between features and rows of weights, feature by feature."""

import pytest
import torch
from conftest import make_base

from modeling_mfn import MFNConfig
from modeling_mfn.model.feature_rows import FeatureRows
from modeling_mfn.model.sparse_code import SparseCode

PRUNED, WITHOUT_DIRECTION, WITHOUT_ENCODER = [0, 2, 5, 6], [0, 5, 6], [5]


@pytest.fixture
def rows():
    settings = {"pruned_features": PRUNED, "removed_decoder_rows": WITHOUT_DIRECTION}
    settings |= {"removed_encoder_rows": WITHOUT_ENCODER}
    by_layer = {name: {"2": features} for name, features in settings.items()}
    config = MFNConfig(text_config=make_base("llama-tied").config, layers=[0, 2], num_features=8, k=2, **by_layer)
    assert FeatureRows.of(config, 0) is None
    return FeatureRows.of(config, 2)


def test_the_tables_of_a_layer(rows):
    directions = [f for f in range(8) if f not in WITHOUT_DIRECTION]
    encoders = [f for f in range(8) if f not in WITHOUT_ENCODER]
    assert rows.pruned.tolist() == [f in PRUNED for f in range(8)]
    assert rows.encoder_names.tolist() == encoders
    assert rows.decoder_rows.tolist() == [directions.index(f) if f in directions else 0 for f in range(8)]
    assert not rows.state_dict()
    features = torch.tensor([1, 3, 7])
    found = [each.tolist() for each in rows.find(features)]
    assert found == [[of.index(f) for f in (1, 3, 7)] for of in (encoders, directions)]


def test_tables_are_filled_after_loading(rows):
    expected = {name: table.clone() for name, table in rows.named_buffers()}
    assert len(expected) == 3
    for table in rows.buffers():
        table.fill_(1)
    rows.fill()
    for name, table in rows.named_buffers():
        assert torch.equal(table, expected[name])


def test_pairs_by_row_and_by_feature(rows):
    values = torch.tensor([[3.0, 2.0, 1.0]], requires_grad=True)
    named = rows.name(SparseCode(torch.tensor([[2, 6, 5]]), values, 7))  # rows of the features 2, 7 and 6
    assert (named.indices.tolist(), named.values.tolist(), named.num_features) == ([[2, 7, 6]], [[0.0, 2.0, 0.0]], 8)
    (gradient,) = torch.autograd.grad(named.values.sum(), values)
    assert gradient.tolist() == [[0.0, 1.0, 0.0]]
    assert rows.locate(named).indices.tolist() == [[1, 4, 0]]  # of the directions 1, 2, 3, 4 and 7
