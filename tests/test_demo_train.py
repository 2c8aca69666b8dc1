"""The training script's hand-written block is transformers' Llama, and its checkpoint loads there."""

import json

import torch
from scripts import load_script
from transformers import AutoModelForCausalLM


def test_the_saved_model_computes_what_was_trained(tmp_path):
    train = load_script("recipes/demo/train.py")
    parameters = train.make_parameters("cpu")
    torch.manual_seed(1)
    for group in parameters:
        for weight in group.values():
            weight.data += 0.02 * torch.randn_like(weight)
            weight.data = weight.data.bfloat16().float()
    train.save(parameters, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(train.CONFIG))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids_BT = torch.randint(0, train.VOCAB, (2, 40))
    with torch.no_grad():
        expected = model(input_ids=ids_BT, labels=ids_BT)
        x = train.hidden_states(parameters, ids_BT, torch.float32)
        logits = train.head(x, parameters[2]["norm"], parameters[2]["embed_tokens"])
        loss = train.head_loss(x, parameters[2]["norm"], parameters[2]["embed_tokens"], ids_BT)
    assert torch.equal(logits, expected.logits)
    assert abs(loss.item() - expected.loss.item()) < 1e-5


def test_updates_are_about_orthogonal():
    train = load_script("recipes/demo/train.py")
    torch.manual_seed(0)
    updates = [torch.randn(train.LAYERS, *shape) for shape in ((96, 32), (32, 96), (32, 32))]
    for made, update in zip(train.orthogonalise_all(updates, torch.float32), updates, strict=True):
        assert made.shape == update.shape
        singular = torch.linalg.svdvals(made)
        assert singular.max() < 1.4 and singular.median() > 0.6
        assert (made * update).sum() > 0


def test_the_rate_falls_to_zero_at_each_end():
    train = load_script("recipes/demo/train.py")
    at = [train.learning_rate(t, [100.0, 150.0], 20.0, 0.5) for t in (20.0, 30.0, 99.9, 110.0, 149.9, 151.0)]
    assert at[0] < 0.05 and at[1] > 0.9 and at[2] < 0.01 and 0.3 < at[3] <= 0.5 and at[4] < 0.01 and at[5] == 0
